"""XXH3-64 (seed 0, default secret) as numba code, so that copies and checksums share one call.

Source: the XXH3 section of the xxHash specification, version 0.2.0
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md); bit-equal to
`xxhash.xxh3_64_intdigest` for every length. Integers read from Python arrive as int64, hence the
casts: int64 mixed with uint64 would become a float in numba.
"""

from __future__ import annotations

import struct

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from tierloom.triton_kernels.memory.machine_code import compiled
from tierloom.triton_kernels.memory.raw import intrinsic, load8, load32, load64

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_STRIPE, _STRIPES = 64, 16
_BLOCK = _STRIPE * _STRIPES

_P32_1, _P32_2, _P32_3 = (np.uint64(p) for p in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D))
_P64_1 = np.uint64(0x9E3779B185EBCA87)
_P64_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P64_3 = np.uint64(0x165667B19E3779F9)
_P64_4 = np.uint64(0x85EBCA77C2B2AE63)
_P64_5 = np.uint64(0x27D4EB2F165667C5)
_MX1 = np.uint64(0x165667919E3779F9)
_MX2 = np.uint64(0x9FB21C651E98DF25)
XXH3_START = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)

_U64 = types.uint64
_LANES = types.UniTuple(types.uint64, 8)
_I64, _I128 = ir.IntType(64), ir.IntType(128)
_VECTOR = ir.VectorType(_I64, 8)


@compiled(nogil=True)
def xxh3_64(address, nbytes):
    """XXH3-64 of `nbytes` >= 0 bytes at `address`; from Python or from other numba code.

    The memory is only read, and must stay alive for the call. No GIL is held.
    """
    at = np.uint64(address)
    size = np.uint64(nbytes)
    secret = _secret()
    if nbytes > 240:
        lanes = xxh3_absorb(XXH3_START, at, 0, nbytes, nbytes)
        return xxh3_end(lanes, at + size - _u(_STRIPE), nbytes)
    if nbytes > 128:
        return _129_to_240(at, nbytes, secret)
    if nbytes > 16:
        return _17_to_128(at, nbytes, secret)
    if nbytes > 8:
        low = load64(at) ^ load64(secret + _u(24)) ^ load64(secret + _u(32))
        high = load64(at + size - _u(8)) ^ load64(secret + _u(40)) ^ load64(secret + _u(48))
        return _avalanche(size + _swap_bytes(low) + high + _fold(low, high))
    if nbytes > 3:
        both = load32(at + size - _u(4)) + (load32(at) << _u(32))
        h = both ^ load64(secret + _u(8)) ^ load64(secret + _u(16))
        h ^= _rotate(h, 49) ^ _rotate(h, 24)
        h *= _MX2
        h ^= (h >> _u(35)) + size
        h *= _MX2
        return h ^ (h >> _u(28))
    if nbytes > 0:
        first, middle, last = load8(at), load8(at + (size >> _u(1))), load8(at + size - _u(1))
        h = (first << _u(16)) | (middle << _u(24)) | last | (size << _u(8))
        return _avalanche_xxh64(h ^ load32(secret) ^ load32(secret + _u(4)))
    return _avalanche_xxh64(load64(secret + _u(56)) ^ load64(secret + _u(64)))


@njit(nogil=True)
def xxh3_absorb(lanes, at, start, nbytes, total):
    """Take bytes [start, start + nbytes), found at `at`, of a message of `total` > 240 bytes.

    For numba code that sees a message in pieces, in order, each a multiple of 64 bytes long:
    begin with lanes `XXH3_START`, hand each result to the next call, the last to `xxh3_end`.
    """
    at, secret = np.uint64(at), _secret()
    stripe, end = start // _STRIPE, min(start + nbytes, total - 1) // _STRIPE
    while stripe < end:
        if stripe % _STRIPES == 0 and end - stripe >= _STRIPES:
            blocks = (end - stripe) // _STRIPES
            lanes = _absorb_blocks(lanes, at, blocks)
            at += _u(blocks * _BLOCK)
            stripe += blocks * _STRIPES
            continue
        lanes = _absorb_stripe(lanes, at, secret + _u(stripe % _STRIPES * 8))
        at += _u(_STRIPE)
        stripe += 1
        if stripe % _STRIPES == 0:
            lanes = _scramble(lanes)
    return lanes


@njit(nogil=True)
def xxh3_end(lanes, last, total):
    """The hash of a message of `total` > 240 bytes, whose last 64 bytes are at `last`."""
    secret = _secret()
    lanes = _absorb_stripe(lanes, np.uint64(last), secret + _u(len(_SECRET) - 71))
    h = _u(total) * _P64_1
    for i in range(4):
        key = secret + _u(11 + 16 * i)
        h += _fold(lanes[2 * i] ^ load64(key), lanes[2 * i + 1] ^ load64(key + _u(8)))
    return _avalanche(h)


