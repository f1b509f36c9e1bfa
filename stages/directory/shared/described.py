"""What a worker's record says of its namespace: enough for others to name chunks as it does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from tierloom.stages.directory.shared.records import WorkerRecord
from tierloom.stages.errors import ConfigError
from tierloom.stages.kv.chain_seed import Keys, chain_seed
from tierloom.stages.kv.namespace import Namespace

DOOR = "door"
"""Where a worker, or its engine, is asked over HTTP."""
_PAIRS = ("layers", "heads")
_TEXTS = ("model", "weights", "geometry", "part", "rope")


def described(names: Namespace, token_bytes: int) -> dict[str, str]:
    """`names`: what the worker's chains begin with, tenants aside. `token_bytes`: KV of one token
    that the worker keeps."""
    said = {name: str(getattr(names, name)) for name in _TEXTS}
    said |= {name: "{} {}".format(*getattr(names, name)) for name in _PAIRS}
    dtype = re.search(r"dtype='(\w+)'", names.geometry)
    said |= {"layout": names.layout.hex(), "dtype": dtype[1] if dtype else ""}
    return {name: text for name, text in said.items() if text} | {"token_bytes": str(token_bytes)}


def seed_of(
    record: WorkerRecord, *, salt: str = "", adapter: str = "", tags: Mapping[str, str]
) -> bytes | None:
    """The link before a prompt's first token, in this worker's chains; None: it does not say."""
    said = record.fields
    if "token_bytes" not in said:
        return None
    try:
        pairs = {name: tuple(map(int, said[name].split())) for name in _PAIRS}
        names = Namespace(
            **{name: said.get(name, "") for name in _TEXTS}, **pairs,  # type: ignore[arg-type]
            layout=bytes.fromhex(said.get("layout", "")), chunk=(record.chunk, record.grain),
            salt=salt, adapter=adapter, tags=tuple(sorted(tags.items())),
        )  # fmt: skip
    except (KeyError, ValueError, ConfigError):
        return None
    return chain_seed(names, cast("Keys", record.keys))


def token_bytes_of(record: WorkerRecord) -> int:
    """0: it does not say."""
    said = record.fields.get("token_bytes", "")
    return int(said) if said.isdecimal() and len(said) < 16 else 0
