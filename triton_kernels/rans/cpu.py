"""The rANS streams of `rans_format` on a CPU: the numba twin of `rans`.

One call codes all streams of its symbols and holds no GIL; callers use several threads on
different symbols. Lanes are coded one after the other in a row: they depend on one another only
by the count of words, so a core works on several at once without vector instructions. Words are
moved without a branch, since whether a lane needs or has one is a coin toss; the encoder spells
its choices as arithmetic, for LLVM turned some back into branches. x is divided by a product with
2^32 div f, which is short by one at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tierloom.triton_kernels.memory.machine_code import compiled
from tierloom.triton_kernels.rans.format import BAD, DONE, INITIAL_STATE, StreamGrid
from tierloom.triton_kernels.rans.tables import ENCODE_ROW, UNCODABLE, RansTables

if TYPE_CHECKING:
    import numpy.typing as npt

_START = np.uint32(INITIAL_STATE)
_NO_WORDS = np.zeros(1, np.uint16)
"""In place of no words: numba code cannot read from an empty array."""


def encode_streams(
    grid: StreamGrid,
    tables: RansTables,
    symbols: npt.NDArray[np.uint8],
    tabid: npt.NDArray[np.uint8],
    words: npt.NDArray[np.uint16],
    counts: npt.NDArray[np.uint32],
    states: npt.NDArray[np.uint32],
    status: npt.NDArray[np.uint8],
) -> int:
    """Write `words`, `counts`, `states` and `status` u8 [planes, groups]; shapes by `grid`.

    Returns the sum of `counts`. `words` may have any size, ``grid.most_words(bits)`` always
    suffice; if it is less than what is returned, the streams that had no room are BAD and
    nothing of them is written. So are those with a symbol that its table cannot code, or with a
    `tabid` that names no table, but they stand among the words.

    Arrays are contiguous, aligned and writable; for any other kind numba would compile anew. The
    caller owns them. Raises ValueError for shapes that are not the grid's.
    """
    grid.require(symbols=symbols.shape, tabid=tabid.shape, counts=counts.shape)
    grid.require(states=states.shape, status=status.shape)
    room = grid.stream_words(tables.bits)
    return int(
        _encode(
            *(tables.encode, tables.bits, symbols, tabid, grid.lanes, grid.rounds, room),
            *(words, counts, states, status),
        )
    )


def decode_streams(
    grid: StreamGrid,
    tables: RansTables,
    words: npt.NDArray[np.uint16],
    counts: npt.NDArray[np.uint32],
    states: npt.NDArray[np.uint32],
    tabid: npt.NDArray[np.uint8],
    symbols: npt.NDArray[np.uint8],
    status: npt.NDArray[np.uint8],
) -> None:
    """Write `symbols`, and `status` u8 [planes, groups]; shapes by `grid`.

    What is read may be anything: every stream becomes DONE, or BAD, with symbols that are not to
    be used. It is BAD if `counts` do not add up to ``len(words)``, if `tabid` names no table (in
    these two cases its symbols are left as they are), or if it does not end with its words and
    in the initial state. Nothing outside the arrays is read or written, and the time taken
    depends on their shapes alone.

    Arrays and errors are as in `encode_streams`.
    """
    grid.require(symbols=symbols.shape, tabid=tabid.shape, counts=counts.shape)
    grid.require(states=states.shape, status=status.shape)
    _decode(
        *(tables.freq_cdf, tables.decode, tables.bits),
        *(words if len(words) else _NO_WORDS, len(words), counts, states, tabid),
        *(grid.lanes, grid.rounds, symbols, status),
    )


@compiled(nogil=True)
def _encode(
    table, bits, symbols, tabid, lanes, rounds, room, words, counts, states, status
):  # fmt: skip
    planes, tokens, channels = symbols.shape
    shift, above = np.uint32(bits), np.uint32(32 - bits)
    entry = table.reshape(-1)
    row_of = np.empty(lanes * rounds, np.uint32)
    x = np.empty(lanes, np.uint32)
    scratch = np.empty(room + 1, np.uint16)  # one more: a word is stored before it is known to be
    total = np.int64(0)
    for plane in range(planes):
        for group in range(counts.shape[1]):
            first = group * lanes * rounds
            live = min(lanes * rounds, channels - first)
            x[:] = _START
            known = True
            for c in range(live):
                known &= tabid[plane, first + c] < len(table)
                row_of[c] = np.uint32(tabid[plane, first + c]) * np.uint32(ENCODE_ROW)
            at = np.uint64(len(scratch))
            seen = np.uint32(0)
            for t in range(tokens - 1 if known else -1, -1, -1):
                row = symbols[plane, t]
                for r in range(rounds - 1, -1, -1):
                    for lane in range(min(lanes, live - r * lanes) - 1, -1, -1):
                        i = np.uint64(r * lanes + lane)
                        s = np.uint32(row[np.uint64(first) + i])
                        wide = entry[np.uint64(row_of[i] + s)]
                        e = np.uint32(wide)
                        seen |= e
                        f = e & np.uint32(0x7FFF)
                        y = x[np.uint64(lane)]
                        scratch[at - np.uint64(1)] = np.uint16(y)
                        full = (y >> above) >= f
                        at -= np.uint64(full)
                        y = y >> np.uint32(np.uint32(full) << np.uint32(4))
                        q = np.uint32((np.uint64(y) * (wide >> np.uint64(32))) >> np.uint64(32))
                        rest = np.uint32(y - q * f)
                        short = rest >= f
                        q = np.uint32(q + np.uint32(short))
                        rest = np.uint32(rest - f * np.uint32(short))
                        x[np.uint64(lane)] = np.uint32((q << shift) + rest + (e >> np.uint32(16)))
            n = np.int64(len(scratch)) - np.int64(at)
            counts[plane, group] = n
            states[plane, group] = x
            good = known and not seen & np.uint32(UNCODABLE)
            if total + n <= len(words):
                words[total : total + n] = scratch[len(scratch) - n :]
            else:
                good = False
            status[plane, group] = DONE if good else BAD
            total += n
    return total


@compiled(nogil=True)
def _decode(
    freq_cdf, decode, bits, words, size, counts, states, tabid, lanes, rounds, symbols, status
):  # fmt: skip
    planes, tokens, channels = symbols.shape
    shift, low = np.uint32(bits), np.uint32((1 << bits) - 1)
    symbol_of, entry, width = decode.reshape(-1), freq_cdf.reshape(-1), freq_cdf.shape[1]
    slots_of = np.empty(lanes * rounds, np.uint32)
    row_of = np.empty(lanes * rounds, np.uint32)
    x = np.empty(lanes, np.uint32)
    total = np.int64(0)
    for plane in range(planes):
        for group in range(counts.shape[1]):
            total += np.int64(counts[plane, group])
    whole = total == size
    begin = np.int64(0)
    for plane in range(planes):
        for group in range(counts.shape[1]):
            first = group * lanes * rounds
            live = min(lanes * rounds, channels - first)
            known = whole
            for c in range(live):
                k = tabid[plane, first + c]
                known &= k < len(decode)
                slots_of[c] = np.uint32(k) << shift
                row_of[c] = np.uint32(k) * np.uint32(width)
            status[plane, group] = BAD
            at = np.uint64(begin)
            begin += np.int64(counts[plane, group])
            if not known:
                continue
            end = np.uint64(begin)
            last = np.uint64(max(begin, np.int64(1)) - 1)
            x[:] = states[plane, group]
            for t in range(tokens):
                row = symbols[plane, t]
                for r in range(rounds):
                    for lane in range(min(lanes, live - r * lanes)):
                        i = np.uint64(r * lanes + lane)
                        y = x[np.uint64(lane)]
                        slot = y & low
                        s = symbol_of[np.uint64(slots_of[i] | slot)]
                        row[np.uint64(first) + i] = s
                        e = entry[np.uint64(row_of[i] + np.uint32(s))]
                        f = e & np.uint32(0xFFFF)
                        y = np.uint32(f * (y >> shift) + slot - (e >> np.uint32(16)))
                        # Past its end a stream goes on with its last word, and is BAD.
                        more = np.uint32(y << np.uint32(16)) | np.uint32(words[min(at, last)])
                        needy = y < _START
                        at += np.uint64(needy)
                        x[np.uint64(lane)] = more if needy else y
            good = at == end
            for lane in range(lanes):
                good &= x[lane] == _START
            status[plane, group] = DONE if good else BAD
