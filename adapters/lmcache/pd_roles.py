"""LMCache's prefill/decode hand-off: what its sender and its receiver are here.

LMCache's sender writes into the receiver, which has reserved room and listens, and tells the proxy.
Here the sender tells the receiver, at the same port, that there is something; the receiver asks the
sender for it, and the proxy is told. Whom either may dial no LMCache file says: that comes from
variables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from tierloom.adapters.lmcache.local_tiers import LOCAL, memory_tier
from tierloom.adapters.lmcache.options import Given
from tierloom.adapters.lmcache.remote_tiers import GIB, Made, size_of
from tierloom.stages.options import parse_size

_SHARE = 2
"""Hand-offs have one part in so many of memory."""
_BUFFER = 1.0
"""GiB of a buffer of which nothing is said."""


@dataclass(slots=True)
class PdRole:
    """What becomes of the options that begin with `pd_`."""

    role: str = "kv_both"
    """vLLM's."""
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def pd_role(given: Given, head: dict[str, Any], tiers: dict[str, Made]) -> PdRole:
    """The role that a file names, with `head` and `tiers` made such that they can play it."""
    made, name = PdRole(), str(given.get("pd_role", "")).lower()
    if name not in ("sender", "receiver"):
        close = get_close_matches(name, ("sender", "receiver"), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        made.missing.append(
            f"enable_pd with pd_role {name or 'unset'}: it is sender or receiver{hint}"
        )
        return made
    head["order"] = "canonical"
    _make_room(given, head, tiers)
    if given.says("transfer_channel") and not given.get("enable_p2p"):
        channel = given.get("transfer_channel")
        made.notes.append(f"transfer_channel {channel}: handed over in the connection that asks")
    both = given.get("pd_bidirectional")
    if name == "sender":
        made.role = "kv_both" if both else "kv_producer"
        _prefiller(given, head, tiers, made.notes)
    else:
        made.role = "kv_both" if both or given.get("save_decode_cache") else "kv_consumer"
        _decoder(given, head, made.notes)
    return made


def _make_room(given: Given, head: dict[str, Any], tiers: dict[str, Made]) -> None:
    """Memory, of which hand-offs may have as much as LMCache's buffer has."""
    room = _SHARE * given.get("pd_buffer_size", 0) / GIB
    rest = dict(tiers)
    tiers.clear()
    tiers["hot"] = hot = rest.pop("hot", None) or memory_tier(given, room or _SHARE * _BUFFER)
    tiers |= rest
    if "budget" in head:  # memory was to be no tier
        del head["budget"]
        hot.notes.append("what is handed over lies in memory: hand-offs have at most half of it")
    elif room * GIB > parse_size(hot.options["capacity"]):
        hot.options["capacity"] = size_of(room)
        hot.notes.append("twice pd_buffer_size: hand-offs have at most half of it")


def _prefiller(
    given: Given, head: dict[str, Any], tiers: dict[str, Made], notes: list[str]
) -> None:
    near = given.get("pd_proxy_host", "localhost") in LOCAL
    at = "127.0.0.1:0" if near else "0.0.0.0:0"
    served = [id for id in ("hot", "warm") if id in tiers]
    head.setdefault("serve", {"listen": f"${{TIERLOOM_LISTEN:-{at}}}", "tiers": served})
    if given.says("pd_proxy_port"):
        proxy = f"{given.get('pd_proxy_host', 'localhost')}:{given.get('pd_proxy_port', [0])[0]}"
        peers = [f"${{TIERLOOM_DECODERS:-{'127.0.0.1, localhost' if near else ''}}}"]
        head["handoff"] = {"peers": peers, "proxy": proxy}
        notes.append("LMCache's proxy can be kept as it is (docs/handoff.md)")
        if not near:
            notes.append(
                "set TIERLOOM_DECODERS to the decoders' hosts, as the proxy names them: no other "
                "is dialed, unless it proves to have the token"
            )
    if not near:
        notes.append("set TIERLOOM_TOKEN to one secret on all hosts: others are let in by it")


def _decoder(given: Given, head: dict[str, Any], notes: list[str]) -> None:
    near = given.get("pd_peer_host", "localhost") in LOCAL
    hosts = "127.0.0.1" if near else ""
    head["handoff"] = {"peers": [f"${{TIERLOOM_PREFILLERS:-{hosts}}}"]}
    if given.says("pd_peer_init_port"):
        host = "127.0.0.1" if near else given.get("pd_peer_host", "localhost")
        listen = f"{host}:{given.get('pd_peer_init_port', [0])[0]}"
        head.setdefault("serve", {"listen": listen, "tiers": ["hot"]})
        head["handoff"]["offers"] = True
    if given.says("pd_peer_alloc_port"):
        notes.append("room is taken by who asks: pd_peer_alloc_port is not used")
    if not near:
        notes.append(
            "set TIERLOOM_PREFILLERS to the prefillers' hosts, or TIERLOOM_TOKEN to one secret on "
            "all hosts: who is not named must prove to have it"
        )
