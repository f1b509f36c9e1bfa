"""aesgcm: encryption, as the last codec of a chain.

    lock: {use: aesgcm, keys: [/etc/tierloom/new.key, /etc/tierloom/old.key]}

And `grow: {use: decode, keys: [...]}` where it is read. AES-256-GCM (NIST SP 800-38D), a random
nonce per frame, a key per object (see `keyring.py`). A frame opens only in its own place: its
object's whole header (but where frames lie), its number and its codecs are authenticated with it.
What does not open is a miss and stays: a frame's checksum, outside of all this, says whether bytes
were damaged; where it holds, a tag that does not match says "not my key", and nothing else.

What is read can be told by its sizes and times, and by whoever knows a prompt's tokens and salt.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from tierloom.stages.codecs.contract.decoding import AESGCM
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.codecs.contract.keyring import KEY_ID, Keyring
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.contract.stage import Context
from tierloom.stages.errors import BadObject, Lost, Unreadable
from tierloom.stages.kv.namespace import tlv

_VERSION = b"\x01"
_NONCE, _TAG = 12, 16
_HEAD = 1 + KEY_ID + _NONCE
_MORE = 64
"""Bytes that a codec may have added to a frame that it could not shrink."""
_SLICE = 1 << 17
"""Bytes between two chances for another thread to take the GIL, which OpenSSL's caller keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AesGcmOptions:
    """Whose keys."""

    keys: list[str]
    """Key files, newest first: the first encrypts. What they hold is shown nowhere."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys is empty: name at least one key file")


class AesGcm(Encode):
    """A version, the key's id, the nonce, the ciphertext, the tag."""

    Options = AesGcmOptions
    secret = True

    def __init__(self, options: AesGcmOptions, ctx: Context) -> None:
        """Raises ConfigError where a key file cannot be used."""
        super().__init__(options, ctx)
        self._ring = Keyring.read(options.keys)

    def squeeze(self, data: Bytes, shape: FrameShape, before: bytes) -> None:
        raise NotImplementedError("frames are encrypted in their place")

    def frame(self, source: EncodedFrame, shape: FrameShape, site: Site) -> EncodedFrame:
        """Every frame is encrypted, though it grows: none passes as it is."""
        if AESGCM in site.codecs:
            return source
        id, nonce = self._ring.newest, os.urandom(_NONCE)
        lock = _cipher(self._ring.key(id, site.header.key), nonce).encryptor()
        lock.authenticate_additional_data(_place(site))
        sealed = bytearray(_VERSION + id + nonce)
        sealed += _through(lock, source.data)
        lock.finalize()
        sealed += lock.tag
        return EncodedFrame(bytes(sealed), source.raw, source.codecs + bytes((AESGCM,)))


def opened(data: Bytes, shape: FrameShape, site: Site | None) -> bytes:
    """Inverse of `AesGcm.frame`. Raises BadObject; Unreadable where the key is missing or wrong."""
    if site is None or site.keys is None:
        raise Unreadable(Lost.NO_KEY, "encrypted, and `decode` has no keys: say keys: [FILE]")
    view = memoryview(data)
    ours = view.nbytes - _HEAD - _TAG
    if not 0 < ours <= shape.nbytes + _MORE or view[:1] != _VERSION:
        raise BadObject(f"{view.nbytes} bytes cannot be an encrypted frame")
    from cryptography.exceptions import InvalidTag

    id, nonce = bytes(view[1 : 1 + KEY_ID]), bytes(view[1 + KEY_ID : _HEAD])
    lock = _cipher(site.keys.key(id, site.header.key), nonce).decryptor()
    lock.authenticate_additional_data(_place(site))
    plain = _through(lock, view[_HEAD:-_TAG])
    try:
        lock.finalize_with_tag(bytes(view[-_TAG:]))
    except InvalidTag:
        text = f"key {id.hex()} of this process does not open it"
        raise Unreadable(Lost.WRONG_KEY, text) from None
    return bytes(plain)


def _cipher(key: bytes, nonce: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.GCM(nonce))


def _through(lock: Any, data: Bytes) -> bytearray:
    out = bytearray()
    view = memoryview(data)
    for at in range(0, view.nbytes, _SLICE):
        out += lock.update(view[at : at + _SLICE])
        time.sleep(0)
    return out


def _place(site: Site) -> bytes:
    """All that must not be exchanged around a frame, canonically encoded."""
    h = site.header
    numbers = (h.tokens, h.grain, h.group, site.number)
    return tlv(
        ("tierloom", b"aesgcm/1"), ("key", h.key), ("namespace", h.namespace),
        ("parent", h.parent), ("tokens", h.token_digest), ("links", h.links),
        ("geometry", str(h.geometry).encode()), ("numbers", str(numbers).encode()),
        ("codecs", site.codecs + bytes((AESGCM,))),
    )  # fmt: skip
