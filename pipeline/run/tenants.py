"""Which chunks belong to which tenant, as far as requests have told it."""

from __future__ import annotations

from tierloom.stages.contract.request import Request

_MOST = 1 << 20
"""Chunks of which it is remembered; then the oldest are forgotten."""


class TenantLedger:
    """Which chunks belong to whom, learned from requests: a name does not tell it. On the loop."""

    def __init__(self) -> None:
        self._roots: dict[bytes, bytes] = {}
        """Key to the link before its prompt's first token."""

    def note(self, request: Request) -> None:
        """A request was answered."""
        if root := request.root:
            for chunk in request.chunks:
                key = chunk.source.key if chunk.source is not None else chunk.key
                self._roots.pop(key, None)
                self._roots[key] = root
            while len(self._roots) > _MOST:
                del self._roots[next(iter(self._roots))]

    def root(self, key: bytes) -> bytes:
        """Empty: nobody has asked for it since this began."""
        return self._roots.get(key, b"")
