"""The text of a chunk: what its KV was computed from, and where in its prompt it stood.

Kept with a chunk only where a graph asks for it (`lookup: {by: content}`), since it publishes the
prompt to whoever can read the object.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FIXED = struct.Struct("<q32s32s")

OPENING = 64
"""Tokens of a prompt's beginning by which `Text.opening` knows it again."""


class Text(NamedTuple):
    """Token ids of a chunk, and the prompt that they were captured in."""

    ids: npt.NDArray[np.int32]
    """[tokens], contiguous."""
    position: int
    """Of the first one in its prompt: how far its K is turned."""
    root: bytes
    """The link before the prompt's first token: model, adapter and tenant. 32 bytes."""
    parent: bytes
    """The key of the chunk before it in the prompt; `root` for the first. 32 bytes."""
    opening: bytes
    """The link after the prompt's first 64 tokens, by which prompts that begin alike are known;
    `root` where there is none. 32 bytes."""


def pack_text(text: Text) -> bytes:
    """A text as a header has it: position, root, opening, then the ids as little-endian int32. Its
    parent is a field of the header's own."""
    ids = text.ids.astype("<i4", copy=False).tobytes()
    return _FIXED.pack(text.position, text.root, text.opening) + ids


def text_bytes(tokens: int) -> int:
    """Length of a packed text."""
    return _FIXED.size + 4 * tokens


def unpack_text(packed: bytes, parent: bytes) -> Text:
    """The inverse of `pack_text`; `ids` is a view of `packed`."""
    import numpy as np  # a header is read where numpy is not needed

    position, root, opening = _FIXED.unpack_from(packed)
    return Text(np.frombuffer(packed, "<i4", offset=_FIXED.size), position, root, parent, opening)


class Excerpt(NamedTuple):
    """Tokens of a prompt that lie in one kept chunk, wherever that stood."""

    start: int
    """Of the first one in the prompt at hand."""
    tokens: int
    key: bytes
    """The chunk's."""
    first: int
    """Of the first one in the chunk."""
    position: int
    """Of the first one in the prompt that it was captured in."""

    @property
    def shift(self) -> int:
        """Positions by which its K must be turned."""
        return self.start - self.position

    @property
    def end(self) -> int:
        return self.start + self.tokens


class Run(NamedTuple):
    """Excerpts that follow one another here as they did where they were captured."""

    excerpts: tuple[Excerpt, ...]
    seam: bool
    """It stands behind other text than it was captured behind."""

    @property
    def start(self) -> int:
        return self.excerpts[0].start

    @property
    def end(self) -> int:
        return self.excerpts[-1].end
