"""The ahead-of-time gate: every kernel compiles for every target, within its budget.

After a change that means to alter the machine code:
    TIERLOOM_REWRITE_BASELINE=1 python -m pytest tests/kernels/test_aot.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import triton
from aot import TARGETS, Kernel, compile_for

from tierloom.triton_kernels.blend.attention_triton import (
    KEYS as ATTENDED_KEYS,
    ROWS as ATTENDING_ROWS,
    WARPS as ATTENDING_WARPS,
    blend_attention,
)
from tierloom.triton_kernels.blend.deviation_triton import (
    ROWS as DEVIATING_ROWS,
    WIDTH as DEVIATING_WIDTH,
    squares,
)
from tierloom.triton_kernels.blend.probe_triton import KEYS, QUERIES, WARPS, probe
from tierloom.triton_kernels.blend.triton import (
    ELEMENTS as TURNED_ELEMENTS,
    NARROW_ELEMENTS,
    scatter_turned,
)
from tierloom.triton_kernels.cachegen.symbols_triton import (
    ELEMENTS as SYMBOL_ELEMENTS,
    check_escapes,
    choose_tables,
    to_symbols,
)
from tierloom.triton_kernels.cachegen.triton import (
    ELEMENTS as CACHEGEN_ELEMENTS,
    TOGETHER,
    WIDTH,
    decode_pages,
    encode_pages,
    moments,
)
from tierloom.triton_kernels.exponent.triton import ELEMENTS as SPLIT_ELEMENTS, exponents
from tierloom.triton_kernels.memory.launch import tile_for
from tierloom.triton_kernels.paged_copy.triton import paged_copy
from tierloom.triton_kernels.quantize.triton import (
    ELEMENTS,
    channel_means,
    fp8_groups,
    int4_groups,
    int8_groups,
)
from tierloom.triton_kernels.rans.triton import rans_compact, rans_decode, rans_encode
from tierloom.triton_kernels.turboquant.triton import hadamard

BASELINE = Path(__file__).with_name("aot_baseline.json")
REWRITE = os.environ.get("TIERLOOM_REWRITE_BASELINE") == "1"
MOST_REGISTERS = 128
MOST_ATTENDING = {"cuda": 160, "hip": 256}
"""Of a kernel that multiplies matrices and keeps the sums of all it has seen: room for 3 programs
of 4 warps, or 2 waves."""
GROWTH = {"registers": 1.25, "instructions": 1.25, "loop": 1.1}


def copy_of(
    heads: int, head_bytes: int, *, gather: bool,
    block_tokens: int = 16, wide: bool = True, narrow: bool = False,
) -> Kernel:  # fmt: skip
    """As `launch_paged_copy` would have it compiled."""
    tile = tile_for("cuda", heads * head_bytes, narrow=narrow)
    assert tile == tile_for("hip", heads * head_bytes, narrow=narrow)
    return Kernel(
        paged_copy,
        {"planes": "*i64", "frames": "*i64", "slots": "*i64", "layers": "i32"},
        {
            "KV": 2,
            "BLOCK_TOKENS": block_tokens,
            "HEADS": heads,
            "HEAD_BYTES": head_bytes,
            "ITEMSIZE": 2,
            "HAS_WIDE": wide,
            "HAS_NARROW": narrow,
            "GATHER": gather,
            "TILE_ROWS": tile.rows,
            "TILE_BYTES": tile.nbytes,
        },
        warps=tile.warps,
    )


def both(name: str, heads: int, head_bytes: int, **kwargs: Any) -> dict[str, Kernel]:
    return {
        f"{name} {way}": copy_of(heads, head_bytes, gather=way == "gather", **kwargs)
        for way in ("gather", "scatter")
    }


def coder(fn: Any, lanes: int) -> Kernel:
    """A rANS coder: int32 shapes that are not specialised, as its launcher says."""
    types = {
        "counts": "*u32", "decode": "*u8", "ends": "*i64", "freq_cdf": "*u32", "scratch": "*u16",
        "states": "*u32", "status": "*u8", "symbols": "*u8", "tabid": "*u8", "table": "*i64",
        "words": "*u16",
    }  # fmt: skip
    constants = {"WORDS": 4096} if fn is rans_compact else {"LANES": lanes, "BITS": 11}
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    return Kernel(fn, signature, constants, warps=4 if fn is rans_compact else 1)


def quantizer(fn: Any, constants: dict[str, Any]) -> Kernel:
    """A quantizer of bfloat16, 4 layers of 8 heads of 128."""
    types = {
        "x": "*i16", "scales": "*fp32" if fn is fp8_groups else "*i16", "means": "*i16",
        "steps": "*i16", "gains": "*i16", "signs": "*fp32", "y": "*fp32", "bad": "*i32",
        "codes": "*i8" if fn is int8_groups else "*u8",
    }  # fmt: skip
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    return Kernel(fn, signature, {"KIND": 0, **constants})


def quantizers() -> dict[str, Kernel]:
    """Both ways of each, as launched."""
    rows, heads = ELEMENTS // 128, {"HEADS": 8, "DIM": 128, "BLOCK": 128, "ROWS": ELEMENTS // 128}
    int4 = {"CHANNELS": 1024, "GROUPS": 32, "GROUP": 32, "ROWS": ELEMENTS // 32}
    made = {"channel means": quantizer(channel_means, {"BLOCK": 128})}
    for way, encode in (("encode", True), ("decode", False)):
        one = {"ENCODE": encode}
        wide = {"WIDTH": 128, "BLOCK": 128, "ROWS": rows}
        made[f"int8 {way}"] = quantizer(int8_groups, one | wide)
        made[f"fp8 {way}"] = quantizer(fp8_groups, one | heads)
        made[f"int4 {way}"] = quantizer(int4_groups, one | int4)
        turn = {"BACK": not encode, "DIM": 128, "STEPS": 7, "ROWS": rows}
        made[f"Hadamard {way}"] = quantizer(hadamard, turn)
    return made


def splitter(shift: int, *, split: bool) -> Kernel:
    """Splits or merges 16-bit floats; a frame's elements are a multiple of 16."""
    types = {"x": "*i16", "symbols": "*u8", "rest": "*u8", "table": "*u8" if split else "*i16"}
    signature = {name: types.get(name, "i32") for name in exponents.arg_names}
    constants = {"SHIFT": shift, "SPLIT": split, "EVEN": True, "SIZE": SPLIT_ELEMENTS}
    return Kernel(exponents, signature, constants)


