"""An OpenAI-compatible server, asked for streams: what came when, and how it failed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tierloom.adapters.proxy.upstream import EngineFailed, Upstream
from tierloom.stages.errors import ConfigError, TierloomError

Messages = Sequence[Mapping[str, str]]
_NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading an answer raises that is JSON of another shape, or none."""
_MOST = 16 << 20
"""Bytes of an answer that is no stream."""


@dataclass(slots=True)
class Sample:
    """One request. Times are in seconds of `time.perf_counter()`."""

    messages: Messages
    sent: float = 0.0
    first: float = 0.0
    """When the first text came; 0: none came."""
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between one piece of text and the next, in seconds."""
    text: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt, by the server's count; None: it does not say."""
    counted: bool = False
    """The server said how many tokens there were; else pieces of text are counted."""
    error: str = ""
    """What went wrong, in few words of a small set; empty: nothing."""
    detail: str = ""
    session: int = 0
    round: int = 1
    arm: str = "with"
    """`without`: it asked for nothing to be loaded."""
    late: float = 0.0
    """How long after it was due it was sent."""
    warm: bool = True
    """False: it was sent while the run warmed up."""
    wanted: int = 0
    """Tokens of the prompt that were aimed at; 0: nothing was."""

    @property
    def ttft(self) -> float:
        """From sending to the first text; to the end where none came."""
        return (self.first or self.ended) - self.sent


class OpenAIStream:
    """One server. For one event loop; close it."""

    def __init__(
        self, base_url: str, model: str = "", *, api_key: str = "", chat: bool = True,
        timeout: float = 600.0, more: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`base_url`: http://HOST:PORT/v1, with more of a path where the server is below one.
        `chat`: messages; else their texts as one prompt. `more`: of every body. Raises
        ConfigError."""
        parts = urlsplit(base_url)
        try:
            self._upstream = Upstream(f"{parts.scheme}://{parts.netloc}")
        except ConfigError as error:
            raise ConfigError(f"--base-url: {error}, and /v1") from None
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.root = self._upstream.url + path
        self._path, self._chat, self._more = path.encode(), chat, dict(more or {})
        self._timeout, self.model = timeout, model
        self._headers = [(b"content-type", b"application/json")]
        if api_key:
            self._headers.append((b"authorization", b"Bearer " + api_key.encode()))

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises EngineFailed."""

        async def whole() -> tuple[int, bytes]:
            target = self._path + path.encode()
            with await self._upstream.ask(b"GET", target, self._headers[1:]) as answer:
                await answer.begin(_MOST, all_of_it=True)
                return answer.status, answer.first

        try:
            return await asyncio.wait_for(whole(), min(30.0, self._timeout))
        except asyncio.TimeoutError:
            raise EngineFailed("did not answer in time") from None

    async def first_model(self) -> str:
        """The first that it serves. Raises ConfigError; TierloomError where it does not answer."""
        try:
            status, body = await self.get("/v1/models")
            said = json.loads(body)["data"][0]["id"] if status == 200 else None
        except EngineFailed as error:
            raise TierloomError(f"{self.root}: {error}: is the server up?") from None
        except (ValueError, LookupError, TypeError):
            said = None
        if not isinstance(said, str):
            raise ConfigError(f"{self.root}/v1/models names no model: pass --model NAME")
        return said

    async def ask(
        self, messages: Messages, most: int, more: Mapping[str, Any] | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> Sample:  # fmt: skip
        """Have an answer of `most` tokens at most, greedy. Never raises but when it is cancelled:
        what goes wrong is in the sample."""
        made = Sample(list(messages))
        body = {
            "model": self.model, "max_tokens": most, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **self._more, **(more or {}),
        }  # fmt: skip
        if self._chat:
            body["messages"] = made.messages
        else:
            body["prompt"] = "\n\n".join(m["content"] for m in messages)
        made.sent = time.perf_counter()
        try:
            await asyncio.wait_for(
                self._stream(made, json.dumps(body).encode(), headers), self._timeout
            )
        except asyncio.TimeoutError:
            made.error, made.detail = "too late", f"no end in {self._timeout:g} s"
        except EngineFailed as error:
            made.error = "cut off" if made.first else "no answer"
            made.detail = str(error)
        except _NOT_OURS as error:
            made.error = "not OpenAI's"
            made.detail = f"{type(error).__name__}: {error}"
        made.ended = time.perf_counter()
        return made

    async def _stream(
        self, made: Sample, body: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> None:
        target = self._path + (b"/v1/chat/completions" if self._chat else b"/v1/completions")
        ended, pieces, last = False, 0, 0.0
        sent = [*self._headers, *headers]
        with await self._upstream.ask(b"POST", target, sent, body) as answer:
            if answer.status != 200:
                await answer.begin(_MOST, all_of_it=True)
                made.error = f"HTTP {answer.status}"
                made.detail = answer.first[:500].decode(errors="replace")
                return
            async for data in _events(answer.pieces()):
                if data == b"[DONE]":
                    ended = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    made.error, made.detail = "error in the stream", str(event["error"])[:500]
                    return
                _note_usage(made, event.get("usage"))
                for choice in event.get("choices") or ():
                    ended = ended or bool(choice.get("finish_reason"))
                    said = choice.get("delta") or choice
                    text = said.get("content") or said.get("reasoning_content") or said.get("text")
                    if not text:
                        continue
                    now = time.perf_counter()
                    if made.first:
                        made.gaps.append(now - last)
                    else:
                        made.first = now
                    made.text, pieces, last = made.text + text, pieces + 1, now
        if not ended:
            made.error, made.detail = "cut off", "the stream ended without [DONE]"
        if not made.counted:
            made.answer_tokens = pieces

    def close(self) -> None:
        self._upstream.close(for_good=True)


def _note_usage(made: Sample, usage: Any) -> None:
    if not usage:
        return
    made.prompt_tokens = int(usage["prompt_tokens"])
    made.answer_tokens = int(usage.get("completion_tokens") or 0)
    made.counted = True
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    made.cached_tokens = None if cached is None else int(cached)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()
