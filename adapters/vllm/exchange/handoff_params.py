"""What a proxy passes from a prefiller to a decoder: `kv_transfer_params` as NIXL's connector has
them, so that proxies that were written for it need no change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tierloom.pipeline.handoff.handoff import ToldDecoder, ticket_of
from tierloom.stages.tiers.net.address import Address

_LONG = 1 << 16
"""Characters of a name, at most."""
_RANKS = 1024
"""Ports of one decoder, at most."""
_COUNTED = "remote_prefill_cached_tokens"
_FROM_HEADER = re.compile(
    r"(?:\d+_)?(?:cmpl-(?P<text>.+?)-\d+|chatcmpl-(?P<chat>.+?))(?:-[0-9a-f]{8})?", re.DOTALL
)
"""How vLLM makes a request's id of X-Request-Id: `0_cmpl-ID-1-0123abcd` is one of `n` answers to
one of several prompts, and has an end that makes it unique."""


class GivenAway(NamedTuple):
    """This engine computes a request for another."""

    name: str
    """By which the other asks for it; empty: by the request's own."""
    receiver: ToldDecoder | None = None
    """The other, where the proxy has chosen it already."""


class Elsewhere(NamedTuple):
    """Another engine computes a request, or has done so."""

    host: str
    port: int
    ticket: bytes
    later: bool
    """The other may not have heard of the request yet."""


NOWHERE = Elsewhere("", 0, b"", False)
"""Nobody was named, and somebody may have had it fetched."""


class Told(dict[str, Any]):
    """Params for a decoder, to which vLLM adds how much of the prompt this engine had. By that the
    decoder's `usage` would say nothing of what it did not compute, so it is not taken."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name != _COUNTED:
            super().__setitem__(name, value)


def read_params(params: Mapping[str, Any] | None) -> tuple[GivenAway | None, Elsewhere | None]:
    """What a request says of a hand-off. Raises ValueError, naming what cannot be used."""
    if not params:
        return None, None
    gives, lands = (_flag(params, f"do_remote_{what}") for what in ("decode", "prefill"))
    together = _name(params, "transfer_id", needed=False)
    landed = None
    if lands:
        port = params.get("remote_port")
        if type(port) is not int or not 0 < port < 1 << 16:
            raise ValueError(f"remote_port wants a port, got {_short(port)}")
        name = together or _name(params, "remote_request_id")
        # who has had an answer of the other's passes its blocks; who asks both at once has none
        later = bool(together) or "remote_block_ids" not in params
        landed = Elsewhere(_name(params, "remote_host"), port, ticket_of(name), later)
    if gives or params.get("disagg_spec") is None:
        return (GivenAway(together) if gives else None), landed
    return GivenAway("", _receiver(params["disagg_spec"])), landed


def first_token(request: Any) -> dict[str, Any] | None:
    """What LMCache's proxy wants of a prefiller's answer; None: it is not asked for."""
    if "ret_first_tok" not in (request.kv_transfer_params or ()):
        return None
    tokens = request.output_token_ids
    return {"first_tok": tokens[0]} if len(tokens) else None


def outside_name(request: str) -> str:
    """What a request is called outside of vLLM: the X-Request-Id that it came with, if any; else
    vLLM's id of it."""
    made = _FROM_HEADER.fullmatch(request)
    return (made["text"] or made["chat"]) if made else request


def answer(engine: str, request: str, at: str, tokens: int, tp_size: int) -> dict[str, Any] | None:
    """What another engine is to be told. `at`: where this one serves; None: others cannot dial
    that. Nothing of it names a block: KV is found by what it was computed from."""
    address = Address.parse(at, "tierloom", tls="tierloom+tls", unix="tierloom+unix")
    if address.path:
        return None
    return Told({
        "do_remote_prefill": True, "do_remote_decode": False,
        "remote_engine_id": engine, "remote_request_id": request,
        "remote_host": address.host, "remote_port": address.port,
        "remote_block_ids": [], "remote_num_tokens": tokens, "tp_size": tp_size,
    })  # fmt: skip


def _receiver(spec: Any) -> ToldDecoder:
    """A decoder, as LMCache's proxy describes it: a port for each of its ranks. Raises
    ValueError."""
    said = spec if isinstance(spec, Mapping) else {}
    ports = said.get("receiver_init_port")
    ports = ports if isinstance(ports, list) else [ports]
    if not 0 < len(ports) <= _RANKS or not all(type(p) is int and 0 < p < 1 << 16 for p in ports):
        raise ValueError(f"receiver_init_port wants ports, got {_short(ports)}")
    host, name = _name(said, "receiver_host"), _name(said, "req_id")
    if not host.isascii() or not host.isprintable():
        raise ValueError(f"receiver_host wants a host, got {_short(host)}")
    if len(name.encode()) >= _LONG:
        raise ValueError(f"req_id wants a shorter name, got {_short(name)}")
    return ToldDecoder(host, ports[0], name, len(ports))


def _flag(params: Mapping[str, Any], name: str) -> bool:
    value = params.get(name) or False
    if type(value) is not bool:
        raise ValueError(f"{name} wants true or false, got {_short(value)}")
    return value


def _name(params: Mapping[str, Any], name: str, *, needed: bool = True) -> str:
    value = params.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str) or not value or len(value) > _LONG:
        raise ValueError(f"{name} wants a name, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."
