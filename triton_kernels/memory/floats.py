"""Small floats inside numba code: loads, stores and magnitudes of bf16, fp16, fp32 and e4m3.

numba has neither bfloat16 nor float16 on a CPU, so arrays hold their bits, and the array's type
says which they are: uint16 is bfloat16, int16 is float16, uint32 is float32, uint8 is e4m3fn.
All conversions round half to even, as GPUs do, and saturate at the largest finite number. They are
written as LLVM integer code without branches, so that loops over them become vectors everywhere.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tierloom.triton_kernels.memory.raw import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_SIGN = 0x80000000
_INFINITE = {types.uint16: 0x7F80, types.int16: 0x7C00, types.uint32: 0x7F800000}
"""Magnitudes from here on are no finite numbers."""
_MOST = {types.uint16: 0x7F7F0000, types.int16: 0x477FE000, types.uint32: 0x7F7FFFFF}
"""The largest finite number of each type, as float32 bits."""


@intrinsic
def to_float(typing, bits):
    """A bfloat16, float16, float32 or e4m3fn as float32: exact."""

    def generate(context, builder, signature, args):
        return _READ[bits](_Code(builder), args[0])

    return types.float32(bits), generate


@intrinsic
def to_bits(typing, value, like):
    """float32 to the type of `like`: half to even, saturating; NaN becomes some number."""

    def generate(context, builder, signature, args):
        return _WRITE[like](_Code(builder), args[0])

    return like(types.float32, like), generate


@intrinsic
def magnitude(typing, bits):
    """The same without its sign, still as bits: they order as the numbers do."""

    def generate(context, builder, signature, args):
        width = bits.bitwidth
        return builder.and_(args[0], ir.Constant(ir.IntType(width), (1 << (width - 1)) - 1))

    return bits(bits), generate


@intrinsic
def infinite(typing, bits):
    """Whether a magnitude is not a finite number."""

    def generate(context, builder, signature, args):
        limit = ir.Constant(ir.IntType(bits.bitwidth), _INFINITE[bits])
        return builder.icmp_unsigned(">=", args[0], limit)

    return types.boolean(bits), generate


@intrinsic
def as_like(typing, value, like):
    """An integer cut down to the type of `like`."""

    def generate(context, builder, signature, args):
        width = like.bitwidth
        same = value.bitwidth == width
        return args[0] if same else builder.trunc(args[0], ir.IntType(width))

    return like(value, like), generate


@intrinsic
def extremes(typing, y):
    """The least and the greatest of a float32 array's first 32, both taken to reach zero.

    One vector's reduction, where a loop would be unrolled into 64 compares. Compared as integers,
    whose order is that of positive floats and, unsigned, the reverse of negative ones'.
    """

    def generate(context, builder, signature, args):
        data = context.make_array(y)(context, builder, args[0]).data
        vector = ir.VectorType(_I32, 32)
        bits = builder.load(builder.bitcast(data, vector.as_pointer()), align=4)

        def reduced(kind: str, zero: str):
            name = f"llvm.vector.reduce.{kind}max.v32i32"
            call = ir.FunctionType(_I32, [vector])
            fn = cgutils.get_or_insert_function(builder.module, call, name)
            best = builder.call(fn, [bits])
            beyond = builder.icmp_signed(zero, best, ir.Constant(_I32, 0))
            return builder.bitcast(builder.select(beyond, best, ir.Constant(_I32, 0)), _F32)

        pair = reduced("u", "<"), reduced("s", ">")
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(types.float32, 2)(y), generate


def pair_turner(lanes: int, interleaved: bool):
    """A call that turns `lanes` pairs of numbers: ``(u cos - v sin, v cos + u sin)``.

    ``(to, source, apart, cos, sin, like)``: addresses, of bits like `like` and of float32. Second
    numbers of the pairs lie `apart` bytes behind the first, or interleaved. `to` may be `source`.
    Vectors by hand: of a loop, compilers would first ask whether its arrays overlap, head by head.
    """

    @intrinsic
    def turn_pairs(typing, to, source, apart, cos, sin, like):
        def generate(context, builder, signature, args):
            code, (to, source, apart, *angles, _) = _Code(builder, lanes), args
            bits = code.of(ir.IntType(like.bitwidth))

            def at(address, kind):
                return builder.inttoptr(address, kind.as_pointer())

            def picked(a, b, order):
                mask = ir.Constant(
                    ir.VectorType(_I32, len(order)), [ir.Constant(_I32, i) for i in order]
                )
                return builder.shuffle_vector(a, b, mask)

            if interleaved:
                both = ir.VectorType(bits.element, 2 * lanes)
                x = builder.load(at(source, both), align=1)
                pair = [picked(x, x, range(k, 2 * lanes, 2)) for k in (0, 1)]
            else:
                firsts = source, builder.add(source, apart)
                pair = [builder.load(at(first, bits), align=1) for first in firsts]
            u, v = (_READ[like](code, x) for x in pair)
            c, s = (builder.load(at(angle, code.f32), align=4) for angle in angles)
            a = builder.fsub(builder.fmul(u, c), builder.fmul(v, s))
            b = builder.fadd(builder.fmul(v, c), builder.fmul(u, s))
            a, b = _WRITE[like](code, a), _WRITE[like](code, b)
            if interleaved:
                order = [i // 2 + i % 2 * lanes for i in range(2 * lanes)]
                builder.store(picked(a, b, order), at(to, both), align=1)
            else:
                builder.store(a, at(to, bits), align=1)
                builder.store(b, at(builder.add(to, apart), bits), align=1)
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 5, like), generate

    return turn_pairs


class _Code:
    """LLVM's builder, with constants as plain numbers; with `lanes`, for vectors of as many."""

    def __init__(self, builder, lanes: int = 0) -> None:
        self.b, self.lanes = builder, lanes
        types = (_I8, _I16, _I32, _F32)
        self.i8, self.i16, self.i32, self.f32 = (self.of(t) for t in types)

    def of(self, scalar):
        return ir.VectorType(scalar, self.lanes) if self.lanes else scalar

    def c(self, value: int):
        return self._constant(self.i32, value & 0xFFFFFFFF)

    def f(self, value: float):
        return self._constant(self.f32, value)

    def _constant(self, kind, value):
        return ir.Constant(kind, [value] * self.lanes if self.lanes else value)

    def read_bf16(self, bits):
        wide = self.b.zext(bits, self.i32)
        return self.b.bitcast(self.b.shl(wide, self.c(16)), self.f32)

    def write_bf16(self, value):
        bits = self._clamped(value, _MOST[types.uint16])
        odd = self.b.and_(self.b.lshr(bits, self.c(16)), self.c(1))
        return self.b.trunc(
            self.b.lshr(self.b.add(bits, self.b.add(odd, self.c(0x7FFF))), self.c(16)), self.i16
        )

    def read_fp16(self, bits):
        wide = self.b.zext(bits, self.i32)
        sign = self.b.shl(self.b.and_(wide, self.c(0x8000)), self.c(16))
        small = self.b.and_(wide, self.c(0x7FFF))
        normal = self.b.add(self.b.shl(small, self.c(13)), self.c(112 << 23))
        return self._either(small, 0x400, normal, 2.0**-24, sign)

    def write_fp16(self, value):
        bits = self._clamped(value, _MOST[types.int16])
        sign = self.b.and_(bits, self.c(_SIGN))
        size = self.b.xor(bits, sign)
        code = self._rounded(size, 13, 112, 0.5)
        return self.b.trunc(self.b.or_(code, self.b.lshr(sign, self.c(16))), self.i16)

    def read_fp32(self, bits):
        return self.b.bitcast(bits, self.f32)

    def write_fp32(self, value):
        return self._clamped(value, _MOST[types.uint32])

    def read_e4m3(self, bits):
        wide = self.b.zext(bits, self.i32)
        sign = self.b.shl(self.b.and_(wide, self.c(0x80)), self.c(24))
        small = self.b.and_(wide, self.c(0x7F))
        normal = self.b.add(self.b.shl(small, self.c(20)), self.c(120 << 23))
        return self._either(small, 8, normal, 2.0**-9, sign)

    def write_e4m3(self, value):
        bits = self._clamped(value, 0x43E00000)  # 448
        sign = self.b.and_(bits, self.c(_SIGN))
        code = self._rounded(self.b.xor(bits, sign), 20, 120, 2.0**14)
        return self.b.trunc(self.b.or_(code, self.b.lshr(sign, self.c(24))), self.i8)

    def _clamped(self, value, most):
        """Bits of `value`, its magnitude at most that of the float32 bits `most`."""
        bits = self.b.bitcast(value, self.i32)
        sign = self.b.and_(bits, self.c(_SIGN))
        size = self.b.xor(bits, sign)
        over = self.b.icmp_unsigned(">", size, self.c(most))
        return self.b.or_(self.b.select(over, self.c(most), size), sign)

    def _rounded(self, size, drop, bias, magic):
        """A float32 magnitude to one with `drop` fewer bits and an exponent `bias` lower."""
        odd = self.b.and_(self.b.lshr(size, self.c(drop)), self.c(1))
        up = self.b.add(self.b.add(size, odd), self.c((1 << (drop - 1)) - 1 - (bias << 23)))
        normal = self.b.lshr(up, self.c(drop))
        # Below the least normal number an addition rounds: its last bit is the one to keep.
        added = self.b.fadd(self.b.bitcast(size, self.f32), self.f(magic))
        added = self.b.bitcast(added, self.i32)
        tiny = self.b.sub(added, self.b.bitcast(self.f(magic), self.i32))
        return self.b.select(
            self.b.icmp_unsigned("<", size, self.c((bias + 1) << 23)), tiny, normal
        )

    def _either(self, small, least, normal, unit, sign):
        """`small` units where it is less than `least`, else the bits `normal`; then the sign."""
        tiny = self.b.fmul(self.b.uitofp(small, self.f32), self.f(unit))
        size = self.b.select(
            self.b.icmp_unsigned("<", small, self.c(least)), self.b.bitcast(tiny, self.i32), normal
        )
        return self.b.bitcast(self.b.or_(size, sign), self.f32)


_READ = {
    types.uint16: _Code.read_bf16,
    types.int16: _Code.read_fp16,
    types.uint32: _Code.read_fp32,
    types.uint8: _Code.read_e4m3,
}
_WRITE = {
    types.uint16: _Code.write_bf16,
    types.int16: _Code.write_fp16,
    types.uint32: _Code.write_fp32,
    types.uint8: _Code.write_e4m3,
}
