"""The namespace: everything that makes KV reusable or not, and nothing else.

Two requests share KV only when every field here is equal; its digest starts every chain of keys.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, fields, replace

from tierloom.stages.errors import ConfigError


def tlv(*named: tuple[str, bytes]) -> bytes:
    """A canonical encoding of named fields: (tag length, tag, value length, value), in order.

    No two lists of fields share an encoding, whatever bytes the values hold.
    """
    out = bytearray()
    for tag, value in named:
        out += struct.pack("<I", len(tag)) + tag.encode() + struct.pack("<Q", len(value)) + value
    return bytes(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Namespace:
    """What a request's KV depends on besides its tokens. Frozen; equal fields, equal digest.

    Raises ConfigError for a model without a name: any two of them of one shape would be the same.
    """

    model: str
    """Name of the model; may be empty where `weights` is not."""
    weights: str = ""
    """Fingerprint of its weights, where the engine knows one."""
    adapter: str = ""
    """Content id of the LoRA adapter; a name would be shared by different weights."""
    geometry: str = ""
    """Shape and dtype of what is kept."""
    layers: tuple[int, int] = (0, 0)
    """First layer and one past the last, as the whole model counts them."""
    heads: tuple[int, int] = (0, 0)
    """First KV head and one past the last: the bytes are named, not the rank that wrote them."""
    part: str = ""
    """Which of the model's KV this is, where layers and heads do not say it: a KV group's name, or
    how the same weights are computed with."""
    layout: bytes = b""
    """Fingerprint of the engine's layout; only when bytes are kept in its native order."""
    rope: str = ""
    """RoPE parameters, where they can differ for the same weights."""
    chunk: tuple[int, int] = (256, 32)
    """Tokens of a chunk and of a grain."""
    salt: str = ""
    """The tenant's secret: without it nothing of theirs is found."""
    tags: tuple[tuple[str, str], ...] = ()
    """Further names that keep caches apart, sorted."""
    multimodal: tuple[str, ...] = ()
    """Content hashes of images and the like, in prompt order."""

    def __post_init__(self) -> None:
        for field in ("model", "weights"):
            if not isinstance(said := getattr(self, field), str):
                raise ConfigError(f"{field}={said!r} is not a text: whose KV this is must be named")
        if not (self.model.strip() or self.weights.strip()):
            raise ConfigError(
                f"model={self.model!r} names no model, and unnamed models of one shape would share "
                "their KV: pass model=, its name, or weights=, a content id of its weights"
            )

    def encode(self) -> bytes:
        """Canonical bytes, domain-separated from everything else that is hashed here."""
        named = [("tierloom", b"namespace/1")]
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                flat = (
                    [str(v) for v in value]
                    if f.name != "tags"
                    else [str(p) for kv in value for p in kv]
                )
                value = tlv(*((str(i), v.encode()) for i, v in enumerate(flat)))
            named.append((f.name, value if isinstance(value, bytes) else value.encode()))
        return tlv(*named)

    def of(self, *, salt: str, adapter: str, tags: tuple[tuple[str, str], ...]) -> Namespace:
        """The same cache for one tenant."""
        return replace(self, salt=salt, adapter=adapter, tags=tags)

    @property
    def digest(self) -> bytes:
        """sha256 of the encoding: the link before the first token."""
        return hashlib.sha256(self.encode()).digest()
