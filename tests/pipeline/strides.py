"""Caches as engines lay them out: every order, and every way in which tensors share memory.

As a program: opens pipelines over caches in memory that nobody may write, and stores from them.
Whoever writes there ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tierloom import KVLayout

sys.path.insert(0, str(Path(__file__).parent))

WAYS = ("plain", "padded", "together", "turned")
"""One tensor after another; gaps inside of blocks; all layers of a block side by side; a token's
heads apart where the order says together, and the other way round."""
LAYERS, BLOCKS, BLOCK = 3, 12, 16


def cases() -> Iterator[tuple[str, str]]:
    from conftest import SHAPES

    for order in SHAPES:
        for way in WAYS:
            if way == "together" and not order.startswith("B"):
                continue
            if way == "turned" and not {"N", "H"} <= set(order.removesuffix("-KT")):
                continue
            if way == "turned" and order == "BHNC-KT":  # a block is a block there
                continue
            yield order, way


def caches(order: str, way: str, raw: torch.Tensor) -> tuple[KVLayout, list[Any]]:
    """Tensors in `raw`, int16: bytes enough for all."""
    from conftest import SHAPES

    shape = list(SHAPES[order](BLOCKS, BLOCK, 2, 8))
    many = LAYERS * (2 if order in ("BNHD", "BHND", "SHD") else 1)
    letters = order.removesuffix("-KT")
    held = list(shape)
    if way == "padded":
        held[letters.index("H" if "H" in letters else "N")] += 1
    if way == "turned":
        n, h = letters.index("N"), letters.index("H")
        held[n], held[h] = held[h], held[n]
    size = int(np.prod(held))
    if way == "together":
        flat = raw[: many * size].view(held[0], many, *held[1:])
        made = [flat[:, i] for i in range(many)]
    else:
        made = [raw[i * size : (i + 1) * size].view(held) for i in range(many)]
    if way == "padded":
        made = [t[tuple(slice(n) for n in shape)] for t in made]
    if way == "turned":
        made = [t.transpose(n, h) for t in made]
    made = [t.view(torch.bfloat16) for t in made]
    layers: list[Any] = list(zip(made[::2], made[1::2], strict=True)) if many > LAYERS else made
    pool = BLOCK if order == "SHD" else None
    return KVLayout.from_tensors(layers, order=order, block_tokens=pool), layers


def words(order: str, way: str) -> int:
    """int16 words that `caches` needs."""
    return 2 * LAYERS * BLOCKS * (BLOCK + 1) * 3 * 16


def store_from_memory_that_nobody_may_write() -> None:
    from conftest import config, tokens

    import tierloom

    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for order, way in cases():
        held = mmap.mmap(-1, -(-2 * words(order, way) // mmap.PAGESIZE) * mmap.PAGESIZE)
        raw = torch.frombuffer(held, dtype=torch.int16)
        raw.copy_(torch.from_numpy(np.random.default_rng(0).integers(0, 99, len(raw), np.int16)))
        layout, layers = caches(order, way, raw)
        assert not protect(ctypes.c_void_p(raw.data_ptr()), len(held), mmap.PROT_READ)
        for by in ("request", "layer"):
            for kept in ("native", "canonical") if layout.dense_blocks else ("canonical",):
                source = config(order=kept, graphs__store__pace={"by": by})
                with tierloom.open(source, layout=layout, model="m") as pipe:
                    assert pipe.off is None, (order, way, pipe.off)
                    ids, slots = tokens(128), np.arange(128)
                    ticket = pipe.begin_store(ids, layers, slots)
                    for i in range(LAYERS):
                        ticket.layer_done(i)
                    assert ticket.wait(30).tokens == 128
                    assert pipe.store(tokens(64, 1), layers, slots, layout=layout).wait(30).tokens
                    assert pipe.lookup(ids) == 128
        print(order, way, flush=True)


if __name__ == "__main__":
    store_from_memory_that_nobody_may_write()
