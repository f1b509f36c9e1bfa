"""Access to bare addresses inside numba code: what C writes as `*(u32 *)p`, memcpy and memset.

Addresses are uint64, nothing is checked and nothing is owned; little-endian machines only, as
everywhere in tierloom. These are LLVM intrinsics, so they are inlined and hold no GIL.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I1, _I8, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(64)


@intrinsic
def load8(typing, address):
    """The byte at `address`, as uint64."""
    return types.uint64(types.uint64), _load(8)


@intrinsic
def load32(typing, address):
    """The four bytes at `address` (any alignment), as uint64."""
    return types.uint64(types.uint64), _load(32)


@intrinsic
def load64(typing, address):
    """The eight bytes at `address` (any alignment), as uint64."""
    return types.uint64(types.uint64), _load(64)


@intrinsic
def move8(typing, to, source):
    """Copy one byte."""
    return types.void(types.uint64, types.uint64), _move(8)


@intrinsic
def move16(typing, to, source):
    """Copy two bytes, any alignment."""
    return types.void(types.uint64, types.uint64), _move(16)


@intrinsic
def move32(typing, to, source):
    """Copy four bytes, any alignment."""
    return types.void(types.uint64, types.uint64), _move(32)


@intrinsic
def move64(typing, to, source):
    """Copy eight bytes, any alignment."""
    return types.void(types.uint64, types.uint64), _move(64)


@intrinsic
def copy_bytes(typing, to, source, nbytes):
    """memcpy: the two ranges must not overlap."""

    def generate(context, builder, signature, args):
        to, source, nbytes = args
        pointer = _I8.as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, _I64])
        to, source = builder.inttoptr(to, pointer), builder.inttoptr(source, pointer)
        builder.call(memcpy, [to, source, nbytes, _I1(0)])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64), generate


@intrinsic
def zero_bytes(typing, to, nbytes):
    """memset to zero."""

    def generate(context, builder, signature, args):
        to, nbytes = args
        pointer = _I8.as_pointer()
        memset = builder.module.declare_intrinsic("llvm.memset", [pointer, _I64])
        builder.call(memset, [builder.inttoptr(to, pointer), _I8(0), nbytes, _I1(0)])
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64), generate


def _load(bits: int):
    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
        value = builder.load(pointer, align=1)
        return value if bits == 64 else builder.zext(value, _I64)

    return generate


def _move(bits: int):
    def generate(context, builder, signature, args):
        pointer = ir.IntType(bits).as_pointer()
        value = builder.load(builder.inttoptr(args[1], pointer), align=1)
        builder.store(value, builder.inttoptr(args[0], pointer), align=1)
        return context.get_dummy_value()

    return generate
