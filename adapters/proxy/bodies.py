"""A client's body: read, understood as far as routing needs it, and changed as little as can be.

A decoder gets the client's own bytes; what it must know in addition is put before the last brace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

MOST_BYTES = 64 << 20
LIMITS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
}
"""What bounds the tokens of an answer, by the paths whose prompts are handed off."""
_TEXT = ("tools", "instructions", "prompt", "messages", "input")
"""Where text is, in the order in which templates place it."""
_ALONE = ("prompt_embeds", "use_beam_search", "prompt_logprobs")
"""With these the engine that answers must compute the prompt itself."""
_NAMES = ("transfer_id", "disagg_spec", "ret_first_tok")
_NOTHING = {f"remote_{x}": None for x in ("engine_id", "block_ids", "host", "port")}


class Refusal(Exception):
    """A request that no engine is asked about. `status` of HTTP; the text has the cure."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        said = {"message": str(self), "type": kind, "param": None, "code": self.status}
        return {"error": said}


class ClientBody(NamedTuple):
    """A body as it came, and what it says."""

    raw: bytes
    said: dict[str, Any]

    @classmethod
    def parsed(cls, raw: bytes, path: str) -> ClientBody:
        """Raises Refusal."""
        try:
            said = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise Refusal(
                400, f"{path}: the body is not JSON in UTF-8: {why}; send an object"
            ) from None
        if not isinstance(said, dict):
            kind = type(said).__name__
            raise Refusal(400, f"{path}: the body is JSON, but a {kind}; send an object")
        params = said.get("kv_transfer_params")
        if isinstance(params, dict) and (bad := [k for k in params if _of_handoff(k)]):
            said = {**said, "kv_transfer_params": {k: params[k] for k in params if k not in bad}}
            raw = json.dumps(said).encode()
        return cls(raw, said)

    @property
    def model(self) -> str:
        """As it is named, for logs and names of prefixes."""
        return str(self.said.get("model"))[:200]

    @property
    def computed_whole(self) -> bool:
        """One engine must compute this prompt by itself, or there are several prompts."""
        said = self.said
        prompt = said.get("prompt")
        several = isinstance(prompt, list) and not all(isinstance(t, int) for t in prompt)
        echoed = said.get("echo") and said.get("logprobs") is not None
        alone = any(said.get(key) is not None and said[key] is not False for key in _ALONE)
        return several or bool(echoed) or alone

    def text(self) -> bytes:
        """The prompt's text, for prefixes and lengths: equal beginnings of conversations have equal
        beginnings here."""
        parts = [self.said[key] for key in _TEXT if self.said.get(key)]
        texts = (part if isinstance(part, str) else json.dumps(part) for part in parts)
        return "\n".join(texts).encode("utf-8", "surrogatepass")

    def token_count(self) -> int | None:
        """Exactly, where the prompt is token ids."""
        prompt = self.said.get("prompt")
        return len(prompt) if isinstance(prompt, list) else None

    def to_prefill(self, path: str, params: Mapping[str, Any]) -> bytes:
        """What a prefiller is asked: the same prompt, and one token of an answer. `params`: what
        it is told of the decoder."""
        said = {k: v for k, v in self.said.items() if k not in ("stream_options", "min_tokens")}
        limits = [name for name in LIMITS[path] if name in said] or ["max_tokens"]
        said |= dict.fromkeys(limits, 1) | {"stream": False}
        said |= {name: 1 for name in ("n", "best_of") if said.get(name)}
        said["kv_transfer_params"] = {**self._params, **params}
        return json.dumps(said).encode()

    def to_decode(self, params: Mapping[str, Any] | None) -> bytes:
        """What a decoder is asked: the client's bytes, with what it is told by a prefiller."""
        if not params:
            return self.raw
        told = {"kv_transfer_params": {**self._params, **params}}
        if "kv_transfer_params" in self.said:
            return json.dumps({**self.said, **told}).encode()
        head = self.raw.rstrip(b" \t\r\n")[:-1]
        return head + (b"," if self.said else b"") + json.dumps(told)[1:].encode()

    @property
    def _params(self) -> dict[str, Any]:
        """The client's own, such as tags."""
        params = self.said.get("kv_transfer_params")
        return params if isinstance(params, dict) else {}


def given_away(transfer_id: str | None = None) -> dict[str, Any]:
    """What a prefiller is told where it keeps what it computes until a decoder asks.
    `transfer_id`: what the decoder, which is asked at the same time, calls it."""
    named = {"transfer_id": transfer_id} if transfer_id is not None else {}
    return {"do_remote_decode": True, "do_remote_prefill": False, **_NOTHING, **named}


def addressed(host: Mapping[str, Any], transfer_id: str) -> dict[str, Any]:
    """What a decoder is told of a prefiller that computes meanwhile. `host`: what was learned of
    the prefiller, as `prefiller_host` gives it."""
    return {
        "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer_id,
        "remote_request_id": transfer_id, "remote_block_ids": [], **host,
    }  # fmt: skip


def prefiller_host(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where a prefiller is reached by decoders, if it takes them before it is done: those that
    name blocks do not."""
    host = {f"remote_{x}": params.get(f"remote_{x}") for x in ("engine_id", "host", "port")}
    return host if params.get("remote_block_ids") == [] and all(host.values()) else None


def _of_handoff(key: str) -> bool:
    """A client may not name engines to one another."""
    return key.startswith(("do_remote_", "remote_")) or key in _NAMES
