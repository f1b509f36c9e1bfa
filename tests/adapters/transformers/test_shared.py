"""A real model in two processes over one store: what one stored, the other has bit by bit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import real_model
from servers import redis
from store_server import process

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), real_model]

CODE = """
import hashlib, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tierloom.adapters.demo import smollm2
from tierloom.adapters.transformers import CachedModel
from tierloom.adapters.transformers.model import with_cache

retrieve, stores = sys.argv[1] == "load", json.loads(sys.argv[2])
folder = smollm2.model_dir(progress=False)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
text = "The observatory stands on a hill above the town, and its mirror is wide. " * 45
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :300]
for config, url in stores:
    names = {"tiers.cold.url": url, "tiers.cold.timeout": "20 s", "tiers.hot.capacity": "64 MiB"}
    names |= {"graphs.store.deadline": "60 s", "graphs.retrieve.deadline": "60 s"}
    with CachedModel(model, config=config, overrides=names) as kept:
        cache = kept.cache(ids, retrieve=retrieve, store=not retrieve)
        had = cache.get_seq_length()
        with torch.no_grad():
            said = model(ids[:, had:], logits_to_keep=1, **with_cache(model, cache)).logits
        cache.storing is None or cache.storing.wait()
        digest = hashlib.sha256()
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                digest.update(part[:, :, :256].contiguous().view(torch.uint8).numpy().tobytes())
        tiers = kept.pipe.stats()["tiers"]
        print(json.dumps({"had": had, "said": said.argmax().item(), "digest": digest.hexdigest(),
                          "hits": tiers["cold"]["hits"], "puts": tiers["cold"]["puts"]}))
"""


@contextlib.contextmanager
def store(kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    """A preset, and the address of its store, which runs."""
    if kind == "redis":
        with redis() as server:
            yield "redis", f"redis://127.0.0.1:{server.port}"
        return
    listen = ("tcp://127.0.0.1:0",) if kind == "tcp" else (f"unix://{folder}/socket",)
    tiers = {"hot": {"use": "memory", "capacity": "256 MiB"}}
    with process(folder, tiers=tiers, listen=listen) as server:
        yield "server", server.url


def test_what_one_process_stored_another_has(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        kinds = ("redis", "tcp", "shared")
        stores = [stack.enter_context(store(kind, tmp_path / kind)) for kind in kinds]
        there, here = (run(what, json.dumps(stores)) for what in ("store", "load"))
    for kind, one, two in zip(kinds, there, here, strict=True):
        assert (one["had"], one["puts"]) == (0, 2), kind
        assert two["had"] == 256, "of servers, whole chunks are asked"
        assert two["hits"] == 1, kind
        assert one["digest"] == two["digest"], kind
        assert one["said"] == two["said"], kind


def run(what: str, stores: str) -> list[dict[str, object]]:
    """What a process of its own tells of each store."""
    source = Path(__file__).resolve().parents[3] / "src"
    env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, what, stores], env=env, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
