"""The connector beside vLLM's scheduler: what is stored of a request, what to load, what to save.

Its thread is the engine's heartbeat, so it does no I/O and waits for nothing: it knows what the
workers hold from their reports (`ChunkDirectory`), and if only a remote tier knows, the request
waits, for a bounded time, while others go on. Methods are named as the hooks that call them.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tierloom.adapters.vllm.exchange.messages import (
    Blocks,
    Load,
    Passages,
    Plan,
    WorkerInfo,
    WorkerReports,
)
from tierloom.adapters.vllm.exchange.metrics import Stats
from tierloom.adapters.vllm.exchange.reset_socket import forget
from tierloom.adapters.vllm.exchange.settings import Configured, RequestOptions, request_options
from tierloom.adapters.vllm.scheduler.load_cost import LoadCost
from tierloom.adapters.vllm.scheduler.lora import LoraAdapters
from tierloom.adapters.vllm.scheduler.reports import Cache, Reports
from tierloom.adapters.vllm.scheduler.request import TrackedRequest
from tierloom.adapters.vllm.scheduler.saves import Saves
from tierloom.stages.directory.chunk_directory import Part
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.chain_seed import chain_seed
from tierloom.stages.kv.prefix import Chain, Span

if TYPE_CHECKING:
    from tierloom.adapters.vllm.scheduler.blend_orders import BlendOrders
    from tierloom.stages.directory.text_index import TextIndex

log = logging.getLogger("tierloom.vllm")

_START = 20
"""Factor on the waiting time of the first requests: the workers have yet to report what they
hold."""


class SchedulerSide:
    """What vLLM's hooks of the scheduler call. Used by the scheduler's one thread."""

    hands_over = False

    def __init__(self, vllm_config: Any, kv_cache_config: Any, conf: Configured) -> None:
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self.conf = conf
        self._loads, saves = transfer.is_kv_consumer, transfer.is_kv_producer
        self._vllm = vllm_config
        self._drafts = getattr(vllm_config, "speculative_config", None) is not None
        self._groups = [g.kv_cache_spec.block_size for g in kv_cache_config.kv_cache_groups]
        self._block = kv_cache_config.cache_hit_alignment_tokens or max(self._groups)
        self.hash_block = kv_cache_config.hash_block_size or self._block
        self._least = max(self._block, conf.settings.min_tokens)
        """Fewest tokens that are worth a load."""
        self._asynchronous = conf.settings.load == "async" or len(self._groups) > 1
        self._requests: dict[str, TrackedRequest] = {}
        self.saves = Saves(vllm_config, self._groups, conf.settings) if saves else None
        self.load_cost = LoadCost(max(1, vllm_config.max_concurrent_batches))
        self.reports = Reports(
            parallel.world_size, self.hash_block, conf.settings, self._requests, self.saves,
            self.load_cost,
        )  # fmt: skip
        self.blends: BlendOrders | None = None
        if conf.settings.blend != "off" and self._loads and self._asynchronous:
            from tierloom.adapters.vllm.scheduler.blend_orders import BlendOrders

            self.blends = BlendOrders(vllm_config, conf, self.hash_block, self._block)
        self._to_load: list[Load] = []
        self._questions: dict[str, Any] = {}
        self._held: list[str] = []
        self._abandoned: list[str] = []
        self._epoch = 0
        """Cache resets so far."""
        self._seed = lru_cache(1024)(self._seed_of)
        self._adapters = LoraAdapters()
        self.stats = Stats()

    @property
    def off(self) -> str:
        """Why nothing is looked up or saved; empty: caching is on."""
        return self.reports.off

    @property
    def info(self) -> WorkerInfo:
        """What all workers are. Only once they have reported it."""
        return self._cache.info

    @property
    def _cache(self) -> Cache:
        assert self.reports.cache is not None
        return self.reports.cache

    @property
    def texts(self) -> TextIndex | None:
        """Finds text anywhere that the workers hold; None: it is not kept by content."""
        return self.reports.cache.texts if self.reports.cache is not None else None

    def on_new_request(self, request: Any) -> None:
        """Read its options, and hash its prompt."""
        try:
            options = request_options(request.kv_transfer_params)
        except ValueError as error:
            log.warning("request %s: %s; it is neither loaded nor saved", request.request_id, error)
            options = RequestOptions(skip_save=True, skip_load=True)
        if request.prompt_embeds is not None or request.prompt_token_ids is None:
            options = RequestOptions(skip_save=True, skip_load=True)  # no token ids, no keys
        adapter = self._adapters.name(request.lora_request) if request.lora_request else None
        p = TrackedRequest(request, options, adapter, self._drafts)
        self._requests[request.request_id] = p
        if not self.off and not (options.skip_save and options.skip_load) and self._has_chain(p):
            p.links(self.conf.settings.keys)  # now, not in the step that needs it

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed` that can be loaded, and whether while others are computed.

        (None, False): ask again. Idempotent.
        """
        p = self._requests.get(request.request_id)
        if p is None or self.off or not self._loads or p.options.skip_load or p.failed:
            return 0, False
        p.renew()
        p.start, p.plan, p.patch = computed, [], None
        if not p.counted:
            p.counted = True
            self.stats.count("asked_tokens", request.num_tokens)
        if not self._has_chain(p):
            return (None, False) if self._may_wait(p) else (0, False)
        least = self._least
        most = min(p.most, request.num_tokens - 1) // self._block * self._block
        if most - computed < least:
            return 0, False
        plan = self._look_up(p, most)
        if plan is None:
            return None, False
        p.plan = self.load_cost.cut(self.info, plan, computed, request.num_tokens)
        exact = sum(part.tokens for part in p.plan)
        if self.blends is not None and (end := self.blends.offer(p, self._cache, exact, most)):
            return end - computed, True
        found = exact // self._block * self._block - computed
        if found < least:
            p.plan = []
            return 0, False
        return found, self._asynchronous

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """vLLM has allocated blocks; `tokens` of them are to be loaded.

        It waits for that load, so one is sent out even after an error here: one that can only fail.
        """
        try:
            self._load(request, blocks, tokens)
        except Exception:
            log.exception("request %s cannot be loaded", request.request_id)
            if tokens:
                tables = tuple(map(BlockTable, blocks.get_block_ids()))
                self._send(request, Span(b"", b"", 0, tokens), tables, 0, 0)

    def _load(self, request: Any, blocks: Any, tokens: int) -> None:
        p = self._requests.get(request.request_id)
        if p is None:
            return
        p.loading = False  # the second call for an asynchronous load comes when it has ended
        if not tokens or not (p.plan or p.patch):
            return
        assert p.chain is not None
        chunk, per = self.info.chunk, self.info.chunk // self.info.grain
        end = p.start + tokens
        first = p.start // chunk
        last = min(len(p.chain.links), -(-end // chunk) * per)
        if p.patch is not None:  # what its names find must end where the first run may begin
            last = max(first * per, p.patch.exact // self.info.grain)
        span = p.chain.span(first * per, last, wanted=end - first * chunk)
        tables = tuple(
            BlockTable.cut([b or -1 for b in ids], size, first * chunk, end, fresh=p.start)
            for ids, size in zip(blocks.get_block_ids(), self._groups, strict=True)
        )
        passages = None
        if self.blends is not None and p.patch is not None:
            passages = self.blends.passages(p, end, blocks.get_block_ids()[0])
        self._send(request, span, tables, first * chunk, p.start, passages)
        p.loading = self._asynchronous

    def _send(
        self, request: Any, span: Span, tables: Blocks, start: int, fresh: int,
        passages: Passages | None = None,
    ) -> None:  # fmt: skip
        name, layered = request.request_id, not self._asynchronous
        seconds = self.load_cost.seconds(self.info, span.wanted)
        load = Load(name, span, tables, start, fresh, request.num_tokens, seconds, layered)
        if passages is not None and self.blends is not None:
            load = load._replace(passages=passages)
            self.blends.begin(load)
        self._to_load.append(load.traced(request))
        if layered:
            self.reports.expect(name)

    def sources(self, request: Any, tokens: int) -> dict[str, int]:
        """Tier to tokens, for the `tokens` that are loaded."""
        p = self._requests.get(request.request_id)
        return p.sources(tokens) if p is not None else {}

    def request_finished_all_groups(self, request: Any, blocks: tuple[list[int], ...]) -> bool:
        """A request has ended, in whatever way. True: its blocks are still needed."""
        name = request.request_id
        p = self._requests.pop(name, None)
        self._questions.pop(name, None)
        self.reports.forget(name)
        if self.blends is not None:
            self.blends.forget(name)
        if p is None:
            return False
        if p.loading:  # vLLM keeps the blocks by itself until the load is reported
            self._abandoned.append(name)
            return False
        needed = self.saves is not None and self.saves.finish(p, blocks, self._may_save(p))
        self._held += [name] * needed
        return needed

    def build_connector_meta(self, output: Any) -> Plan:
        """What the workers are to do in this step."""
        idle = not output.total_num_scheduled_tokens
        plan = Plan(idle, self._to_load, questions=self._questions, abandoned=self._abandoned)
        self._to_load, self._questions, self._abandoned = [], {}, []
        if self.blends is not None:
            plan.orders = self.blends.orders(output.total_num_scheduled_tokens)
        if self.saves is not None:
            unconfirmed = self.reports.unconfirmed()
            try:
                plan.saves = self.saves.plan(
                    output, self._requests, self._may_save, unconfirmed=unconfirmed
                )
            except Exception:  # loads that vLLM waits for must be sent out, whatever happens here
                log.exception("saves could not be planned; this step goes on without them")
            plan.fenced = self.saves.fenced(output)
            held, self._held = self._held, []
            for name in held:
                (self._held if self.saves.is_pending(name) else plan.held).append(name)
        self.load_cost.step(output.total_num_scheduled_tokens)
        return plan

    def update_connector_output(self, reports: WorkerReports | None) -> None:
        """A step has ended; what the workers report, if anything."""
        self.reports.add(reports)
        if self.blends is not None:
            self.blends.add(reports)

    def has_pending_push_work(self) -> bool:
        """Something was begun whose end the workers have yet to report."""
        return bool(self._held or (self.saves is not None and self.saves.jobs))

    def reset_cache(self) -> bool:
        """Forget what is stored, now, as `tierloom.reset` says; False: not all of it is deleted.

        What was computed before is not saved afterwards: the weights may have changed by then.
        """
        which = self.conf.settings.reset
        if which == "none" or self.off:
            return True
        self._epoch += 1
        for p in self._requests.values():
            p.forget()
        if self.saves is not None:
            self.saves.forget(self._epoch)
        if self.reports.cache is not None:
            self.reports.cache.directory.clear()
            if self.reports.cache.texts is not None:
                self.reports.cache.texts.clear()
        return forget(self._vllm, self._epoch, local=which == "local")

    def shutdown(self) -> None:
        self._adapters.close()

    def report(self) -> dict[str, Any]:
        """Plain numbers, for tests and for debugging."""
        jobs = self.saves.jobs if self.saves else ()
        keys = len(self._cache.directory) if self.reports.cache else 0
        return {
            "requests": len(self._requests), "jobs": len(jobs), "keys": keys,
            "rate": self.load_cost.rate, "off": self.off,
        }  # fmt: skip

    def _has_chain(self, p: TrackedRequest) -> bool:
        """The request's chain of keys can be made; False: not yet."""
        if p.chain is not None:
            return True
        if not self.reports.ready or (adapter := p.adapter_id()) is None:
            return False
        seed = self._seed(p.request.cache_salt or "", adapter, p.options.tags)
        p.chain = Chain(seed, self.info.grain)
        return True

    def _seed_of(self, salt: str, adapter: str, tags: tuple[tuple[str, str], ...]) -> bytes:
        names = self.info.namespace.of(salt=salt, adapter=adapter, tags=tags)
        return chain_seed(names, self.info.keys)

    def _may_wait(self, p: TrackedRequest) -> bool:
        """A request has time left to learn what is stored of it."""
        lookup_timeout_s = self.conf.settings.wait * (1 if self.reports.ready else _START)
        return p.may_wait(lookup_timeout_s)

    def _look_up(self, p: TrackedRequest, most: int) -> list[Part] | None:
        """What is stored of a request's first `most` tokens; None: not known yet."""
        chain = p.links(self.conf.settings.keys)
        plan = self._cache.directory.find(chain.links, most)
        found = sum(part.tokens for part in plan)
        if found >= most:
            return plan
        if self.info.remote:
            if not p.asked:
                p.asked = True
                self._questions[p.request.request_id] = chain.span(0, len(chain.links))
            if p.answer is None and self._may_wait(p):
                return None
            if p.answer is not None and p.answer > found:
                plan.append(Part(min(p.answer, most) - found, self.info.remote))
        elif self.saves is not None:
            known = max(found, p.start)
            if self.saves.promised(chain, known) >= known + self._least and self._may_wait(p):
                return None
        return plan

    def _may_save(self, p: TrackedRequest) -> bool:
        return not (self.off or p.stale or p.options.skip_save) and self._has_chain(p)