@njit(inline="always")
def _129_to_240(at, nbytes, secret):
    h = _u(nbytes) * _P64_1
    for i in range(8):
        h += _mix16(at + _u(16 * i), secret + _u(16 * i))
    h = _avalanche(h)
    for i in range(8, nbytes // 16):
        h += _mix16(at + _u(16 * i), secret + _u(16 * (i - 8) + 3))
    return _avalanche(h + _mix16(at + _u(nbytes - 16), secret + _u(119)))


@njit(inline="always")
def _17_to_128(at, nbytes, secret):
    h = _u(nbytes) * _P64_1
    for i in range((nbytes - 1) // 32 + 1):
        h += _mix16(at + _u(16 * i), secret + _u(32 * i))
        h += _mix16(at + _u(nbytes - 16 * (i + 1)), secret + _u(32 * i + 16))
    return _avalanche(h)


@njit(inline="always")
def _mix16(at, key):
    return _fold(load64(at) ^ load64(key), load64(at + _u(8)) ^ load64(key + _u(8)))


@njit(inline="always")
def _avalanche(h):
    h ^= h >> _u(37)
    h *= _MX1
    return h ^ (h >> _u(32))


@njit(inline="always")
def _avalanche_xxh64(h):
    h ^= h >> _u(33)
    h *= _P64_2
    h ^= h >> _u(29)
    h *= _P64_3
    return h ^ (h >> _u(32))


@njit(inline="always")
def _rotate(h, bits):
    return (h << _u(bits)) | (h >> _u(64 - bits))


@njit(inline="always")
def _u(number):
    return np.uint64(number)


@intrinsic
def _secret(typing):
    """Address of the 192 secret bytes."""

    def generate(context, builder, signature, args):
        data = cgutils.make_bytearray(_SECRET)
        place = cgutils.global_constant(builder.module, "xxh3_secret", data)
        return builder.ptrtoint(place, _I64)

    return _U64(), generate


@intrinsic
def _fold(typing, a, b):
    """Low half xor high half of the 128-bit product."""

    def generate(context, builder, signature, args):
        wide = builder.mul(*(builder.zext(factor, _I128) for factor in args))
        high = builder.trunc(builder.lshr(wide, _I128(64)), _I64)
        return builder.xor(builder.trunc(wide, _I64), high)

    return _U64(_U64, _U64), generate


@intrinsic
def _swap_bytes(typing, h):
    def generate(context, builder, signature, args):
        return builder.bswap(args[0])

    return _U64(_U64), generate


@intrinsic
def _absorb_stripe(typing, lanes, at, key):
    """Take 64 bytes into the eight lanes under the 64 secret bytes at address `key`."""

    def generate(context, builder, signature, args):
        lanes, at, key = args
        data, key = _vector_at(builder, at), _vector_at(builder, key)
        products = builder.add(_vector(builder, lanes), _products(builder, data, key))
        return _array(builder, builder.add(products, _swap_lanes(builder, data)))

    return _LANES(_LANES, _U64, _U64), generate


@intrinsic
def _scramble(typing, lanes):
    """End a block of 16 stripes."""

    def generate(context, builder, signature, args):
        return _array(builder, _scrambled(builder, _vector(builder, args[0])))

    return _LANES(_LANES), generate


@intrinsic
def _absorb_blocks(typing, lanes, at, blocks):
    """Take `blocks` blocks of 16 stripes, scrambling after each.

    Written on whole vectors so that LLVM keeps the lanes in registers; each stripe's swapped
    words are summed apart, and swapped once per block.
    """

    def generate(context, builder, signature, args):
        lanes, at, blocks = args
        state = cgutils.alloca_once_value(builder, _vector(builder, lanes))
        with cgutils.for_range(builder, blocks) as loop:
            products, words = builder.load(state), _splat(0)
            block = builder.add(at, builder.mul(loop.index, _I64(_BLOCK)))
            for stripe in range(_STRIPES):
                data = _vector_at(builder, builder.add(block, _I64(stripe * _STRIPE)))
                key = _secret_vector(8 * stripe)
                products = builder.add(products, _products(builder, data, key))
                words = builder.add(words, data)
            mixed = builder.add(products, _swap_lanes(builder, words))
            builder.store(_scrambled(builder, mixed), state)
        return _array(builder, builder.load(state))

    return _LANES(_LANES, _U64, types.int64), generate


def _products(builder, data, key):
    mixed = builder.xor(data, key)
    low = builder.and_(mixed, _splat(0xFFFFFFFF))
    return builder.mul(low, builder.lshr(mixed, _splat(32)))


def _scrambled(builder, lanes):
    mixed = builder.xor(lanes, builder.lshr(lanes, _splat(47)))
    mixed = builder.xor(mixed, _secret_vector(len(_SECRET) - _STRIPE))
    return builder.mul(mixed, _splat(int(_P32_1)))


def _swap_lanes(builder, vector):
    order = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    return builder.shuffle_vector(vector, vector, order)


def _vector_at(builder, address):
    return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=1)


def _secret_vector(offset: int):
    return ir.Constant(_VECTOR, list(struct.unpack_from("<8Q", _SECRET, offset)))


def _splat(value: int):
    return ir.Constant(_VECTOR, [value] * 8)


def _vector(builder, array):
    vector = ir.Constant(_VECTOR, ir.Undefined)
    for i in range(8):
        vector = builder.insert_element(vector, builder.extract_value(array, i), ir.IntType(32)(i))
    return vector


def _array(builder, vector):
    array = ir.Constant(ir.ArrayType(_I64, 8), ir.Undefined)
    for i in range(8):
        lane = builder.extract_element(vector, ir.IntType(32)(i))
        array = builder.insert_value(array, lane, i)
    return array
