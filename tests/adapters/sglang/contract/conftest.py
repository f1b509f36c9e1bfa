"""SGLang's own classes on the CPU: host pools of each kind and layout, and the HiCache controller.

These tests run in `.venv-sglang`, started by `../test_in_its_environment.py`; where SGLang cannot
be imported they are not collected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.append(str(Path(__file__).parent))

from sizes import DIM, HEADS, LAYERS, PAGE, SLOTS

if importlib.util.find_spec("sglang") is None or os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
    collect_ignore_glob = ["*"]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's, and those of what it imports
        import torch
        from device_pools import device_pool
        from sglang.srt import runtime_context
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
        from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALONE = {
    "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "dp_size": 1, "dcp_size": 1,
    "attn_tp_rank": 0, "attn_tp_size": 1, "attn_dp_rank": 0, "attn_cp_size": 1,
    "attn_dcp_rank": 0, "attn_dcp_size": 1,
}  # fmt: skip
"""What SGLang wants to know of the other ranks: there are none."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one process, which SGLang's controller asks for its ranks."""
    import torch.distributed as dist

    meeting = tmp_path_factory.mktemp("gloo") / "world"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    known = runtime_context._parallel_fields()
    with runtime_context.get_parallel().override(**{k: ALONE[k] for k in ALONE if k in known}):
        yield
    dist.destroy_process_group()


CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": DIM,
    "max_position_embeddings": 4096, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a model, as far as they name it."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _published(_alone: None, model: Path) -> None:
    """SGLang's configuration, as a server's process publishes it."""
    from sglang.srt.server_args import ServerArgs

    runtime_context.publish(ServerArgs(model_path=str(model), device="cpu"), role="test")


@pytest.fixture(autouse=True)
def _well() -> Iterator[None]:
    """The store of `awkward.py` is empty and behaves, before each test and after it."""
    from awkward import KEPT, Mood

    Mood.well()
    KEPT.clear()
    yield
    Mood.well()
    KEPT.clear()


@pytest.fixture(autouse=True)
def _host_memory() -> Iterator[None]:
    """A host pool wants 10 GiB of free memory beyond its own, or what this says there is."""
    with host_memory_budget_scope(1 << 30):
        yield


@pytest.fixture
def host_pool() -> Callable[..., tuple[Any, Any]]:
    """`host_pool(kind, layout)`: SGLang's host pool, of twice the slots, and its device pool."""

    def make(kind: str, layout: str, ratio: float = 2.0, **how: Any) -> tuple[Any, Any]:
        device = device_pool(kind, **how)
        info = device.get_device_pool_infos()[0].buffer_info
        slots, layers = how.get("slots", SLOTS), how.get("layers", LAYERS)
        shape = {"device_capacity_tokens": slots, "start_layer": 0, "end_layer": layers - 1}
        if kind == "mla":
            shape["target_layer_num"] = layers
        pool = MHATokenToKVPoolHost if kind == "mha" else MLATokenToKVPoolHost
        page = how.get("page", PAGE)
        return pool(info, ratio, 0, page, layout, pin_memory=False, **shape), device

    return make


@pytest.fixture
def controller() -> Iterator[Callable[..., Any]]:
    """`controller(host, device, extra_config)`: HiCache's controller with a dynamic backend.

    Detached and closed after the test.
    """
    running = []

    def make(host: Any, device: Any, extra_config: dict[str, Any], **options: Any) -> Any:
        slots = device.size
        allocator = PagedTokenToKVPoolAllocator(
            slots, host.page_size, device.dtype, "cpu", device, False
        )
        how = {
            "write_policy": "write_through", "io_backend": "direct", "storage_backend": "dynamic",
            "prefetch_threshold": host.page_size, "model_name": "some/model",
        }  # fmt: skip
        one = HiCacheController(
            allocator, host, host.page_size, torch.distributed.group.WORLD, threading.Event(),
            storage_backend_extra_config=dict(extra_config), **how | options,
        )  # fmt: skip
        running.append(one)
        return one

    yield make
    for one in running:
        with contextlib.suppress(Exception):
            one.detach_storage_backend()
