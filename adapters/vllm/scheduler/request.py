"""One request as the scheduler's side sees it: its keys so far, and what was done about it."""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from tierloom.adapters.vllm.exchange.settings import RequestOptions
from tierloom.stages.directory.chunk_directory import Part
from tierloom.stages.kv.namespace import tlv
from tierloom.stages.kv.prefix import Chain
from tierloom.stages.kv.text import Run

log = logging.getLogger("tierloom.vllm")


class Patch(NamedTuple):
    """What is loaded of a prompt where text captured elsewhere will do."""

    exact: int
    """Tokens of its prefix that tiers have: whole grains."""
    end: int
    """Where the load ends: whole blocks."""
    runs: tuple[Run, ...]


class TrackedRequest:
    """What the scheduler's side knows of a request, from its arrival to its end."""

    def __init__(
        self,
        request: Any,
        options: RequestOptions,
        adapter: Future[str] | None,
        drafts: bool = False,
    ) -> None:
        """`adapter`: content id of its LoRA, once it is known; None without a LoRA. `drafts`: the
        engine decodes speculatively."""
        self._drafts = drafts
        self.request, self.options, self.adapter = request, options, adapter
        self.chain: Chain | None = None
        self.counted = False
        """Its tokens are among those that were looked up."""
        self.asked_at = 0.0
        """When it began to wait for an answer."""
        self.asked = False
        """The workers were asked what tiers without an index hold."""
        self.answer: int | None = None
        self.start = 0
        """Tokens that vLLM's own cache had when it asked last."""
        self.plan: list[Part] = []
        """What was offered then, chunk by chunk from the head of the prompt."""
        self.loading = False
        self.failed = False
        """A load delivered less than was planned: it is not tried again."""
        self.saved = 0
        """Tokens considered for saving; a multiple of a chunk until the prompt is complete."""
        self.prompt_saved = False
        self.jobs: set[int] = set()
        """Saves whose blocks are still needed."""
        self.exact = 1 << 62
        """Tokens of it that were computed over nothing captured elsewhere."""
        self.salted = 1 << 62
        """From this one on, its block hashes are nobody else's."""
        self.patch: Patch | None = None
        """What was offered then of text captured elsewhere."""
        self.drafted = 1 << 62
        """Tokens of it of which a draft model's layers have KV, too."""
        self.stale = False
        """Some of it was computed before the cache was reset, or cannot be trusted: it is not
        saved."""
        self._prompt = request.num_prompt_tokens

    def renew(self) -> None:
        """A streaming session got more input: vLLM has appended it to what was computed, and
        dropped what was sampled last, which the chain may include."""
        if self.request.num_prompt_tokens != self._prompt:
            self._prompt = self.request.num_prompt_tokens
            self.prompt_saved = False
            # Drafts that were accepted and cut off at a stop: vLLM 0.32 takes their KV for that of
            # the first tokens of what follows.
            self.stale = self.stale or self._drafts
            if self.chain is not None:
                self.chain.links.clear()

    def ids(self, first: int, last: int) -> bytes:
        """Its tokens as int32; none where they do not say what it is: those of images are alike."""
        if self.request.mm_features:
            return b""
        tokens = self.request.all_token_ids[first:last]
        return struct.pack(f"={len(tokens)}i", *tokens)

    def adapter_id(self) -> str | None:
        """Content id of its LoRA, empty without one; None: not known yet, or unavailable."""
        if self.adapter is None:
            return ""
        if not self.adapter.done():
            return None
        try:
            return self.adapter.result()
        except Exception as error:
            log.warning(
                "request %s: cannot identify its LoRA adapter: %s", self.request.request_id, error
            )
            self.options = RequestOptions(skip_save=True, skip_load=True)
            return None

    def may_wait(self, seconds: float) -> bool:
        """It has not yet waited this long to learn what is stored of it."""
        now = time.monotonic()
        self.asked_at = self.asked_at or now
        return not self.options.skip_load and now - self.asked_at < seconds

    def forget(self) -> None:
        """The cache was reset: what is computed of it by now must not be stored either."""
        self.stale = self.stale or bool(self.request.num_computed_tokens)
        self.saved, self.answer, self.plan = 0, None, []

    @property
    def most(self) -> int:
        """Tokens of it that may be loaded or saved."""
        most, known = self.options.max_tokens, self.request.num_tokens
        return min(known if most is None else most, known, self.drafted)  # type: ignore[no-any-return]

    def links(self, keys: str) -> Chain:
        """Its chain, up to the last whole grain of what is known of it now; only what is new is
        hashed. `keys`: `own`, or `engine` for keys made of vLLM's block hashes."""
        chain, request = self.chain, self.request
        assert chain is not None
        if keys == "engine":
            for block in request.block_hashes[len(chain.links) :]:
                chain.links.append(hashlib.sha256(chain.seed + block).digest())
            return chain
        if request.num_tokens - chain.tokens < chain.grain:
            return chain
        for upto, extra in _marks(request, chain):
            self._extend(chain, upto)
            chain.mix(extra)
        self._extend(chain, request.num_tokens)
        return chain

    def sources(self, tokens: int) -> dict[str, int]:
        """Tier to tokens, for the `tokens` of the plan after what vLLM's own cache has."""
        out: dict[str, int] = {}
        at = 0
        for part in self.plan:
            n = min(at + part.tokens, self.start + tokens) - max(at, self.start)
            at += part.tokens
            if n > 0:
                out[part.tier] = out.get(part.tier, 0) + n
        return out

    def _extend(self, chain: Chain, upto: int) -> None:
        fresh = self.request.all_token_ids[chain.tokens : upto]
        # struct is more than twice as fast here as array or numpy, and this is the engine's time
        chain.extend(np.frombuffer(struct.pack(f"={len(fresh)}i", *fresh), np.int32))


def _marks(request: Any, chain: Chain) -> list[tuple[int, bytes]]:
    """Where the images and the like of a prompt begin, among the grains not yet hashed: (end of the
    grain, what its link is to be mixed with). Their placeholder tokens are all the same."""
    at: dict[int, list[bytes]] = {}
    for feature in request.mm_features:
        grain = feature.mm_position.offset // chain.grain
        name = str(feature.mm_hash or feature.identifier)
        if len(chain.links) <= grain < request.num_tokens // chain.grain:
            where = feature.mm_position.offset.to_bytes(8, "little")
            at.setdefault(grain, []).append(tlv(("content", name.encode()), ("offset", where)))
    return [((grain + 1) * chain.grain, b"".join(at[grain])) for grain in sorted(at)]
