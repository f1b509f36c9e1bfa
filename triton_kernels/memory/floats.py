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

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
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
            beyond = builder.icmp_signed(zero, best, _c(0))
            return builder.bitcast(builder.select(beyond, best, _c(0)), _F32)

        pair = reduced("u", "<"), reduced("s", ">")
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(types.float32, 2)(y), generate


class _Code:
    """LLVM's builder, with constants as plain numbers."""

    def __init__(self, builder) -> None:
        self.b = builder

    def read_bf16(self, bits):
        wide = self.b.zext(bits, _I32)
        return self.b.bitcast(self.b.shl(wide, _c(16)), _F32)

    def write_bf16(self, value):
        bits = self._clamped(value, _MOST[types.uint16])
        odd = self.b.and_(self.b.lshr(bits, _c(16)), _c(1))
        return self.b.trunc(
            self.b.lshr(self.b.add(bits, self.b.add(odd, _c(0x7FFF))), _c(16)), _I16
        )

    def read_fp16(self, bits):
        wide = self.b.zext(bits, _I32)
        sign = self.b.shl(self.b.and_(wide, _c(0x8000)), _c(16))
        small = self.b.and_(wide, _c(0x7FFF))
        normal = self.b.add(self.b.shl(small, _c(13)), _c(112 << 23))
        return self._either(small, 0x400, normal, 2.0**-24, sign)

    def write_fp16(self, value):
        bits = self._clamped(value, _MOST[types.int16])
        sign = self.b.and_(bits, _c(_SIGN))
        size = self.b.xor(bits, sign)
        code = self._rounded(size, 13, 112, 0.5)
        return self.b.trunc(self.b.or_(code, self.b.lshr(sign, _c(16))), _I16)

    def read_fp32(self, bits):
        return self.b.bitcast(bits, _F32)

    def write_fp32(self, value):
        return self._clamped(value, _MOST[types.uint32])

    def read_e4m3(self, bits):
        wide = self.b.zext(bits, _I32)
        sign = self.b.shl(self.b.and_(wide, _c(0x80)), _c(24))
        small = self.b.and_(wide, _c(0x7F))
        normal = self.b.add(self.b.shl(small, _c(20)), _c(120 << 23))
        return self._either(small, 8, normal, 2.0**-9, sign)

    def write_e4m3(self, value):
        bits = self._clamped(value, 0x43E00000)  # 448
        sign = self.b.and_(bits, _c(_SIGN))
        code = self._rounded(self.b.xor(bits, sign), 20, 120, 2.0**14)
        return self.b.trunc(self.b.or_(code, self.b.lshr(sign, _c(24))), _I8)

    def _clamped(self, value, most):
        """Bits of `value`, its magnitude at most that of the float32 bits `most`."""
        bits = self.b.bitcast(value, _I32)
        sign = self.b.and_(bits, _c(_SIGN))
        size = self.b.xor(bits, sign)
        over = self.b.icmp_unsigned(">", size, _c(most))
        return self.b.or_(self.b.select(over, _c(most), size), sign)

    def _rounded(self, size, drop, bias, magic):
        """A float32 magnitude to one with `drop` fewer bits and an exponent `bias` lower."""
        odd = self.b.and_(self.b.lshr(size, _c(drop)), _c(1))
        up = self.b.add(self.b.add(size, odd), _c((1 << (drop - 1)) - 1 - (bias << 23)))
        normal = self.b.lshr(up, _c(drop))
        # Below the least normal number an addition rounds: its last bit is the one to keep.
        added = self.b.bitcast(self.b.fadd(self.b.bitcast(size, _F32), _f(magic)), _I32)
        tiny = self.b.sub(added, self.b.bitcast(_f(magic), _I32))
        return self.b.select(self.b.icmp_unsigned("<", size, _c((bias + 1) << 23)), tiny, normal)

    def _either(self, small, least, normal, unit, sign):
        """`small` units where it is less than `least`, else the bits `normal`; then the sign."""
        tiny = self.b.fmul(self.b.uitofp(small, _F32), _f(unit))
        size = self.b.select(
            self.b.icmp_unsigned("<", small, _c(least)), self.b.bitcast(tiny, _I32), normal
        )
        return self.b.bitcast(self.b.or_(size, sign), _F32)


def _c(value: int):
    return ir.Constant(_I32, value & 0xFFFFFFFF)


def _f(value: float):
    return ir.Constant(_F32, value)


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
