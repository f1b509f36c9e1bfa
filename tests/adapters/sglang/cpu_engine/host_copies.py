"""Lets HiCache's host pools work on a CPU.

These functions stand in for SGLang's CUDA copies between the device pool and the host pool, and for
the page-locking of host memory: here both pools are tensors of the CPU, rows are copied by torch's
indexing, and nothing is page-locked. So a test with them says that the right rows are moved and
nothing about how SGLang's kernels move them, nor how fast.

The order of a host pool's dimensions is SGLang's (`mem_cache/pool_host/mha.py`, `mla.py`); an MLA
pool has one latent row of one head where an MHA pool has keys and values.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from torch import Tensor

POOLS = "sglang.srt.mem_cache.pool_host"


def rows_at(layout: str, layer: int, slots: Tensor, page: int) -> tuple[Any, ...]:
    """The index of a layer's rows in a buffer of `layout`; what is there is [slots, heads, dim]."""
    if layout == "layer_first":
        return layer, slots
    if layout == "page_first":
        return slots, layer
    if layout == "page_first_direct":
        return slots // page, layer, slots % page
    if layout == "page_head":
        return slots // page, slice(None), slots % page, layer
    raise ValueError(f"no stand-in copies a host pool of layout {layout}")


# ---- methods of MHATokenToKVPoolHost


def mha_load(
    self: Any, device_pool: Any, host_indices: Tensor, device_indices: Tensor, layer_id: int,
    io_backend: str, *, is_draft: bool = False,
) -> None:  # fmt: skip
    """Copy one layer's rows of keys and values from the host pool to the device pool."""
    if not is_draft and not 0 <= layer_id < self.target_layer_num:
        return
    at = rows_at(self.layout, layer_id, host_indices, self.page_size)
    self.device_k_buffers[layer_id][device_indices] = self.k_buffer[at]
    self.device_v_buffers[layer_id][device_indices] = self.v_buffer[at]


def mha_backup(
    self: Any, device_pool: Any, host_indices: Tensor, device_indices: Tensor, io_backend: str
) -> None:
    """Copy all layers' rows of keys and values from the device pool to the host pool."""
    for layer in range(self.layer_num):
        at = rows_at(self.layout, layer, host_indices, self.page_size)
        self.k_buffer[at] = self.device_k_buffers[layer][device_indices]
        self.v_buffer[at] = self.device_v_buffers[layer][device_indices]


# ---- methods of MLATokenToKVPoolHost


def mla_load(
    self: Any, device_pool: Any, host_indices: Tensor, device_indices: Tensor, layer_id: int,
    io_backend: str, *, is_draft: bool = False,
) -> None:  # fmt: skip
    """Copy one layer's latent rows from the host pool to the device pool."""
    if not is_draft and layer_id not in self._target_layer_indices:
        return
    host_layer = self._host_layer_by_controller[layer_id]
    device = self.device_kv_buffers[self._buffer_index_by_layer[layer_id]]
    at = rows_at(self.layout, host_layer, host_indices, self.page_size)
    device[device_indices] = self.kv_buffer[at]


def mla_backup(
    self: Any, device_pool: Any, host_indices: Tensor, device_indices: Tensor, io_backend: str
) -> None:
    """Copy all layers' latent rows from the device pool to the host pool."""
    for layer, host_layer in self._host_layer_by_controller.items():
        device = self.device_kv_buffers[self._buffer_index_by_layer[layer]]
        at = rows_at(self.layout, host_layer, host_indices, self.page_size)
        self.kv_buffer[at] = device[device_indices]


# ---- putting them in place


def replace_mha(module: Any) -> None:
    for pool in (module.MHATokenToKVPoolHost, module.AsymmetricMHATokenToKVPoolHost):
        pool.load_to_device_per_layer = mha_load
        pool.backup_from_device_all_layer = mha_backup


def replace_mla(module: Any) -> None:
    module.MLATokenToKVPoolHost.load_to_device_per_layer = mla_load
    module.MLATokenToKVPoolHost.backup_from_device_all_layer = mla_backup


def replace_page_locking(module: Any) -> None:
    module._cuda_host_register = lambda *_: None
    module._cuda_host_unregister = lambda *_: None


AFTER: dict[str, Callable[[Any], None]] = {
    f"{POOLS}.common": replace_page_locking,
    f"{POOLS}.mha": replace_mha,
    f"{POOLS}.mla": replace_mla,
}
"""What is done to a module of SGLang as soon as it has been imported."""


class Loader(importlib.abc.Loader):
    """Loads a module as `inner` does, then changes it."""

    def __init__(self, inner: Any, change: Callable[[Any], None]) -> None:
        self._inner, self._change = inner, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._change(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `AFTER`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Loader(spec.loader, AFTER[name])
        return spec


def stand_in() -> None:
    """Replace the copies and the page-locking wherever SGLang imports its host pools from now on.

    SGLang is not imported here: this runs when an interpreter starts, whatever it is for.
    """
    sys.meta_path.insert(0, Finder())
