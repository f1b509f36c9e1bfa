"""KV there and back: stored by a pipeline, read back, and compared with what was stored."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from tierloom.adapters.engine.pipeline_parts import asked_tiers
from tierloom.adapters.made_up.kv_groups import KVGroup
from tierloom.adapters.made_up.made_up_kv import MadeUpKV
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.pipeline import Pipeline
from tierloom.stages.codecs.contract.lossy import Lossy
from tierloom.stages.contract.request import Receipt
from tierloom.stages.errors import ConfigError, TierloomError
from tierloom.stages.kv.chain_seed import chain_seed
from tierloom.stages.kv.prefix import grain_links

PATIENT = 60.0
"""Seconds that a request may take where nobody waits for it: a first one compiles."""
_TRIES = 20
"""How often a tier is asked anew while a better one still gets copies of what it gave."""


class TierTrip(NamedTuple):
    """What one tier did with a prompt."""

    tier: str
    chunks: int
    """That it took."""
    tokens: int
    """That came back from it."""
    seconds: float
    """Of the retrieve."""
    nbytes: int
    """KV that came back."""


class RoundTrip:
    """One group of layers: its caches and a pipeline over them. Close it; not thread-safe."""

    def __init__(
        self, spec: PipelineSpec, group: KVGroup, *, model: str, device: str = "cpu",
        seed: int = 0, part: str = "",
    ) -> None:  # fmt: skip
        """`seed`: of tokens and KV. `part`: tells groups of one shape from one another. Raises
        ConfigError, TierDown."""
        for graph in ("store", "retrieve"):
            if graph not in spec.graphs:
                raise ConfigError(f"{spec.source} has no graph {graph!r}: nothing goes both ways")
        whole = spec.chunk.tokens
        self.tokens = group.tokens if spec.chunk.partial else group.tokens // whole * whole
        """Tokens of a prompt."""
        if not self.tokens:
            raise ConfigError(
                f"{group}: {group.tokens} tokens are less than a chunk of {spec.source}, which has "
                f"{whole}; give it more blocks"
            )
        self.group = group
        self.lossy = any(issubclass(n.cls, Lossy) for g in spec.graphs.values() for n in g.nodes)
        """Codecs change the bytes on purpose: what comes back is compared as numbers."""
        self.kv = MadeUpKV(group, device, seed)
        self.pipe = Pipeline(spec, self.kv.layout, model=model, part=part)
        self._slots = np.arange(self.tokens)
        if self.pipe.off:
            off = self.pipe.off
            self.pipe.close()
            raise ConfigError(f"{group}: nothing is kept: {off}")

    def store(self, number: int, deadline: float | None = None) -> Receipt:
        """Make up the KV of a prompt, and store it."""
        self.kv.fill(number)
        return self.ask("store", number, deadline)

    def retrieve(self, number: int, deadline: float | None = None) -> tuple[Receipt, str]:
        """Bring back what is kept of a prompt into blank caches; and what is wrong with it."""
        self.kv.blank()
        receipt = self.ask("retrieve", number, deadline)
        return receipt, self.wrong(number, receipt.tokens)

    def ask(self, graph: str, number: int, deadline: float | None) -> Receipt:
        """Store what is in the caches, or bring into them what is kept of a prompt."""
        ids, call = self.kv.tokens(number, self.tokens), getattr(self.pipe, graph)
        receipt: Receipt = call(ids, self.kv.caches, self._slots, deadline=deadline).wait()
        return receipt

    def wrong(self, number: int, tokens: int) -> str:
        """What is wrong with the first `tokens` tokens in the caches; empty: nothing."""
        place = self.kv.difference(number, tokens) if tokens else ""
        if place and self.lossy:
            error = self.kv.error(number, tokens)
            return "" if error < 0.5 else f"numbers are off by {error:.2g} of their norm; {place}"
        return place

    def every_tier(self, number: int) -> tuple[list[TierTrip], list[str]]:
        """Store a prompt and read it back from each tier in turn, as others are made to lack it;
        and all that went wrong. It is kept nowhere afterwards."""
        spec = self.pipe.spec
        chunks = -(-self.tokens // spec.chunk.tokens)
        given = self.store(number, PATIENT)
        wrong = [
            f"{tier} took {given.tiers.get(tier, 0)} of {chunks} chunks{_causes(given)}"
            for node in spec.graphs["store"].nodes
            for tier in node.keeps_in()
            if given.tiers.get(tier, 0) < chunks
        ]
        trips: list[TierTrip] = []
        before: list[str] = []
        for tier in asked_tiers(spec):
            if tier in given.tiers:
                receipt, bad = self._from_tier(number, tier, before)
                trips.append(TierTrip(tier, given.tiers[tier], receipt.tokens, receipt.seconds,
                                      receipt.nbytes))  # fmt: skip
                if bad:
                    wrong.append(f"{tier}: {bad}")
                if given.tiers[tier] == chunks and receipt.tiers != {tier: chunks}:
                    wrong.append(
                        f"{tier} gave back {receipt.tokens} of {self.tokens} tokens"
                        f"{_causes(receipt)}"
                    )
            before.append(tier)
        self.forget(number, PATIENT)
        return trips, [f"{self.group}: {text}" for text in wrong]

    def forget(self, number: int, timeout: float = 5.0) -> None:
        """Delete a prompt's objects from all tiers that can be reached, and nothing else."""
        self._delete(number, list(self.pipe.tiers), timeout)

    def close(self) -> None:
        self.pipe.close()

    def _from_tier(self, number: int, tier: str, better: list[str]) -> tuple[Receipt, str]:
        for _ in range(_TRIES):
            self._delete(number, better, PATIENT)
            receipt, bad = self.retrieve(number, PATIENT)
            if bad or not set(receipt.tiers) & set(better):
                break
        return receipt, bad

    def _delete(self, number: int, tiers: list[str], timeout: float) -> None:
        pipe, chunk = self.pipe, self.pipe.spec.chunk
        seed = chain_seed(pipe.names, chunk.keys)
        links = grain_links(seed, self.kv.tokens(number, self.tokens), chunk.grain)
        each = chunk.tokens // chunk.grain
        keys = [links[min(at + each, len(links)) - 1] for at in range(0, len(links), each)]
        for name in tiers:
            if not pipe.tiers[name].read_only:
                with contextlib.suppress(TierloomError, OSError, futures.TimeoutError):
                    pipe._portal.call(pipe.tiers[name].delete, keys, timeout=timeout)


def _causes(receipt: Receipt) -> str:
    lost: Mapping[Any, int] = receipt.lost
    causes = ", ".join(f"{n} {cause.name.lower().replace('_', ' ')}" for cause, n in lost.items())
    return f" ({causes})" if causes else ""
