"""Orders to a pipeline: clear, pin, freeze, and what it keeps of whom."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from hashlib import sha256
from typing import Any

from tierloom.pipeline.admin.admin_bodies import ChunksBody, ClearBody, keys_in
from tierloom.pipeline.admin.store_admin import StoreAdmin
from tierloom.pipeline.admin.whose import Fits
from tierloom.pipeline.pipeline import Pipeline
from tierloom.pipeline.run.tenants import TenantLedger
from tierloom.stages.errors import InputError
from tierloom.stages.kv.chain_seed import chain_seed
from tierloom.stages.kv.prefix import Chain, chunk_keys
from tierloom.stages.kv.tokens import tokens_array
from tierloom.stages.tiers.contract.index import Entry


def administer(pipe: Pipeline, order: str, **said: Any) -> dict[str, Any]:
    """Give a pipeline an order, and wait for what came of it, in exact counts: the same as its
    door's `POST /v1/ORDER` and `tierloom store ORDER`.

        administer(pipe, "clear", older_than="12 h")              # counts them
        administer(pipe, "clear", older_than="12 h", dry_run=False)
        administer(pipe, "pin", tokens=ids, owner="me", ttl="10 min")

    Orders and what can be said with each: `pipeline/admin/admin_bodies.py`. Raises InputError,
    Closed.
    """
    return begin_order(pipe, order, said).result(60)


def begin_order(
    pipe: Pipeline, order: str, said: Mapping[str, Any], id: str = ""
) -> Future[dict[str, Any]]:
    """`administer` for who does not wait; any thread. `id`: by which the order `progress` knows it.
    Raises InputError, Closed."""
    pipe._check_open()
    return _admin_of(pipe).begin(order, said, id)


def ordered_of(
    pipes: Mapping[str, Pipeline], order: str, said: Mapping[str, Any], id: str
) -> dict[str, Any]:
    """The same order to several, and what came of it by name."""
    begun = {name: begin_order(pipe, order, said, id) for name, pipe in pipes.items()}
    return {name: each.result(600) for name, each in begun.items()}


def _admin_of(pipe: Pipeline) -> StoreAdmin:
    worker = pipe._worker
    with worker.making_admin:
        if worker.admin is None:
            worker.admin = StoreAdmin(
                pipe.tiers, PipelineNames(pipe), worker.portal.start_task,
                halt=worker.halt_stores, under_way=worker.under_way,
                object_bytes=worker.object_bytes,
            )  # fmt: skip
        return worker.admin


class PipelineNames:
    """Of one pipeline, all of whose objects are of one model."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def keys(self, body: ChunksBody) -> tuple[list[bytes], int]:
        if not body.tokens:
            return keys_in(body.chunks), 0
        root = self._root(body.salt, body.tags, may_be_empty=True)
        chain = Chain(root, self._pipe.spec.chunk.grain)
        chain.extend(tokens_array(body.tokens))
        found = self._pipe.find(chain.span(0, len(chain.links))) if chain.links else []
        return [key for key, _ in found], sum(tokens for _, tokens in found)

    def all_keys(self, body: ChunksBody) -> list[bytes]:
        if not body.tokens:
            return keys_in(body.chunks)
        root = self._root(body.salt, body.tags, may_be_empty=True)
        chunk = self._pipe.spec.chunk
        return chunk_keys(root, tokens_array(body.tokens), chunk.grain, chunk.tokens)

    def fits(self, body: ClearBody) -> Fits:
        names, keys = self._pipe.names, set(keys_in(body.chunks))
        mine = body.model in ("", names.model) and names.digest.hex().startswith(body.namespace)
        by_tenant = body.salt is not None or body.tags is not None
        root = self._root(body.salt or "", body.tags or {}) if by_tenant else b""

        def fits(entry: Entry[Any]) -> bool:
            whose = not by_tenant or self._tenants.root(entry.key) == root
            return mine and whose and (not keys or entry.key in keys)

        return fits

    def space(self, entry: Entry[Any]) -> bytes:
        return self._pipe.names.digest

    def tenant(self, entry: Entry[Any]) -> str:
        root = self._tenants.root(entry.key)
        return sha256(b"tenant" + root).hexdigest()[:12] if root else ""

    def models(self) -> Mapping[str, str]:
        return {self._pipe.names.digest.hex(): self._pipe.names.model}

    @property
    def _tenants(self) -> TenantLedger:
        measures = self._pipe._worker.measures
        return measures.tenants if measures is not None else TenantLedger()

    def _root(self, salt: str, tags: Mapping[str, str], *, may_be_empty: bool = False) -> bytes:
        names = self._pipe.chains.of(salt=salt, adapter="", tags=tuple(sorted(tags.items())))
        root = chain_seed(names, self._pipe.spec.chunk.keys)
        if not root and not may_be_empty:
            raise InputError("with chunk.keys: sglang nobody knows what has no salt: say a salt")
        return root