def cachegen(fn: Any, constants: dict[str, Any], warps: int = 4) -> Kernel:
    types = {
        "planes": "*i64", "frames": "*i64", "slots": "*i64", "sites": "*i64", "to": "*i64",
        "cos": "*fp32", "sin": "*fp32", "means": "*fp64" if fn is moments else "*fp32",
        "steps": "*fp32", "spreads": "*fp64", "bad": "*i32", "tabid": "*u8", "reach": "*i32",
        "places": "*u32", "values": "*i32", "found": "*i32", "costs": "*i32",
    }  # fmt: skip
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    return Kernel(fn, signature, constants, warps=warps)


def cachegens() -> dict[str, Kernel]:
    """bfloat16, 8 heads of 128 that are turned, as launched."""
    tile = {"ROWS": CACHEGEN_ELEMENTS // WIDTH, "WIDTH": WIDTH}
    none = dict.fromkeys(("tabid", "reach", "places", "values", "found"))
    made = {
        "cachegen choose tables": cachegen(
            choose_tables, {"CHANNELS": 1024, "TABLES": 64, "WIDTH": 16}
        ),
        "cachegen symbols": cachegen(
            to_symbols, {"CHANNELS": 1024, "ROWS": SYMBOL_ELEMENTS // 512, "WIDTH": 512}
        ),
        "cachegen check escapes": cachegen(check_escapes, {"CHANNELS": 1024, "SIZE": 1024}),
    }
    for name, heads, narrow in (("NHD", 1, False), ("HND", 8, False), ("K transposed", 8, True)):
        place = {
            "KV": 2, "BLOCK_TOKENS": 16, "HEADS": heads, "HEAD": 1024 // heads, "KIND": 0,
            "DIM": 128, "HALF": 64, "HAS_WIDE": True, "HAS_NARROW": narrow,
        }  # fmt: skip
        encode = place | tile
        made[f"cachegen encode {name}"] = cachegen(encode_pages, encode | {"SYMBOLS": True})
        made[f"cachegen q {name}"] = cachegen(encode_pages, encode | {"SYMBOLS": False} | none)
        made[f"cachegen decode {name}"] = cachegen(decode_pages, place | tile)
        both = {"WIDTH": 128, "TOGETHER": TOGETHER}
        made[f"cachegen moments {name}"] = cachegen(moments, place | both, warps=1)
    return made


def blended(
    heads: int, head: int, *, dim: int = 128, first: int = 0, half: int = 64, kv: int = 2,
    narrow: bool = False, neighbors: bool = False,
) -> Kernel:  # fmt: skip
    """bfloat16, as `launch_scatter_turned` would have it compiled."""
    many = NARROW_ELEMENTS if narrow else TURNED_ELEMENTS
    types = {
        "planes": "*i64", "frames": "*i64", "slots": "*i64", "layers": "i32", "at": "*i32",
        "cos": "*fp32", "sin": "*fp32",
    }  # fmt: skip
    constants = {
        "KV": kv, "BLOCK_TOKENS": 16, "HEADS": heads, "HEAD": head, "KIND": 0, "HAS_WIDE": True,
        "HAS_NARROW": narrow, "DIM": dim, "FIRST": first, "HALF": half, "NEIGHBORS": neighbors,
        "ROWS": many // triton.next_power_of_2(dim),
    }  # fmt: skip
    return Kernel(scatter_turned, types, constants)


TURNED = {
    f"K turned, {name}": blended(**how)
    for name, how in {
        "NHD 8x128": {"heads": 1, "head": 1024},
        "NHD 8x128, neighbors": {"heads": 1, "head": 1024, "neighbors": True},
        "NHD 3x64": {"heads": 1, "head": 192, "dim": 64, "half": 32},
        "NHD 8x128, a quarter": {"heads": 1, "head": 1024, "half": 16},
        "HND 8x128": {"heads": 8, "head": 128},
        "MLA 576": {
            "heads": 1, "head": 576, "dim": 576, "first": 512, "half": 32, "kv": 1,
        },
        "K transposed": {"heads": 8, "head": 128, "narrow": True},
    }.items()
}  # fmt: skip


def probing(heads: int, head: int, *, sums: bool) -> Kernel:
    """bfloat16, 8 heads of 128 for 32 of queries."""
    types = {
        "plane": "*i64", "slots": "*i64", "queries": "*bf16", "positions": "*i64", "sums": "*fp32",
        "paid": "*fp32", "scale": "fp32",
    }  # fmt: skip
    constants = {
        "BLOCK_TOKENS": 16, "HEADS": heads, "HEAD": head, "WIDE": True, "DIM": 128, "GROUP": 4,
        "WIDEN": False, "SUMS": sums, "QUERIES": QUERIES, "KEYS": KEYS,
    }  # fmt: skip
    signature = {name: types.get(name, "i32") for name in probe.arg_names}
    return Kernel(probe, signature, constants, warps=WARPS)


def reading(
    fn: Any, heads: int, head: int, *, dim: int = 128, group: int = 4, warps: int = 4
) -> Kernel:
    """bfloat16: chosen tokens' attention, or deviations, as launched."""
    place = {"BLOCK_TOKENS": 16, "HEADS": heads, "HEAD": head, "WIDE": True}
    types = {
        "planes": "*i64", "keys": "*i64", "values": "*i64", "slots": "*i64", "queries": "*bf16",
        "positions": "*i64", "got": "*fp32", "sums": "*fp32", "scale": "fp32", "fresh": "*i16",
        "found": "*fp32",
    }  # fmt: skip
    constants = {"KIND": 0, "ROWS": DEVIATING_ROWS, "WIDTH": DEVIATING_WIDTH}
    if fn is blend_attention:
        constants = {"DIM": dim, "GROUP": group, "WIDEN": False}
        constants |= {"ROWS": ATTENDING_ROWS, "KEYS": ATTENDED_KEYS}
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    return Kernel(fn, signature, place | constants, warps=warps)


READING = {
    "blend attention NHD 8x128": reading(blend_attention, 1, 1024, warps=ATTENDING_WARPS),
    "blend attention HND 8x128": reading(blend_attention, 8, 128, warps=ATTENDING_WARPS),
    "blend attention NHD 3x64": reading(
        blend_attention, 1, 192, dim=64, group=3, warps=ATTENDING_WARPS
    ),
    "deviation NHD 8x128": reading(squares, 1, 1024),
    "deviation HND 8x128": reading(squares, 8, 128),
}
PROBES = {
    f"probe {name}, {what}": probing(*how, sums=what == "sums")
    for name, how in (("NHD", (1, 1024)), ("HND", (8, 128)))
    for what in ("sums", "scores")
}
CACHEGEN = cachegens()
QUANTIZERS = quantizers()
SPLITTERS = {
    f"{name} {way}": splitter(shift, split=way == "split")
    for name, shift in (("bf16", 6), ("fp16", 8))
    for way in ("split", "merge")
}
WIDE = {
    **both("NHD 8x128", 1, 2048),
    **both("NHD 3x64", 1, 384),
    **both("HND 8x128", 8, 256),
    **both("MLA 576", 1, 1152),
    **both("blocks of 32 KiB", 1, 32768, block_tokens=1),
    **both("K transposed", 8, 256, narrow=True),
}
OTHERS = {
    **both("all transposed", 8, 256, wide=False, narrow=True),
    "rANS compact": coder(rans_compact, 0),
}
CODERS = {
    f"rANS {fn.__name__.removeprefix('rans_')}, {lanes} lanes": coder(fn, lanes)
    for fn in (rans_encode, rans_decode)
    for lanes in (8, 16, 32)
}
"""Their loops are what they cost: an instruction more in ten is too many."""
MOST_PER_SYMBOL = 2.0
"""Instructions of a warp for each symbol, where it has 32 lanes, whatever was accepted before."""

KERNELS = WIDE | OTHERS | CODERS | QUANTIZERS | SPLITTERS | CACHEGEN | TURNED | PROBES | READING


@pytest.fixture(scope="module")
def baseline():
    """What the last accepted compilation gave; rewritten on request when the module is done."""
    kept = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"triton": None}
    if not REWRITE:
        yield kept
        return
    fresh: dict[str, object] = {"triton": triton.__version__}
    yield fresh
    BASELINE.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*KERNELS])
