"""tierloom import-lmcache: an LMCache configuration as a tierloom one.

What is not set keeps tierloom's default, except that LMCache keeps 5 GB in memory by default.
Secrets are not copied. Options without a counterpart are listed in comments at the end.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml

from tierloom.adapters.lmcache.local_tiers import disk_tier, memory_tier, peer_tier
from tierloom.adapters.lmcache.options import UNKNOWN, Given, from_environment, from_file
from tierloom.adapters.lmcache.pd_roles import pd_role
from tierloom.adapters.lmcache.remote_tiers import (
    Made,
    folder_tier,
    forget_credentials,
    nixl,
    plugins,
    remote,
    size_of,
)
from tierloom.pipeline.config.problems import nearest
from tierloom.stages.options import masked

_MEMORY = 5.0
"""GB that LMCache keeps in memory by default."""
_PLACES = {
    "LocalCPUBackend": "hot", "LocalDiskBackend": "warm", "GdsBackend": "gds",
    "NixlStorageBackend": "nixl", "P2PBackend": "near",
}  # fmt: skip
"""LMCache's names of its tiers in `store_location` and `retrieve_locations`; `RemoteBackend` is
every remote one."""


@dataclass(slots=True)
class Conversion:
    """The configuration being made."""

    head: dict[str, dict[str, Any]] = field(default_factory=dict)
    tiers: dict[str, Made] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """For a comment at the top."""
    missing: list[str] = field(default_factory=list)
    """For a comment at the top and stderr: what was asked for and is not done."""
    codec: str = ""
    """Codec of what goes to remote tiers; empty: none."""
    remotes: set[str] = field(default_factory=set)
    """The remote tiers."""
    stores: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    deadline: str = ""
    mend: dict[str, Any] = field(default_factory=dict)
    """Options of the `blend` stage; empty: prompts are not blended."""
    least: int = 0
    """Tokens below which nothing is blended; 0: the default."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Options of the vLLM connector, which are set elsewhere."""
    role: str = "kv_both"
    """vLLM's."""


def run_import(source: Path | None, out: Path | None) -> int:
    """Write the converted configuration to a file or stdout. The exit code: 1 where something that
    was asked for is not done, which stderr then says. Raises ConfigError, OSError."""
    given = from_file(source) if source else from_environment(os.environ)
    draft = convert(given)
    text = yaml_text(draft, given, str(out) if out else "lmcache.yaml")
    if out:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {out}; next: tierloom check {_shell(out)}", err=True)
    else:
        typer.echo(text, nl=False)
    lost = [f"{name}: {why}" for name, why in given.bad.items()]
    lost += [f"{name}: {why}" for name, _, why in given.left() if why.startswith(UNKNOWN)]
    for line in [*draft.missing, *lost]:
        typer.echo(f"tierloom: {given.source}: {masked(line)}", err=True)
    return 1 if draft.missing or lost else 0


def convert(given: Given) -> Conversion:
    """Convert everything that has a counterpart."""
    given.forgo_unused()
    draft = Conversion(missing=given.switched_on())
    tokens = given.get("chunk_size", 256)
    draft.head["chunk"] = {"tokens": tokens}
    if tokens % 32:
        draft.head["chunk"]["grain"] = math.gcd(tokens, 32)
    pd = given.get("enable_pd", False)
    if given.says("save_unfull_chunk"):  # LMCache, too, hands over all of a prompt
        draft.head["chunk"]["partial"] = given.get("save_unfull_chunk") or pd
    _local(given, draft)
    _remote(given, draft)
    draft.notes += forget_credentials(given)
    if pd:
        made = pd_role(given, draft.head, draft.tiers)
        draft.role, draft.notes = made.role, draft.notes + made.notes
        draft.missing += made.missing
    if not draft.tiers:
        draft.tiers["hot"] = memory_tier(given, given.get("max_local_cpu_size") or _MEMORY)
        draft.notes.append("no tier of this file has a counterpart, so KV is kept in memory")
    if given.get("enable_p2p"):
        _peers(given, draft)
    _serde(given, draft)
    _locations(given, draft)
    _limits(given, draft)
    _engine(given, draft)
    if given.get("enable_blending"):
        _blend(given, draft)
    return draft


