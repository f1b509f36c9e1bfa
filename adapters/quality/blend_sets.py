"""Prompts on which blending is judged: made of passages that were kept elsewhere.

Three sets. `rag`: a system block, five passages of 256 tokens of five texts, a question and its
answer behind; the question is the beginning of a sentence of one passage, the answer is its end.
`seq`: a text cut in 5 x 112 tokens, its next tokens behind. `edit`: a prompt of 6 x 112 tokens
whose second chunk is replaced. Texts ship with Python (help topics, docstrings) or Debian
(licenses). A third of them are for choosing a policy's parameters, the others for judging it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from tierloom.adapters.quality.documents import docstrings, topics
from tierloom.stages.blend.policies import Patchwork
from tierloom.stages.kv.text import Excerpt, Run

Encoder = Callable[[str], list[int]]
Kind = Literal["rag", "seq", "edit"]
KINDS: tuple[Kind, ...] = ("rag", "seq", "edit")
JUDGED = 24
"""Documents of each set, where not said otherwise."""

CHUNK, PASSAGE, SUFFIX, ASKED = 112, 256, 64, 16
_EDITED = 90
_TELLING = 50
"""Characters of a line that two texts have in common only where one has it of the other."""
_LICENSES = Path("/usr/share/common-licenses")
_MODULES = (
    "argparse", "asyncio", "calendar", "collections", "concurrent.futures", "configparser",
    "contextlib", "csv", "dataclasses", "datetime", "decimal", "difflib", "email.message", "enum",
    "fractions", "functools", "heapq", "html.parser", "http.client", "http.server", "imaplib",
    "inspect", "ipaddress", "json", "logging", "mailbox", "multiprocessing.pool", "optparse", "os",
    "pathlib", "pdb", "platform", "pprint", "random", "shutil",
    "smtplib", "socket", "socketserver", "sqlite3", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "turtle",
    "typing", "unittest", "urllib.request", "uuid", "weakref", "xml.dom.minidom", "xmlrpc.client",
    "zipfile",
)  # fmt: skip
_SYSTEM = (
    "You answer questions from the given passages. Use only what they say, and say so when they "
    "do not say it.\n\nPassages:\n"
)


class Passage(NamedTuple):
    """A run of a prompt, and the tokens that it was captured behind."""

    ids: list[int]
    behind: list[int]


class Prompt(NamedTuple):
    """One document of a set."""

    name: str
    exact: list[int]
    """Computed as it stands: the prefix, and what is new."""
    pieces: list[Passage]
    suffix: list[int]
    """Read on top of the context; KL is taken over it."""
    asked: int
    """First tokens of the suffix, by which the probe asks."""

    @property
    def ids(self) -> list[int]:
        """Of the context."""
        return self.exact + [i for piece in self.pieces for i in piece.ids]

    @property
    def work(self) -> Patchwork:
        runs, at = [], len(self.exact)
        for piece in self.pieces:
            excerpt = Excerpt(at, len(piece.ids), bytes(32), 0, len(piece.behind))
            runs.append(Run((excerpt,), seam=True))
            at += len(piece.ids)
        return Patchwork(at, len(self.exact), runs)


def prompts(kind: Kind, encode: Encoder, *, judging: bool = True) -> Iterator[Prompt]:
    """Documents of a set, the same ones in the same order every time; at least 24 with SmolLM2."""
    begin = encode("")
    plain: Encoder = lambda text: encode(text)[len(begin) :]  # noqa: E731
    pool = [(name, plain(text)) for name, text in _texts(judging=judging)]
    make = {"rag": _rag, "seq": _seq, "edit": _edit}[kind]
    yield from make(begin, plain, pool)


def _texts(*, judging: bool) -> list[tuple[str, str]]:
    """Two of three texts to judge on, the third to choose on; no two share a line."""
    found = {f"topic {name}": text for name, text in topics().items()}
    for name in _MODULES:
        if find_spec(name.partition(".")[0]) is not None:  # else a Python without it
            found[f"module {name}"] = docstrings(name)
    if _LICENSES.is_dir():
        found |= {f"license {p.name}": p.read_text("utf-8") for p in _LICENSES.iterdir()
                  if p.is_file() and not p.is_symlink()}  # fmt: skip
    long = {n: re.sub(r"\n{3,}", "\n\n", t) for n, t in found.items() if len(t) > 1500}
    names, seen = [], set[str]()
    for name in random.Random(7).sample(sorted(long), len(long)):
        lines = {line.strip() for line in long[name].splitlines() if len(line.strip()) >= _TELLING}
        if not lines & seen:  # topics lie within topics, and licenses quote one another
            names.append(name)
            seen |= lines
    return [(name, long[name]) for i, name in enumerate(names) if (i % 3 > 0) == judging]


def _seq(begin: list[int], plain: Encoder, pool: list[tuple[str, list[int]]]) -> Iterator[Prompt]:
    for i, (name, ids) in enumerate(pool):
        if len(ids) >= 5 * CHUNK + SUFFIX:
            chunks = [ids[at : at + CHUNK] for at in range(0, 5 * CHUNK, CHUNK)]
            first, foreign = begin + chunks[0], _foreign(pool, i)
            pieces = [Passage(chunk, first + foreign) for chunk in chunks[1:]]
            suffix = ids[5 * CHUNK : 5 * CHUNK + SUFFIX]
            yield Prompt(f"seq {name}", first, pieces, suffix, ASKED)


def _edit(begin: list[int], plain: Encoder, pool: list[tuple[str, list[int]]]) -> Iterator[Prompt]:
    for i, (name, ids) in enumerate(pool):
        if len(ids) >= 6 * CHUNK + SUFFIX:
            exact = begin + ids[:CHUNK] + _foreign(pool, i)[:_EDITED]
            kept = Passage(ids[2 * CHUNK : 6 * CHUNK], begin + ids[: 2 * CHUNK])
            suffix = ids[6 * CHUNK : 6 * CHUNK + SUFFIX]
            yield Prompt(f"edit {name}", exact, [kept], suffix, ASKED)


def _rag(begin: list[int], plain: Encoder, pool: list[tuple[str, list[int]]]) -> Iterator[Prompt]:
    texts = dict(_texts(judging=True) + _texts(judging=False))
    long = [(name, ids) for name, ids in pool if len(ids) >= PASSAGE]
    system, rng = begin + plain(_SYSTEM), random.Random(11)
    for i, (name, _) in enumerate(long):
        asked = _sentence(texts[name])
        if asked is None:
            continue
        at, first, last = asked
        # passages begin a little before the sentence, as a retriever's would
        told = plain(texts[name][max(0, at - 300) : at + 1500])[:PASSAGE]
        if len(told) < PASSAGE:
            continue
        others = rng.sample([entry for entry in long if entry[0] != name], 5)
        passages = [_somewhere(rng, ids) for _, ids in others]
        foreign = passages.pop()[:128]
        passages.insert(i % 5, told)
        question = plain(f'\n\nQuestion: How does this go on: "{first} ..."?\nAnswer:')
        answer = plain(f' The passages say: "{first} {last}"')
        pieces = [Passage(ids, system + foreign) for ids in passages]
        yield Prompt(f"rag {name}", system, pieces, question + answer, len(question))


def _sentence(text: str) -> tuple[int, str, str] | None:
    """Where a sentence of 12 to 30 words begins, its first half and its second; the first one
    behind the text's beginning."""
    for found in re.finditer(r"(?<=[.!?]\s)[A-Z][^.!?]{40,240}[.!?]", text[300:]):
        words = found[0].split()
        if 12 <= len(words) <= 30:
            half = len(words) // 2
            return 300 + found.start(), " ".join(words[:half]), " ".join(words[half:])
    return None


def _somewhere(rng: random.Random, ids: list[int]) -> list[int]:
    at = rng.randrange(len(ids) - PASSAGE + 1)
    return ids[at : at + PASSAGE]


def _foreign(pool: list[tuple[str, list[int]]], i: int) -> list[int]:
    """Tokens of another text."""
    return pool[i - 1][1][200 : 200 + CHUNK]
