"""Key files: what `aesgcm` encrypts and `decode` decrypts with.

A key file holds at least 32 random bytes (`head -c 32 /dev/urandom > FILE; chmod 600 FILE`), all
of which are the secret. From it come, by HKDF-SHA256 (RFC 5869), an id that may be seen and a key
of its own for every object. The object's name is the salt, and the tenant's salt is in every name,
so no two tenants share a key, and no key is used so often that its random nonces could meet.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from tierloom.stages.errors import ConfigError, Lost, MissingPackage, Unreadable
from tierloom.stages.user_home import expanded

KEY_ID = 8
"""Bytes of a key's id."""
_LEAST, _MOST = 32, 4096


class Keyring:
    """The first key encrypts, all decrypt. Shows nothing of them but how many there are."""

    __slots__ = ("_keys", "newest")

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """`secrets`: newest first, at least one."""
        self._keys = {hkdf(s, b"", b"tierloom aesgcm id", KEY_ID): s for s in secrets}
        self.newest = next(iter(self._keys))
        """Id of the one that encrypts."""

    @classmethod
    def read(cls, paths: Sequence[str]) -> Keyring:
        """From key files, newest first. Raises ConfigError: missing, too short, readable by
        others; or where the `cryptography` package is missing."""
        try:
            import cryptography.hazmat.primitives.ciphers  # noqa: F401
        except ImportError as e:
            raise MissingPackage("cryptography, which encryption needs,", "crypto") from e
        return cls([_secret(expanded(path)) for path in paths])

    def key(self, id: bytes, name: bytes) -> bytes:
        """The 32 bytes for one object. Raises Unreadable: no file here has this id."""
        if id not in self._keys:
            raise Unreadable(
                Lost.NO_KEY, f"encrypted with key {id.hex()}, for which there is no key file here"
            )
        return hkdf(self._keys[id], name, b"tierloom aesgcm key", 32)

    def __repr__(self) -> str:
        return f"Keyring({len(self._keys)} keys)"


def hkdf(secret: bytes, salt: bytes, info: bytes, nbytes: int) -> bytes:
    """HKDF-SHA256 (RFC 5869) for up to 32 bytes, which one block gives."""
    assert nbytes <= sha256().digest_size
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")[:nbytes]


def _secret(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            secret = file.read(_MOST + 1)
    except OSError as e:
        raise ConfigError(f"key file {path}: {e.strerror}") from e
    if mode & 0o077:
        raise ConfigError(
            f"key file {path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}"
        )
    if not _LEAST <= len(secret) <= _MOST:
        raise ConfigError(
            f"key file {path} must hold {_LEAST} to {_MOST} bytes: head -c 32 /dev/urandom > {path}"
        )
    return secret