def _local(given: Given, draft: Conversion) -> None:
    size = given.get("max_local_cpu_size", _MEMORY)
    if given.get("local_cpu", True) and size > 0:
        draft.tiers["hot"] = memory_tier(given, size)
    elif size > 0 and given.says("max_local_cpu_size"):
        draft.head["budget"] = {"arena": size_of(size)}
    if given.extra.get("enable_nixl_storage"):
        draft.tiers["nixl"] = nixl(given)
    room = given.get("max_local_disk_size", 0.0)
    if paths := given.get("local_disk"):
        if room > 0:
            draft.tiers["warm"] = disk_tier(paths, room, given)
        else:
            draft.notes.append("local_disk has no max_local_disk_size, so nothing is kept there")
    if paths := given.get("gds_path"):
        draft.tiers["gds"] = folder_tier(",".join(paths))
        draft.tiers["gds"].notes.append("files are read through host memory, without GPUDirect")


def _remote(given: Given, draft: Conversion) -> None:
    asked = plugins(given.get("remote_storage_plugins", []), given)
    if given.says("remote_url"):
        asked.append(("", remote(given.get("remote_url"), given)))
    for name, made in asked:
        if isinstance(made, str):
            draft.missing.append(made)
            continue
        id = "cold" if not name else re.sub(r"[^A-Za-z0-9_-]", "_", f"cold_{name}")
        draft.tiers[id] = made
        draft.remotes.add(id)


def _peers(given: Given, draft: Conversion) -> None:
    """Other engines are asked after what is here, and before remote stores."""
    served = [id for id in ("hot", "warm") if id in draft.tiers]
    if not served:
        served, draft.tiers["hot"] = ["hot"], memory_tier(given, _MEMORY)
        draft.notes.append("engines share what is in memory, so KV is kept there, too")
    remotes = {id: draft.tiers.pop(id) for id in list(draft.tiers) if id not in served}
    draft.tiers["near"], draft.head["serve"] = peer_tier(given, served)
    draft.tiers |= remotes


def _serde(given: Given, draft: Conversion) -> None:
    serde = str(given.get("remote_serde", "naive")).lower()
    if serde == "cachegen" and draft.remotes:
        draft.codec = "cachegen"
    elif serde == "kivi":
        draft.notes.append("remote_serde kivi is a stub in LMCache: KV is kept as it is, as there")
    elif serde not in ("naive", "none", "cachegen"):
        known = nearest(serde, ("naive", "cachegen", "kivi"))
        draft.missing.append(f"remote_serde {serde}: no such codec; {known}")


def _locations(given: Given, draft: Conversion) -> None:
    def among(names: list[str]) -> list[str]:
        """The tiers of these names, in order; all of them if there is none."""
        found, known = set[str](), {*_PLACES, "RemoteBackend"}
        for name in names:
            here = draft.remotes if name == "RemoteBackend" else {_PLACES.get(name, "")}
            if not here & draft.tiers.keys():
                hint = "" if name in known else f"; {nearest(name, known)}"
                draft.missing.append(f"{name} has no counterpart among these tiers: left out{hint}")
            found |= here
        return [t for t in draft.tiers if t in found] or list(draft.tiers)

    asked = among([given.get("store_location")] if given.says("store_location") else [])
    draft.stores = [t for t in asked if t != "near"] or [t for t in draft.tiers if t != "near"]
    draft.reads = among(given.get("retrieve_locations", []))


def _limits(given: Given, draft: Conversion) -> None:
    if given.says("blocking_timeout_secs"):
        limit = f"{given.get('blocking_timeout_secs'):g} s"
        draft.deadline = limit
        for made in draft.tiers.values():
            if made.options["use"] not in ("memory", "blackhole"):
                made.options.setdefault("timeout", limit)


def _engine(given: Given, draft: Conversion) -> None:
    """Options of the vLLM connector."""
    if given.get("save_decode_cache"):
        draft.vllm["tierloom.save_decode"] = True
    if given.get("min_retrieve_tokens"):
        draft.vllm["tierloom.min_tokens"] = given.get("min_retrieve_tokens")
    if given.get("use_layerwise"):
        draft.vllm |= {"tierloom.load": "layer", "tierloom.save": "layer"}
    elif given.get("enable_async_loading"):
        draft.vllm["tierloom.load"] = "async"
    if given.says("lookup_timeout_ms"):
        draft.vllm["tierloom.wait"] = f"{given.get('lookup_timeout_ms')} ms"


