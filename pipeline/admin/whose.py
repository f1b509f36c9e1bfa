"""Whose objects are in tiers: what their names tell of model and tenant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tierloom.pipeline.admin.admin_bodies import ChunksBody, ClearBody, keys_in
from tierloom.stages.errors import InputError
from tierloom.stages.kv.object import LINK, name_of
from tierloom.stages.tiers.contract.index import Entry

Fits = Callable[[Entry[Any]], bool]


class Whose(Protocol):
    """Any thread, but for what takes an entry."""

    def keys(self, body: ChunksBody) -> tuple[list[bytes], int]:
        """What tiers call these chunks, and how many tokens of a prompt that is. Raises
        InputError."""

    def all_keys(self, body: ChunksBody) -> list[bytes]:
        """The same of all of a prompt's chunks, whether they are kept or not. Raises InputError."""

    def fits(self, body: ClearBody) -> Fits:
        """Whether an entry is one that is meant, its age aside. Raises InputError."""

    def space(self, entry: Entry[Any]) -> bytes:
        """The digest of its namespace."""

    def tenant(self, entry: Entry[Any]) -> str:
        """A word for the tenant, which is not its salt; empty: not known."""

    def models(self) -> Mapping[str, str]:
        """Names of models, by the hex digits of their namespace."""


class StoredNames:
    """Of a store for many, which knows namespaces by their digest alone."""

    def keys(self, body: ChunksBody) -> tuple[list[bytes], int]:
        if body.tokens or body.salt or body.tags:
            raise InputError(
                "this store knows no model's tokens: pass chunks and namespace, or ask an engine"
            )
        if body.chunks and not body.namespace:
            raise InputError("this store keeps many namespaces: say with chunks which is meant")
        space = bytes.fromhex(body.namespace)
        return [name_of(space, key) for key in keys_in(body.chunks)], 0

    def all_keys(self, body: ChunksBody) -> list[bytes]:
        raise InputError("this store brings into memory what is read: ask an engine to prefetch")

    def fits(self, body: ClearBody) -> Fits:
        if body.salt is not None or body.tags is not None or body.model:
            raise InputError(
                "this store knows no models, salts and tags: say the namespace, as "
                "/v1/instances of the controller and /v1/usage of an engine show it"
            )
        if body.chunks and len(body.namespace) != 2 * LINK:
            raise InputError("clear: chunks of a store go with their whole namespace")
        space = bytes.fromhex(body.namespace) if body.chunks else b""
        names = {name_of(space, key) for key in keys_in(body.chunks)}

        def fits(entry: Entry[Any]) -> bool:
            mine = self.space(entry).hex().startswith(body.namespace)
            return mine and (not names or entry.key in names)

        return fits

    def space(self, entry: Entry[Any]) -> bytes:
        return entry.links[:LINK]

    def tenant(self, entry: Entry[Any]) -> str:
        return ""

    def models(self) -> Mapping[str, str]:
        return {}
