"""What a user can get wrong, and what an unusual pool or another SGLang brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from backend import BASE, PAGE, backend, prompt, storage_config

from tierloom import ConfigError
from tierloom.adapters.sglang.hicache import TierloomHiCache

if TYPE_CHECKING:
    from collections.abc import Callable

    Pools = Callable[..., tuple[Any, Any]]

WRONG = {
    "no interface_v1": ({"interface_v1": 0}, '"interface_v1": 1'),
    "an unknown option": ({"tierloom.mintokens": 1}, "min_tokens"),
    "an unknown path": ({"tiers.hot.capcity": "1 GiB"}, "capacity"),
    "a word for a number": ({"tierloom.min_tokens": "many"}, "min_tokens"),
    "a negative number": ({"tierloom.min_tokens": -1}, "min_tokens"),
    "a time without a unit": ({"tierloom.wait": 250}, "wait"),
    "a list for a mapping": ({"tierloom.tags": ["a"]}, "tags"),
    "an unknown choice": ({"tierloom.reset": "some"}, "local"),
    "no such preset": ({"tierloom.config": "tierd"}, "tierd"),
    "set twice": ({"tierloom": {"wait": "1 s"}, "tierloom.wait": "2 s"}, "twice"),
}


@pytest.mark.parametrize(("extra", "said"), WRONG.values(), ids=WRONG)
def test_settings(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TierloomHiCache(storage_config(BASE | extra), {})


def test_nothing_said() -> None:
    with pytest.raises(ConfigError, match="interface_v1"):
        TierloomHiCache(storage_config({}), {})


@pytest.mark.parametrize(
    ("page", "extra", "said"),
    [(1, {}, "--page-size 32"), (4, {"chunk.tokens": 18}, "chunk.tokens to 16"),
     (8, {"chunk.tokens": 4}, "does not divide")],
)  # fmt: skip
def test_page_sizes(host_pool: Pools, page: int, extra: dict[str, Any], said: str) -> None:
    host, _ = host_pool("mha", "layer_first", page=page)
    storage = TierloomHiCache(storage_config(BASE | extra), {})
    with pytest.raises(ConfigError, match=said):
        storage.register_mem_pool_host(host)


def test_a_refused_start_leaves_nothing(host_pool: Pools, controller: Callable[..., Any]) -> None:
    host, device = host_pool("mha", "layer_first")
    with pytest.raises(ConfigError, match="does not divide"):
        controller(host, device, BASE | {"chunk.tokens": 18})


class Odd:
    """A pool of another kind."""

    page_size, layer_num, size, start_layer = PAGE, 3, 64, 0

    def __init__(self, **what: Any) -> None:
        vars(self).update(what)

    def get_page_buffer_meta(self, slots: torch.Tensor) -> tuple[list[int], list[int]]:
        return [0], [1]


@pytest.mark.parametrize(
    "pool",
    [
        Odd(layout="page_wise", kv_buffer=torch.zeros(2, 3, 64, 2, 8), head_dim=8, v_head_dim=8),
        Odd(layout="layer_first", kv_buffer=(torch.zeros(1), torch.zeros(1))),
        Odd(layout="layer_first", kv_buffer=torch.zeros(2, 3, 64, 2, 8), head_dim=8, v_head_dim=4),
        Odd(layout="layer_first", kv_buffer=torch.zeros(2, 2), head_dim=8, v_head_dim=8),
        Odd(layout="layer_first", kv_buffer=torch.zeros(2, 3, 64, 2, 8, dtype=torch.complex64),
            head_dim=8, v_head_dim=8),
        Odd(layout="layer_first", kv_buffer=torch.zeros(2, 3, 64, 2, 8), head_dim=8, v_head_dim=8),
    ],
    ids=["layout", "two buffers", "unequal", "shape", "dtype", "says otherwise"],
)  # fmt: skip
def test_a_pool_that_cannot_be_read(pool: Any, caplog: pytest.LogCaptureFixture) -> None:
    storage = backend(pool)
    assert storage.off
    assert "nothing is stored" in caplog.text
    keys = ["0" * 64]
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, torch.arange(PAGE)) == [False]
    assert storage.batch_set_v1(keys, torch.arange(PAGE)) == [False]
    storage.clear()
    storage.close()


@pytest.mark.parametrize("name", ["attn_cp_size", "dcp_size"])
def test_pages_that_are_spread_over_ranks(host_pool: Pools, name: str) -> None:
    host, _ = host_pool("mla", "layer_first")
    more: dict[str, Any] = {name: 2}
    if name == "dcp_size":
        more |= {"tp_size": 2, "is_mla_model": True, "logical_page_size": 8}
    storage = backend(host, **more)
    assert name in storage.off
    storage.close()


def test_a_latent_that_only_the_first_rank_writes(
    host_pool: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = host_pool("mla", "layer_first")
    storage = backend(host, tp_size=2, tp_rank=1, is_mla_model=True)
    assert not storage.off
    assert "a tier that all can read" in caplog.text
    storage.close()


def test_more_arguments_of_a_later_sglang(host_pool: Pools) -> None:
    """What it hands out beside is passed over; what is missing from its config is not asked for."""
    host, _ = host_pool("mha", "layer_first", slots=128)
    storage, text = backend(host), prompt(host, 4)
    text.save(storage)
    assert storage.get("x") is None
    assert storage.batch_get(["x"]) == [None]
    assert not storage.set("x")
    assert not storage.batch_set(["x"])
    assert storage.exists(text.keys[0]) in (True, False)
    storage.close()


def test_it_was_closed(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=128)
    storage, text = backend(host), prompt(host, 4)
    storage.close()
    storage.close()
    assert text.save(storage) == [False] * 4
    assert text.count(storage) == text.loaded(storage) == 0
