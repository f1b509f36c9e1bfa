"""The connector beside vLLM's scheduler: what is kept for a request, what to load, what to save.

Its thread is the engine's heartbeat, so it does no I/O and waits for nothing: it knows what the
workers keep from what they tell (`ChunkDirectory`), and where only a remote tier knows, the
request waits, for a bounded time, while others go on.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import Any

from tierloom.adapters.vllm.exchange.messages import Blocks, Hello, Load, News, Plan, Seen, Told
from tierloom.adapters.vllm.exchange.metrics import Stats
from tierloom.adapters.vllm.exchange.reset_socket import forget
from tierloom.adapters.vllm.exchange.settings import Configured, Wishes, wishes
from tierloom.adapters.vllm.scheduler.load_cost import Worth
from tierloom.adapters.vllm.scheduler.lora import Adapters
from tierloom.adapters.vllm.scheduler.request import Passage
from tierloom.adapters.vllm.scheduler.saves import Saves
from tierloom.stages.contract.batch import Span
from tierloom.stages.directory.chunk_directory import ChunkDirectory, Part
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.ops.hash import Chain

log = logging.getLogger("tierloom.vllm")

_DOUBT = 60.0
"""Seconds after which a load within a step that nobody tells of is taken for failed."""
_START = 20
"""The first requests wait so much longer: for the workers to say what they keep."""


class SchedulerSide:
    """What vLLM's hooks of the scheduler call. Used by the scheduler's one thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, conf: Configured) -> None:
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self.conf = conf
        self._loads, saves = transfer.is_kv_consumer, transfer.is_kv_producer
        self._workers, self._vllm = parallel.world_size, vllm_config
        self._drafts = getattr(vllm_config, "speculative_config", None) is not None
        self._groups = [g.kv_cache_spec.block_size for g in kv_cache_config.kv_cache_groups]
        self._block = kv_cache_config.cache_hit_alignment_tokens or max(self._groups)
        self.hash_block = kv_cache_config.hash_block_size or self._block
        self._least = max(self._block, conf.settings.min_tokens)
        """Tokens that are worth a load."""
        self._asynchronous = conf.settings.load == "async" or len(self._groups) > 1
        self.off = ""
        """Why nothing is looked up or saved; empty: all is well."""
        self.hello: Hello | None = None
        self._hellos: dict[int, Hello] = {}
        self._behind: set[int] = set()
        """Workers that have yet to tell all that they kept when they began."""
        self._early: list[tuple[int, list[Seen]]] = []
        """What workers told before all had said what they are."""
        self.directory: ChunkDirectory | None = None
        self._passages: dict[str, Passage] = {}
        self.saves = Saves(vllm_config, self._groups, conf.settings) if saves else None
        self._to_load: list[Load] = []
        self._questions: dict[str, Any] = {}
        self._held: list[str] = []
        self._abandoned: list[str] = []
        self._epoch = 0
        """Resets of what is kept so far."""
        self._doubt: dict[str, set[int]] = {}
        """Requests that are loaded within a step, and the workers that have told how it went."""
        self._doubt_until = 0.0
        self._answers: dict[str, dict[int, int]] = {}
        self.worth = Worth(max(1, vllm_config.max_concurrent_batches))
        self._seed = lru_cache(1024)(self._seed_of)
        self._adapters = Adapters()
        self.stats = Stats()
        self.on_change: Any = None
        """Called with (key, loadable, tier) where that changes; for events."""

    def arrived(self, request: Any) -> None:
        """A new request: read its switches, and name it."""
        try:
            said = wishes(request.kv_transfer_params)
        except ValueError as error:
            log.warning("request %s: %s; it is neither loaded nor saved", request.request_id, error)
            said = Wishes(skip_save=True, skip_load=True)
        if request.prompt_embeds is not None or request.prompt_token_ids is None:
            said = Wishes(skip_save=True, skip_load=True)  # no token ids, no names
        adapter = self._adapters.name(request.lora_request) if request.lora_request else None
        p = self._passages[request.request_id] = Passage(request, said, adapter, self._drafts)
        if not self.off and not (said.skip_save and said.skip_load) and self._named(p):
            p.links(self.conf.settings.keys)  # now, not in the step that wants it

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed` that can be loaded, and whether while others are computed.

        (None, False): ask again. Changes nothing that matters when it is asked again.
        """
        p = self._passages.get(request.request_id)
        if p is None or self.off or not self._loads or p.wishes.skip_load or p.failed:
            return 0, False
        p.renew()
        p.start, p.plan = computed, []
        if not p.counted:
            p.counted = True
            self.stats.count("asked_tokens", request.num_tokens)
        if not self._named(p):
            return (None, False) if self._waits(p) else (0, False)
        least = self._least
        most = min(p.most, request.num_tokens - 1) // self._block * self._block
        if most - computed < least:
            return 0, False
        plan = self._look(p, most)
        if plan is None:
            return None, False
        assert self.hello is not None
        p.plan = self.worth.cut(self.hello, plan, computed, request.num_tokens)
        found = sum(part.tokens for part in p.plan) // self._block * self._block - computed
        if found < least:
            p.plan = []
            return 0, False
        return found, self._asynchronous

    def allotted(self, request: Any, blocks: Any, tokens: int) -> None:
        """vLLM has set blocks aside; `tokens` of them are to be loaded.

        It waits for that load, so one goes out whatever happens here: one that can only fail.
        """
        try:
            self._allot(request, blocks, tokens)
        except Exception:
            log.exception("request %s cannot be loaded", request.request_id)
            if tokens:
                tables = tuple(map(BlockTable, blocks.get_block_ids()))
                self._send(request, Span(b"", b"", 0, tokens), tables, 0, 0)

    def _allot(self, request: Any, blocks: Any, tokens: int) -> None:
        p = self._passages.get(request.request_id)
        if p is None:
            return
        p.loading = False  # the second call for an asynchronous load comes when it is through
        if not tokens or not p.plan:
            return
        assert self.hello is not None
        assert p.chain is not None
        chunk, per = self.hello.chunk, self.hello.chunk // self.hello.grain
        end = p.start + tokens
        first = p.start // chunk
        last = min(len(p.chain.links), -(-end // chunk) * per)
        span = p.chain.span(first * per, last, place=end - first * chunk)
        tables = tuple(
            BlockTable.cut([b or -1 for b in ids], size, first * chunk, end, fresh=p.start)
            for ids, size in zip(blocks.get_block_ids(), self._groups, strict=True)
        )
        self._send(request, span, tables, first * chunk, p.start)
        p.loading = self._asynchronous

    def _send(self, request: Any, span: Span, tables: Blocks, start: int, fresh: int) -> None:
        assert self.hello is not None
        name, layered = request.request_id, not self._asynchronous
        seconds = self.worth.seconds(self.hello, span.place)
        load = Load(name, span, tables, start, fresh, request.num_tokens, seconds, layered)
        self._to_load.append(load)
        if layered:
            self._doubt[name] = set()
            self._doubt_until = time.monotonic() + _DOUBT

    def sources(self, request: Any, tokens: int) -> dict[str, int]:
        """Tier to tokens, for the `tokens` that are loaded."""
        p = self._passages.get(request.request_id)
        return p.sources(tokens) if p is not None else {}

    def finished(self, request: Any, blocks: tuple[list[int], ...]) -> bool:
        """A request has ended, in whatever way. True: its blocks are still needed."""
        name = request.request_id
        p = self._passages.pop(name, None)
        self._questions.pop(name, None)
        self._answers.pop(name, None)
        if p is None:
            return False
        if p.loading:  # vLLM keeps the blocks by itself until the load is reported
            self._abandoned.append(name)
            return False
        needed = self.saves is not None and self.saves.finish(p, blocks, self._may_save(p))
        self._held += [name] * needed
        return needed

    def plan(self, output: Any) -> Plan:
        """What the workers are to do in this step."""
        idle = not output.total_num_scheduled_tokens
        plan = Plan(idle, self._to_load, questions=self._questions, abandoned=self._abandoned)
        self._to_load, self._questions, self._abandoned = [], {}, []
        if self.saves is not None:
            if self._doubt and time.monotonic() > self._doubt_until:  # a worker lost its tongue
                self._doubt.clear()
                self.saves.spoil()
            try:
                plan.saves = self.saves.plan(
                    output, self._passages, self._may_save, doubt=bool(self._doubt)
                )
            except Exception:  # loads that vLLM waits for must go out, whatever happens here
                log.exception("saves could not be planned; this step goes on without")
            plan.fenced = self.saves.fenced(output)
            held, self._held = self._held, []
            for name in held:
                (self._held if self.saves.waits(name) else plan.held).append(name)
        self.worth.step(output.total_num_scheduled_tokens)
        return plan

    def heard(self, news: News | None) -> None:
        """A step has ended; the workers' news, if any."""
        for worker, told in sorted(news.told.items()) if news else ():
            self._hear(worker, told)

    @property
    def busy(self) -> bool:
        """Something was begun whose end the workers have yet to tell."""
        return bool(self._held or (self.saves is not None and self.saves.jobs))

    def reset(self) -> bool:
        """Forget what is kept, now, as `tierloom.reset` says; False: not all of it is gone.

        What was computed before is not saved afterwards: the weights may be others by then.
        """
        which = self.conf.settings.reset
        if which == "none" or self.off:
            return True
        self._epoch += 1
        for p in self._passages.values():
            p.forget()
        if self.saves is not None:
            self.saves.forget(self._epoch)
        if self.directory is not None:
            self.directory.clear()
        return forget(self._vllm, self._epoch, local=which == "local")

    def close(self) -> None:
        self._adapters.close()

    def report(self) -> dict[str, Any]:
        """Plain numbers, for tests and for the curious."""
        jobs = self.saves.jobs if self.saves else ()
        return {
            "requests": len(self._passages), "jobs": len(jobs), "keys": len(self.directory or ()),
            "rate": self.worth.rate, "off": self.off,
        }  # fmt: skip

    def _named(self, p: Passage) -> bool:
        """The request's chain is there; False: not yet."""
        if p.chain is not None:
            return True
        if self.hello is None or self._behind or (adapter := p.adapter_id()) is None:
            return False
        seed = self._seed(p.request.cache_salt or "", adapter, p.wishes.tags)
        p.chain = Chain(seed, self.hello.grain)
        return True

    def _seed_of(self, salt: str, adapter: str, tags: tuple[tuple[str, str], ...]) -> bytes:
        assert self.hello is not None
        return self.hello.whole.of(salt=salt, adapter=adapter, tags=tags).digest

    def _waits(self, p: Passage) -> bool:
        """There is still time for a request to learn what is kept for it."""
        starts = self.hello is None or bool(self._behind)
        return p.waits(self.conf.settings.wait * (_START if starts else 1))

    def _look(self, p: Passage, most: int) -> list[Part] | None:
        """What is kept of a request's first `most` tokens; None: not known yet."""
        assert self.hello is not None
        assert self.directory is not None
        chain = p.links(self.conf.settings.keys)
        plan = self.directory.find(chain.links, most)
        found = sum(part.tokens for part in plan)
        if found >= most:
            return plan
        if self.hello.remote:
            if not p.asked:
                p.asked = True
                self._questions[p.request.request_id] = chain.span(0, len(chain.links))
            if p.answer is None and self._waits(p):
                return None
            if p.answer is not None and p.answer > found:
                plan.append(Part(min(p.answer, most) - found, self.hello.remote))
        elif self.saves is not None:
            known = max(found, p.start)
            if self.saves.promised(chain, known) >= known + self._least and self._waits(p):
                return None
        return plan

    def _may_save(self, p: Passage) -> bool:
        return not (self.off or p.stale or p.wishes.skip_save) and self._named(p)

    def _hear(self, worker: int, told: Told) -> None:
        if told.hello is not None:
            self._greet(worker, told.hello)
            if told.more:
                self._behind.add(worker)
        elif told.seen and not told.more:
            self._behind.discard(worker)
        if self.hello is not None and self.directory is not None:
            for seen in told.seen:
                share = worker * self.hello.shares + seen.share
                changed = self.directory.note(share, seen.tier, seen.kept, seen.links)
                if changed and self.on_change is not None:
                    self.on_change(*changed, seen.tier)
        elif told.seen and not self.off:
            self._early.append((worker, told.seen))
        if self.saves is not None:
            self.saves.heard(worker, told)
        for name, tokens in told.answers.items():
            if (p := self._passages.get(name)) is not None:
                answers = self._answers.setdefault(name, {})
                answers[worker] = tokens
                if len(answers) == self._workers:
                    p.answer = min(answers.values())
                    del self._answers[name]
        if self.saves is not None and not self._doubt.keys().isdisjoint(told.failed):
            self.saves.spoil()
        for name in told.loaded:
            if (heard := self._doubt.get(name)) is not None:
                heard.add(worker)
                if len(heard) == self._workers:
                    del self._doubt[name]
        for name in told.failed:
            if (p := self._passages.get(name)) is not None:
                p.failed = True
        self.worth.costs.update(told.costs)

    def _greet(self, worker: int, hello: Hello) -> None:
        """All workers must be alike before anything is looked up."""
        self._hellos[worker] = hello
        self.off = self.off or hello.off
        if len(self._hellos) < self._workers or self.off:
            return
        self.hello = first = Hello.of_all(self._hellos)
        self.off = first.off
        if self.conf.settings.keys == "engine" and first.grain != self.hash_block:
            self.off = f"keys: engine wants chunk.grain {self.hash_block}, got {first.grain}"
        if self.off:
            log.error("caching is off: %s", self.off)
        self.directory = ChunkDirectory(
            first.tiers, holders=self._workers * first.shares, chunk=first.chunk, grain=first.grain
        )
        if self.saves is not None:
            self.saves.greet(self.hello, self.directory)
        early, self._early = self._early, []
        for whose, seen in early:
            self._hear(whose, Told(seen=seen))
