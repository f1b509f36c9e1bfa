"""The stand-ins for SGLang's CUDA copies move the rows that are asked for, whatever the layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUTS = [
    (kind, layout)
    for kind in ("mha", "mla")
    for layout in ("layer_first", "page_first", "page_first_direct", "page_head")
    if (kind, layout) != ("mla", "page_head")
]
FROM = torch.tensor([8, 9, 10, 11, 40, 41, 42, 43, 16, 17, 18, 19])
TO = torch.tensor([100, 101, 102, 103, 4, 5, 6, 7, 52, 53, 54, 55])


def buffers(kind: str, device: Any) -> list[torch.Tensor]:
    return [*device.k_buffer, *device.v_buffer] if kind == "mha" else list(device.kv_buffer)


def token_rows(kind: str, host: Any, layer: int, slot: int) -> torch.Tensor:
    """One token's rows in one layer, read out of SGLang's own flat page."""
    page = host.get_data_page(slot - slot % host.page_size, flat=False)
    at = slot % host.page_size
    layouts = {
        "layer_first": (..., layer, at, slice(None), slice(None)),
        "page_first": (..., at, layer, slice(None), slice(None)),
        "page_first_direct": (..., layer, at, slice(None), slice(None)),
        "page_head": (..., slice(None), at, layer, slice(None)),
    }
    return page[layouts[host.layout]]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_rows_go_out_and_come_back(
    host_pool: Callable[..., tuple[Any, Any]], kind: str, layout: str
) -> None:
    host, device = host_pool(kind, layout)
    for buffer in buffers(kind, device):
        buffer.normal_()
    before = [buffer.clone() for buffer in buffers(kind, device)]
    host.kv_buffer.zero_()
    host.backup_from_device_all_layer(device, TO, FROM, "direct")
    assert int((host.kv_buffer != 0).sum()) == sum(b[FROM].numel() for b in before)
    for layer in range(3):
        for source, target in zip(FROM.tolist(), TO.tolist(), strict=True):
            rows = token_rows(kind, host, layer, target)
            expected = torch.stack([b[source] for b in before[layer::3]])
            assert torch.equal(rows.reshape(expected.shape), expected), (layer, source)
    for buffer in buffers(kind, device):
        buffer.zero_()
    for layer in range(3):
        host.load_to_device_per_layer(device, TO, FROM, layer, "direct")
    for buffer, was in zip(buffers(kind, device), before, strict=True):
        assert torch.equal(buffer[FROM], was[FROM])
        assert int((buffer != 0).sum()) == was[FROM].numel()


def test_another_layout_is_refused(host_pool: Callable[..., tuple[Any, Any]]) -> None:
    host, device = host_pool("mha", "page_unified")
    with pytest.raises(ValueError, match="page_unified"):
        host.backup_from_device_all_layer(device, TO, FROM, "direct")