def test_gate(name: str, target: str, baseline: dict) -> None:
    report = compile_for(KERNELS[name], target)
    assert report.spills == 0, report
    most = MOST_REGISTERS
    if "attention" in name:
        most = MOST_ATTENDING[TARGETS[target].backend]
    elif name in PROBES and target == "gfx942":
        most += 16  # accumulators, which are counted with the rest there
    assert report.registers <= most, report
    if name in WIDE | TURNED:
        assert 128 in report.load_bits, report
        assert 128 in report.store_bits, report
    if name in TURNED and not name.endswith(("transposed", "MLA 576")):
        assert min(report.load_bits) >= 32, report
        assert min(report.store_bits) >= 32, report
    if name in PROBES | READING or (name in QUANTIZERS and name != "channel means"):
        assert 128 in report.load_bits, report
    if name in SPLITTERS:
        moved = report.load_bits if "split" in name else report.store_bits
        assert 128 in moved, report
    if name in CACHEGEN and name.endswith(("NHD", "HND")) and target != "gfx942":
        assert min(report.load_bits) >= 32, report  # partners, cosines and sines as vectors, too
        if "moments" not in name:
            assert 128 in (report.store_bits if "decode" in name else report.load_bits), report

    cost = {"registers": report.registers, "instructions": report.instructions}
    if name in CODERS and target != "gfx942":
        assert report.loop > 40, report  # or it was not found
        cost["loop"] = report.loop
        assert report.loop <= MOST_PER_SYMBOL * 32, report
    if REWRITE:
        baseline.setdefault(name, {})[target] = cost
        return
    if baseline["triton"] != triton.__version__:
        pytest.skip(f"baseline is of triton {baseline['triton']}: only the budget was checked")
    for what, value in cost.items():
        assert value <= baseline[name][target][what] * GROWTH[what], (what, report)


def test_gate_sees_lost_vectors() -> None:
    """The same copy, told that nothing is a multiple of 16 bytes, has no 128-bit access."""
    narrow = compile_for(copy_of(1, 2048, gather=True, wide=False, narrow=True), "sm_90")
    assert 128 not in narrow.load_bits
