"""tierloom warm: have a running server compute a corpus, so that its passages are kept.

KV that was captured behind real text needs little repair where it is reused; captured alone, or
behind a short system prompt alone, it needs much. So passages go several to a prompt.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import typer

from tierloom.stages.errors import ConfigError

SHORTEST = 2000
"""Characters of a prompt below which it is not made shorter for a server that refuses it."""
_WAIT = 600.0
"""Seconds that a server may take for one prompt."""


def run_warm(
    url: str, files: Sequence[Path], *, system: Path | None, model: str, prompt: int, passage: int,
    token_file: Path | None,
) -> int:  # fmt: skip
    """Send a corpus to an OpenAI-compatible server; the exit code. `prompt`, `passage`: characters
    of each, at most. Raises ConfigError for files that hold no text, OSError."""
    if not 0 < passage <= prompt:
        raise ConfigError(f"warm: a passage of {passage} characters in a prompt of {prompt}")
    head = _text(system).rstrip() + "\n\n" if system else ""
    passages = [p for file in files for p in passages_of(_text(file), passage)]
    if not passages:
        raise ConfigError(f"warm: no text in {', '.join(map(str, files))}")
    server = _Completions(url, token_file.read_text().strip() if token_file else "")
    model = model or server.model()
    began, tokens, sent, refused = time.monotonic(), 0, 0, 0
    todo = list(packs(passages, prompt))
    while todo:
        pack = todo.pop(0)
        status, said = server.complete(model, head + "\n\n".join(pack))
        if status == 200:
            tokens, sent = tokens + int(said["usage"]["prompt_tokens"]), sent + 1
        elif status == 400 and len(pack) > 1 and sum(map(len, pack)) > SHORTEST:
            half = len(pack) // 2  # longer than the model takes
            todo[:0] = [pack[:half], pack[half:]]
        else:
            refused += 1
            typer.echo(f"tierloom: {url} refused a prompt: HTTP {status}: {said}", err=True)
    took = time.monotonic() - began
    typer.echo(
        f"{url}: {len(passages)} passages of {len(files)} files in {sent} prompts, "
        f"{tokens} tokens computed or found, {took:.1f} s"
    )
    return 1 if refused else 0


def passages_of(text: str, most: int) -> Iterator[str]:
    """Passages of at most `most` characters, which end where a paragraph does; else where a line,
    a word, or the room ends."""
    passage = ""
    for paragraph in filter(None, (p.strip() for p in re.split(r"\n\s*\n", text))):
        if passage and len(passage) + 2 + len(paragraph) > most:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
        while len(passage) > most:
            end = max(passage.rfind("\n", 1, most), passage.rfind(" ", most // 2, most))
            end = end if end > 0 else most
            yield passage[:end].rstrip()
            passage = passage[end:].lstrip()
    if passage:
        yield passage


def packs(passages: Sequence[str], most: int) -> Iterator[list[str]]:
    """Prompts' passages, in order, of at most `most` characters together. None has one passage
    alone, if there are two: the last takes that before it along again."""
    pack: list[str] = []
    before = ""
    for passage in passages:
        if pack and sum(len(p) + 2 for p in pack) + len(passage) > most:
            yield [before, *pack] if len(pack) == 1 and before else pack
            before, pack = pack[-1], []
        pack.append(passage)
    if pack:
        yield [before, *pack] if len(pack) == 1 and before else pack


class _Completions:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, token: str) -> None:
        if not re.match(r"https?://", url):
            raise ConfigError(f"warm: {url!r} is not http://HOST:PORT")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def model(self) -> str:
        """The first that it serves."""
        status, said = self._ask("/v1/models")
        if status != 200 or not said.get("data"):
            raise ConfigError(f"{self._url} names no model (HTTP {status}): say --model NAME")
        return str(said["data"][0]["id"])

    def complete(self, model: str, text: str) -> tuple[int, Any]:
        """Status, and what it says."""
        body = {
            "model": model, "prompt": text, "max_tokens": 1, "temperature": 0,
            "kv_transfer_params": {"tierloom.blend": False},  # what is kept is exact
        }  # fmt: skip
        return self._ask("/v1/completions", body)

    def _ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._url + path, data, self._headers), timeout=_WAIT) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, error.read(400).decode(errors="replace")
        except URLError as error:
            raise OSError(f"{self._url}: {error.reason}") from error
        except (HTTPException, ValueError) as error:
            raise OSError(f"{self._url}: no OpenAI-compatible server: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
