"""What users of an engine do: sessions, each of which asks and waits for answers."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from tierloom.adapters.workload.openai_stream import Messages
from tierloom.adapters.workload.prose import Prose

Session = Callable[["Ask"], Awaitable[None]]


class Ask(Protocol):
    """How a session asks: when it is its turn."""

    async def __call__(self, messages: Messages, round: int, wanted: int = 0) -> str | None:
        """The answer; None where there was none. `wanted`: tokens that the prompt should have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkOptions:
    """How much of what. Lengths are in tokens."""

    num_users: int = 10
    num_rounds: int = 5
    shared_system_prompt: int = 1000
    user_history_prompt: int = 2000
    answer_len: int = 100
    question_len: int = 16
    documents: int = 16
    doc_len: int = 4000
    repeat: int = 2
    top_k: int = 4
    chunk_len: int = 256
    branches: int = 2
    shuffle: bool = False
    endless: bool = False
    """Sessions that end are replaced, until the time is over."""
    first_user: int = 0
    seed: int = 0


def sessions_of(workload: str, work: WorkOptions, prose: Prose) -> Iterator[Session]:
    """The sessions of a workload, in the order in which they begin."""
    return WORKLOADS[workload](work, prose)


def _multi_round_qa(work: WorkOptions, prose: Prose) -> Iterator[Session]:
    """Users with a history of their own ask one question after another; every prompt has all that
    was said before."""
    for user in _users(work):

        async def session(ask: Ask, user: int = user) -> None:
            messages = _system(work, prose)
            history = prose.text(f"history {user}", work.user_history_prompt)
            for r in range(1, work.num_rounds + 1):
                question = prose.text(f"question {user} {r}", work.question_len)
                content = f"{history} {question}" if r == 1 else question
                said = [*messages, _user(content)]
                wanted = work.shared_system_prompt + work.user_history_prompt + work.question_len
                answer = await ask(said, r, wanted if r == 1 else 0)
                if answer is not None:
                    messages = [*said, {"role": "assistant", "content": answer}]
                elif r == 1:
                    return

        yield session


def _long_doc_qa(work: WorkOptions, prose: Prose) -> Iterator[Session]:
    """Long documents, each asked about `repeat` times: all of them once, then all again."""
    order = random.Random(work.seed)
    for r in itertools.count(1) if work.endless else range(1, work.repeat + 1):
        numbers = list(range(work.documents))
        if work.shuffle:
            order.shuffle(numbers)
        for document in numbers:

            async def session(ask: Ask, document: int = document, r: int = r) -> None:
                text = prose.text(f"document {document}", work.doc_len)
                question = prose.text(f"about {document} {r}", work.question_len)
                wanted = work.doc_len + work.question_len
                await ask([_user(f"{text} {question}")], min(r, work.repeat), wanted)

            yield session


def _rag(work: WorkOptions, prose: Prose) -> Iterator[Session]:
    """Questions over `top_k` passages out of `documents`, of which some are wanted much more often
    than others; `shuffle`: in any order, not in that of the corpus."""
    weights = [1 / (i + 1) for i in range(work.documents)]
    top = min(work.top_k, work.documents)
    for user in _users(work):

        async def session(ask: Ask, user: int = user) -> None:
            choice = random.Random(f"{work.seed} rag {user}")
            for r in range(1, work.num_rounds + 1):
                found: list[int] = []
                while len(found) < top:
                    found += {*choice.choices(range(work.documents), weights)} - {*found}
                found = found if work.shuffle else sorted(found)
                passages = [prose.text(f"passage {i}", work.chunk_len) for i in found]
                question = prose.text(f"asked {user} {r}", work.question_len)
                messages = [*_system(work, prose), _user("\n\n".join([*passages, question]))]
                wanted = work.shared_system_prompt + top * work.chunk_len + work.question_len
                await ask(messages, r, wanted)

        yield session


def _agentic(work: WorkOptions, prose: Prose) -> Iterator[Session]:
    """A tree of calls: each answer is handed to `branches` calls at once, which go on from it, down
    to `num_rounds`; one more call joins what the first of them said."""
    for user in _users(work):

        async def session(ask: Ask, user: int = user) -> None:
            async def node(messages: Messages, depth: int, name: str) -> str:
                answer = await ask(messages, depth)
                if answer is None or depth == work.num_rounds:
                    return answer or ""
                said = [*messages, {"role": "assistant", "content": answer}]
                below = [
                    node([*said, _user(prose.text(f"step {name}.{i}", work.question_len))],
                         depth + 1, f"{name}.{i}")
                    for i in range(work.branches)
                ]  # fmt: skip
                return "\n".join([answer, *await asyncio.gather(*below)])

            task = prose.text(f"task {user}", work.user_history_prompt)
            root = [*_system(work, prose), _user(task)]
            if found := await node(root, 1, str(user)):
                await ask([*root, _user(found)], work.num_rounds + 1)

        yield session


def _random(work: WorkOptions, prose: Prose) -> Iterator[Session]:
    """Prompts that have nothing in common: what a cache costs where it is of no use."""
    for user in _users(work):

        async def session(ask: Ask, user: int = user) -> None:
            for r in range(1, work.num_rounds + 1):
                text = prose.text(f"random {user} {r}", work.user_history_prompt)
                await ask([_user(text)], r, work.user_history_prompt)

        yield session


WORKLOADS = {
    "multi-round-qa": _multi_round_qa, "long-doc-qa": _long_doc_qa, "rag": _rag,
    "agentic": _agentic, "random": _random,
}  # fmt: skip


def _users(work: WorkOptions) -> Iterator[int]:
    """Numbers of users, the first of which is `first_user`."""
    first = work.first_user
    return itertools.count(first) if work.endless else iter(range(first, first + work.num_users))


def _system(work: WorkOptions, prose: Prose) -> list[dict[str, str]]:
    text = prose.text("system", work.shared_system_prompt)
    return [{"role": "system", "content": text}] if text else []


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