def _blend(given: Given, draft: Conversion) -> None:
    """LMCache blends every request; its share is what it computes besides its check layers."""
    draft.mend, draft.least = {"use": "blend"}, given.get("blend_min_tokens", 0)
    if given.says("blend_recompute_ratios"):
        share = f"{100 * given.get('blend_recompute_ratios'):g} %"
        draft.mend |= {"share": share, "ceiling": share}
    draft.vllm["tierloom.blend"] = "on"
    if draft.vllm.pop("tierloom.load", None) == "layer":
        draft.notes.append("what is blended is loaded asynchronously, not layer by layer")
    if not any(m.options["use"] in ("memory", "disk") for m in draft.tiers.values()):
        draft.missing.append("blending finds text in local tiers, and there is none")


def yaml_text(draft: Conversion, given: Given, name: str) -> str:
    """The YAML text."""
    told = {"kv_connector": "TierloomConnector", "kv_role": draft.role}
    extra = {"tierloom.config": name if "/" in name else f"./{name}"} | draft.vllm
    transfer = json.dumps(told | {"kv_connector_extra_config": extra})
    lines = [
        _comment(f"Made from {given.source} by `tierloom import-lmcache`."),
        "# What is not set there keeps tierloom's default. With vLLM:",
        f"#   --kv-transfer-config '{transfer}'",
    ]
    lines += [_comment(f"Not done: {line}") for line in draft.missing]
    lines += [_comment(f"Note: {line}") for line in draft.notes]
    lines += ["", "version: 1", ""]
    lines += [f"{key}: {_flow(value)}" for key, value in draft.head.items()]
    lines += ["", "tiers:"]
    for id, made in draft.tiers.items():
        lines += [f"  {_comment(note)}" for note in made.notes]
        lines.append(f"  {id}: {_flow(made.options)}")
    lines += ["", "graphs:", *_store(draft), *_retrieve(draft)]
    if left := given.left():
        lines += ["", "# Options without a counterpart:"]
        lines += [_comment(f"- {n}: {_flow(v)}  ({why})") for n, v, why in left]
    return "\n".join(lines) + "\n"


def _store(draft: Conversion) -> list[str]:
    every = [t for t in draft.tiers if t != "near"]
    asked = "" if draft.stores == every else f", tiers: {_flow(draft.stores)}"
    lines = [
        "  store:", "    stages:", "      keys: {use: hash}",
        f"      fresh: {{use: lookup, want: absent{', by: content' if draft.mend else ''}{asked}}}",
        "      pack: {use: gather}", "      host: {use: to_host}",
    ]  # fmt: skip
    coded = draft.remotes if draft.codec else set()
    if coded & set(draft.stores):
        lines.append(f"      small: {{use: {draft.codec}, from: host, level: default}}")
    for i, tier in enumerate(draft.stores):
        source = "small" if tier in coded else "host"
        full = ", when_full: drop" if i else ""
        lines.append(f"      put_{tier}: {{use: put, tier: {tier}, from: {source}{full}}}")
    return lines


def _retrieve(draft: Conversion) -> list[str]:
    lines = ["  retrieve:", *([f"    deadline: {draft.deadline}"] if draft.deadline else [])]
    others = [t for t in draft.reads if t != "hot"]
    promote = ", promote: hot" if "hot" in draft.tiers and others else ""
    want = "prefix" if not draft.mend else "anywhere"
    want += f", least: {draft.least}" if draft.mend and draft.least else ""
    return [
        *lines, "    stages:", "      keys: {use: hash}",
        f"      plan: {{use: lookup, tiers: {_flow(draft.reads)}, want: {want}}}",
        *([f"      mend: {_flow(draft.mend)}"] if draft.mend else []),
        f"      fetch: {{use: get{promote}}}", "      grow: {use: decode}",
        "      place: {use: scatter}",
    ]  # fmt: skip


def _comment(text: str) -> str:
    """One line, without secrets."""
    return f"# {masked(' '.join(text.split()))}"


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    listed = yaml.safe_dump([value], default_flow_style=True, width=math.inf, sort_keys=False)
    return str(listed.strip()[1:-1])


def _shell(path: Path) -> str:
    """A path as `tierloom check` takes it: a bare word would be a preset."""
    return str(path) if "/" in str(path) or "." in str(path) else f"./{path}"
