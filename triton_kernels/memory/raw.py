"""Access to bare addresses inside numba code: what C writes as `*(u32 *)p`, memcpy and memset.

Addresses are uint64, nothing is checked and nothing is owned; little-endian machines only, as
everywhere in tierloom. These are LLVM intrinsics, so they are inlined and hold no GIL.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils

intrinsic: Any = numba.extending.intrinsic
"""numba's, without its type, by which nothing could call an intrinsic."""

_I1, _I8, _I32, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE = 64
_LINE_VECTOR = ir.VectorType(_I64, _LINE // 8)


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
def stream_lines(typing, to, source, nbytes):
    """memcpy past the caches; `to` and `nbytes` are multiples of 64, `source` is anything.

    A plain store first reads the line that it will overwrite, a third of the copy's memory
    traffic, and evicts what the engine was using. Other threads may see these stores late:
    call `publish` before telling them.
    """

    def generate(context, builder, signature, args):
        to, source, nbytes = args
        for unroll in (4, 1):
            step = _I64(unroll * _LINE)
            done = builder.mul(builder.sdiv(nbytes, step), step)
            with cgutils.for_range_slice(builder, _I64(0), done, step) as (offset, _):
                offsets = [builder.add(offset, _I64(i * _LINE)) for i in range(unroll)]
                lines = [_line(builder, source, at, None) for at in offsets]
                for at, line in zip(offsets, lines, strict=True):
                    _line(builder, to, at, line)
            to, source = builder.add(to, done), builder.add(source, done)
            nbytes = builder.sub(nbytes, done)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64), generate


def _line(builder, base, offset, value):
    """Load a line, or store `value` there without caching it."""
    pointer = builder.inttoptr(builder.add(base, offset), _LINE_VECTOR.as_pointer())
    if value is None:
        return builder.load(pointer, align=1)
    store = builder.store(value, pointer, align=_LINE)
    store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
    return store


@intrinsic
def prefetch(typing, address):
    """Have the line at `address` brought near; any address will do."""

    def generate(context, builder, signature, args):
        pointer = _I8.as_pointer()
        call = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        fn = cgutils.get_or_insert_function(builder.module, call, "llvm.prefetch.p0i8")
        builder.call(fn, [builder.inttoptr(args[0], pointer), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def publish(typing):
    """Let every store before this call be seen before any after it."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


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
