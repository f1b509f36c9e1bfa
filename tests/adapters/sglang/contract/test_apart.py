"""What must not be found by others: models, dtypes, ranks, tags, in one store that all can read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from backend import BASE, backend, prompt
from sglang.srt import runtime_context
from test_hicache import settle

from tierloom.adapters.sglang import hicache

if TYPE_CHECKING:
    from collections.abc import Callable

    Pools = Callable[..., tuple[Any, Any]]


def shared(folder: Path) -> dict[str, Any]:
    """A tier in which any process reads what another wrote."""
    return BASE | {
        "tierloom.config": {
            "version": 1, "name": "shared",
            "tiers": {"all": {"use": "files", "path": str(folder)}},
            "graphs": {
                "store": {"stages": {
                    "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
                    "pack": {"use": "gather"}, "out": {"use": "put", "tier": "all"},
                }},
                "retrieve": {"stages": {
                    "keys": {"use": "hash"}, "plan": {"use": "lookup"}, "fetch": {"use": "get"},
                    "grow": {"use": "decode"}, "place": {"use": "scatter"},
                }},
            },
        }
    } | {"tiers.hot.capacity": None}  # fmt: skip


@contextlib.contextmanager
def runs(**changed: Any) -> Iterator[None]:
    """SGLang's arguments, some of them others."""
    args = runtime_context.get_server_args()
    other = type(
        "Args", (), {"__getattr__": lambda _, name: changed.get(name, getattr(args, name))}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hicache, "get_server_args", other)
        yield


def found(host: Any, extra: dict[str, Any], text: Any, **more: Any) -> int:
    storage = backend(host, extra, **more)
    assert not storage.off
    n = int(text.count(storage))
    storage.close()
    return n


def test_who_shares_and_who_does_not(host_pool: Pools, tmp_path: Path, model: Path) -> None:
    extra = shared(tmp_path / "kv")
    del extra["tiers.hot.capacity"]
    host, _ = host_pool("mha", "layer_first", slots=128)
    storage, text = backend(host, extra), prompt(host, 8)
    assert all(text.save(storage))
    settle(storage)
    assert text.count(storage) == 8
    storage.close()
    assert found(host, extra, text) == 8
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((model / "config.json").read_bytes())
    (other / "model.safetensors").write_bytes(b"other weights" * 100)
    with runs(model_path=str(other)):
        assert found(host, extra, text) == 0
    with runs(quantization="awq"):
        assert found(host, extra, text) == 0
    with runs(kv_cache_dtype="fp8_e5m2", dtype="float32"):
        assert found(host, extra, text) == 0
    with runs(speculative_algorithm="EAGLE"):
        assert found(host, extra, text) == 0
    with runs(json_model_override_args='{"rope_theta": 1}'):
        assert found(host, extra, text) == 0
    assert found(host, extra | {"tierloom.tags": {"team": "a"}}, text) == 0
    assert found(host, extra | {"tierloom.name": "another"}, text) == 0
    assert found(host, extra | {"tierloom.weights": "mine"}, text) == 0
    assert found(host, extra | {"chunk.tokens": 32}, text) == 0
    half, _ = host_pool("mha", "layer_first", slots=128, dtype=torch.bfloat16)
    assert found(half, extra, text) == 0
    for rank in (0, 1):
        assert found(host, extra, text, tp_size=2, tp_rank=rank) == 0
    host.start_layer = 3
    assert found(host, extra, text, pp_size=2, pp_rank=1) == 0
    host.start_layer = 0
    assert found(host, extra, text) == 8


def test_a_model_without_files_must_be_named(host_pool: Pools, tmp_path: Path) -> None:
    from tierloom import ConfigError

    host, _ = host_pool("mha", "layer_first")
    with runs(model_path=str(tmp_path)):
        with pytest.raises(ConfigError, match=r"tierloom\.weights"):
            backend(host)
        storage = backend(host, BASE | {"tierloom.weights": "sha256 of mine"})
        assert not storage.off
        storage.close()
