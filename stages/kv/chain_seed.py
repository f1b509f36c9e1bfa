"""The link before a prompt's first token: which engines come to the same keys for the same text.

`own`: the namespace's digest, so that a key names model and tenant as well. `sglang`: what SGLang
(0.5.23, `storage_namespace_seed`) starts its page hashes with, so that its pages and our grains
have the same names; the namespace that every object carries keeps models apart all the same.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Literal

from tierloom.stages.kv.namespace import Namespace

Keys = Literal["own", "sglang"]

_SGLANG = b"sglang-cache-namespace-v1"


def chain_seed(names: Namespace, keys: Keys) -> bytes:
    """The seed of one tenant's chains. What SGLang has no name for (tags, images, an adapter's
    content) is named by ourselves, and so shared with no SGLang."""
    if keys == "own" or names.adapter or names.tags or names.multimodal:
        return names.digest
    return sglang_seed(None, names.salt or None)


def sglang_seed(extra_key: str | None, cache_salt: str | None) -> bytes:
    """SGLang's seed for a request with this `extra_key` (a LoRA's id is in it) and `cache_salt`;
    empty where it has neither."""
    if extra_key is None and cache_salt is None:
        return b""
    h = hashlib.sha256(_SGLANG)
    for part in (extra_key, cache_salt):
        if part is None:
            h.update(b"\0")
        else:
            data = part.encode()
            h.update(b"\1" + struct.pack("<Q", len(data)) + data)
    return h.digest()
