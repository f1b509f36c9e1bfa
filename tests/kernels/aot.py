"""Compile kernels for GPUs that are not here, and measure what came out.

Triton's wheel carries ptxas, cuobjdump, nvdisasm and LLVM's AMDGPU backend, so a machine with
neither GPU nor toolkit sees real machine code: registers, spills and access widths. It cannot
see speed, races or misaligned addresses.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GCN_BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
    "ubyte": 8,
    "sbyte": 8,
    "byte": 8,
}


@dataclass(frozen=True)
class Kernel:
    """A variant to compile: pointers are 16-byte aligned, as the launcher would find them."""

    fn: Any
    signature: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    warps: int = 4


@dataclass(frozen=True)
class Report:
    registers: int
    """Per thread; vector registers on AMD."""
    instructions: int
    spills: int
    """Instructions that touch, or bytes of, memory local to a thread."""
    load_bits: frozenset[int]
    store_bits: frozenset[int]
    loop: int = 0
    """Instructions of the longest loop, on NVIDIA: what a warp pays for one turn, at least."""


def compile_for(kernel: Kernel, target: str) -> Report:
    names = kernel.fn.arg_names
    types = {n: "constexpr" if n in kernel.constants else kernel.signature[n] for n in names}
    aligned = [i for i, n in enumerate(names) if types[n].startswith("*")]
    source = ASTSource(
        fn=kernel.fn,
        signature=types,
        constexprs={(names.index(n),): value for n, value in kernel.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": kernel.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "cuda":
        return _read_cubin(compiled.asm["cubin"])
    return _read_gcn(compiled.asm["amdgcn"])


def _read_cubin(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Report(
        registers=int(found[1]),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        spills=int(found[2]) + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        load_bits=_sass_bits(sass, "LDG"),
        store_bits=_sass_bits(sass, "STG"),
        loop=_longest_loop(sass),
    )


def _run(tool: str, *args: str) -> str:
    command = [str(BIN / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _longest_loop(sass: str) -> int:
    """From a label to the last branch that goes back to it."""
    labels: dict[str, int] = {}
    longest = count = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


def _sass_bits(sass: str, op: str) -> frozenset[int]:
    widths = set()
    for suffixes in re.findall(rf"\b{op}((?:\.[A-Z0-9_]+)*)", sass):
        explicit = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
        widths.add(int(explicit[1]) if explicit else 32)
    return frozenset(widths)


def _read_gcn(asm: str) -> Report:
    def usage(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", asm)
        assert found, key
        return int(found[1])

    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return Report(
        registers=usage("vgpr_count"),
        instructions=len(re.findall(r"^\t(?:[sv]|global|buffer|flat|ds)_", asm, re.MULTILINE)),
        spills=sum(usage(key) for key in spills),
        load_bits=_gcn_bits(asm, "load"),
        store_bits=_gcn_bits(asm, "store"),
    )


def _gcn_bits(asm: str, op: str) -> frozenset[int]:
    suffixes = re.findall(rf"\b(?:global|flat|buffer)_{op}_([a-z]+(?:(?<=x)\d)?)", asm)
    return frozenset(GCN_BITS[suffix] for suffix in suffixes)
