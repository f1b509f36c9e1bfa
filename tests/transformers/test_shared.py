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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    real_model,
]

CODE = """
import hashlib, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tierloom.adapters import smollm2
from tierloom.adapters.transformers import Kept

config, url, retrieve = sys.argv[1], sys.argv[2], sys.argv[3] == "load"
torch.set_num_threads(1)
folder = smollm2.model_dir(progress=False)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
text = "The observatory stands on a hill above the town, and its mirror is wide. " * 45
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :600]
names = {"tiers.cold.url": url, "tiers.cold.timeout": "20 s", "tiers.hot.capacity": "64 MiB"}
names |= {"graphs.store.deadline": "60 s", "graphs.retrieve.deadline": "60 s"}
with Kept(model, config=config, overrides=names) as kept:
    cache = kept.cache(ids, retrieve=retrieve, store=not retrieve)
    had = cache.get_seq_length()
    with torch.no_grad():
        said = model(ids[:, had:], past_key_values=cache).logits[0, -1].argmax().item()
    kept.flush()
    digest = hashlib.sha256()
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            digest.update(part[:, :, :512].contiguous().view(torch.uint8).numpy().tobytes())
    tiers = kept.pipe.stats()["tiers"]
    print(json.dumps({"had": had, "said": said, "digest": digest.hexdigest(),
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


@pytest.mark.parametrize("kind", ["redis", "tcp", "shared"])
def test_what_one_process_stored_another_has(tmp_path: Path, kind: str) -> None:
    with store(kind, tmp_path) as (config, url):
        one, two = (run(config, url, what) for what in ("store", "load"))
    assert (one["had"], one["puts"]) == (0, 3)
    assert two["had"] == 512, "of servers, whole chunks are asked"
    assert two["hits"] == 2
    assert one["digest"] == two["digest"]
    assert one["said"] == two["said"]


def run(config: str, url: str, what: str) -> dict[str, object]:
    source = Path(__file__).resolve().parent.parent.parent / "src"
    env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, config, url, what], env=env, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found
