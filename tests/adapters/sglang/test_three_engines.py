"""One store, three engines: what vLLM, SGLang or transformers kept of a text, the others do not
compute. Each is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import processes
import pytest
import torch
from real_engine import Engine, hicache, prompt

from tierloom.adapters.model_identity.shared import shared_id
from tierloom.adapters.transformers import CachedModel

LENGTH, CHUNK = 2090, 256
WHOLE = LENGTH // CHUNK * CHUNK
"""A store that all can read is asked for whole chunks."""


@pytest.fixture
def vllm(logs: Path) -> Iterator[harness.Engine]:
    if reason := harness.why_not():
        processes.missing("vllm", reason, "make vllm")
    one = harness.Engine(logs, "vllm")
    yield one
    one.close()


def store(folder: Path) -> dict[str, Any]:
    """A pipeline over files that any process may read."""
    made = harness.pipeline(cold={"use": "files", "path": str(folder)})
    deadlines = {"store": {"deadline": "30 s"}, "retrieve": {"deadline": "30 s"}}
    for name, graph in made["graphs"].items():
        graph.update(deadlines[name])
    return made | {"budget": {"arena": "128 MiB"}}


def for_sglang(folder: Path) -> dict[str, Any]:
    return hicache({
        "backend_name": "tierloom", "module_path": "tierloom.adapters.sglang.hicache",
        "class_name": "TierloomHiCache", "interface_v1": 1, "prefetch_threshold": 32,
        "hicache_storage_pass_prefix_keys": True, "tierloom.config": store(folder),
        "tierloom.wait": "20 s",
    })  # fmt: skip


def test_each_finds_what_another_kept(
    engine: Engine, vllm: harness.Engine, llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    kept = tmp_path / "kv"
    texts = [prompt(LENGTH, seed) for seed in (31, 32, 33)]
    engine.end()
    with_keys = harness.transfer(store(kept), **{"tierloom.keys": "sglang"})
    vllm.use(llama, with_keys, max_model_len=4096)
    by_vllm = vllm.one(texts[0], max_tokens=16)
    assert by_vllm.cached == 0
    vllm.settle()
    vllm.close()

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    keys = {"order": "canonical", "chunk.keys": "sglang"}
    identity = shared_id(str(llama), dtype="float32")
    with CachedModel(model, config=store(kept), weights=identity, overrides=keys) as mine:
        mine.generate(torch.tensor([texts[2]]), max_new_tokens=1, do_sample=False)

    engine.use(llama, **for_sglang(kept))
    for text in (texts[0], texts[2]):
        found = engine.one(text, max_tokens=16)
        said = model.generate(
            torch.tensor([text]), max_new_tokens=16, min_new_tokens=16, do_sample=False
        )
        assert found.ids == said[0, LENGTH:].tolist()
        assert found.cached >= WHOLE
    assert engine.one(texts[0], max_tokens=16).ids == by_vllm.ids
    by_sglang = engine.one(texts[1], max_tokens=16)
    assert by_sglang.cached == 0
    engine.stop()

    vllm.use(llama, with_keys, max_model_len=4096)
    back = vllm.one(texts[1], max_tokens=16)
    assert back.ids == by_sglang.ids
    assert back.cached >= WHOLE
