"""What LMCache keeps on an engine's own host as tiers, and how engines share it by P2P.

LMCache's engines find each other through its controller. Here a Redis or Valkey knows who has what;
it is looked for at the controller's host, unless TIERLOOM_DIRECTORY names another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tierloom.adapters.lmcache.options import Given
from tierloom.adapters.lmcache.remote_tiers import Made, size_of

DIRECTORY = "TIERLOOM_DIRECTORY"
"""Environment variable with the URL of the directory."""
LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")
"""Names of this host."""


def memory_tier(given: Given, size: float) -> Made:
    """`size`: LMCache's gigabytes."""
    made = Made({"use": "memory", "capacity": size_of(size)})
    _evict(made, given)
    return made


def disk_tier(paths: list[str], room: float, given: Given) -> Made:
    """The first of `paths`. `room`: LMCache's gigabytes."""
    first, *others = paths
    made = Made({"use": "disk", "path": first, "capacity": size_of(room)})
    _evict(made, given)
    if given.take("use_odirect") is True:
        made.options["direct"] = True
    made.notes += [f"objects are not spread over {path}, too" for path in others]
    return made


def _evict(made: Made, given: Given) -> None:
    if given.says("cache_policy"):
        made.options["evict"] = given.get("cache_policy")


def peer_tier(given: Given, served: Sequence[str]) -> tuple[Made, dict[str, Any]]:
    """The tier that reads what other engines keep, and `serve` of this one, which lets them read
    the tiers `served`."""
    host, ports = given.get("p2p_host", "localhost"), given.get("p2p_init_ports", [])
    controller = str(given.raw.get("controller_reply_url") or given.raw.get("controller_pull_url"))
    at = controller.rpartition("://")[2].rpartition(":")[0] or host
    directory = f"${{{DIRECTORY}:-redis://{at}:6379/0}}"
    made = Made({"use": "peer", "directory": [directory]})
    made.notes.append(
        f"in place of LMCache's controller run a Redis or Valkey at {at}:6379, or name one in "
        f"{DIRECTORY}; it knows who has what, and keeps no KV"
    )
    if channel := given.get("transfer_channel"):
        made.add("wire", "auto" if channel == "nixl" else "inline", f"transfer_channel: {channel}")
    port = ports[0] if len(ports) == 1 else 0
    serve = {"listen": f"{host}:{port}", "tiers": [*served], "directory": directory}
    if name := given.get("lmcache_instance_id"):
        serve["instance"] = name
    if len(ports) > 1:
        made.notes.append("each rank serves at a port that is free: the directory tells it")
    if given.says("p2p_lookup_ports"):
        made.notes.append("questions and bytes share one port, so p2p_lookup_ports are not used")
    if host not in LOCAL:
        made.notes.append("set TIERLOOM_TOKEN to one secret on all hosts: others are let in by it")
    return made, serve
