"""rANS: numba against the reference, byte for byte; its bounds; and bytes that mean harm."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rans_cases import KINDS, Case, Streams, fenced, make_case, poisoned

from tierloom.triton_kernels.rans import reference as rans_reference
from tierloom.triton_kernels.rans.cpu import encode_streams
from tierloom.triton_kernels.rans.format import BAD, DONE, INITIAL_STATE, StreamGrid
from tierloom.triton_kernels.rans.tables import RansTables


def check(case: Case, at: str = "end") -> Streams:
    """Numba's streams are the reference's; both decode them."""
    out = case.encoded(at=at)
    words, counts, states = case.reference()
    assert out.words.tolist() == words
    assert out.counts.ravel().tolist() == counts
    assert out.states.ravel().tolist() == states
    assert (out.status == DONE).all()
    out.status[:] = 0
    assert (case.decoded(out) == case.symbols).all()
    assert (out.status == DONE).all()
    back = np.full_like(case.symbols, 0xA5)
    begin = 0
    for i, count in enumerate(counts):
        place = divmod(i, case.grid.groups)
        mine, ends = words[begin : begin + count], states[i * case.grid.lanes :][: case.grid.lanes]
        assert rans_reference.decode_stream(
            case.grid, case.freq, mine, ends, case.tabid, *place, back
        )
        begin += count
    assert (back == case.symbols).all()
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 255, 256, 257])
def test_tokens(tokens: int, kind: str) -> None:
    check(make_case(StreamGrid.of(2, tokens, 11), kind=kind))


@pytest.mark.parametrize("bits", [10, 11, 12])
@pytest.mark.parametrize("lanes", [8, 16, 32])
@pytest.mark.parametrize("channels", [1, 8, 33, 70, 128])
def test_lanes_that_have_no_channel(channels: int, lanes: int, bits: int) -> None:
    check(make_case(StreamGrid(2, 5, channels, lanes, 2), bits=bits, alphabet=7))


@settings(deadline=None, max_examples=80)
@given(
    planes=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 3, 17, 64, 255, 256, 257]),
    channels=st.integers(1, 90),
    prescribed=st.booleans(),
    lanes=st.sampled_from([8, 16, 32]),
    rounds=st.integers(1, 5),
    bits=st.sampled_from([10, 11, 12]),
    tables=st.integers(1, 9),
    alphabet=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    at=st.sampled_from(["start", "end"]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    planes: int, tokens: int, channels: int, prescribed: bool, lanes: int, rounds: int,
    bits: int, tables: int, alphabet: int, kind: str, at: str, seed: int,
) -> None:  # fmt: skip
    channels = min(channels, 1500 // tokens + 1)
    grid = StreamGrid(planes, tokens, channels, lanes, rounds)
    if prescribed:
        grid = StreamGrid.of(planes, tokens, channels)
    case = make_case(grid, bits=bits, tables=tables, alphabet=alphabet, kind=kind, seed=seed)
    out = check(case, at)
    assert len(out.words) <= grid.most_words(bits)
    assert out.counts.max() <= grid.stream_words(bits)


@pytest.mark.parametrize("bits", [10, 11, 12])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 5, 13), (1, 16, 64), (3, 255, 40), (1, 256, 192), (2, 257, 129)]
)
def test_symbols_of_frequency_one_need_the_most_words_and_no_more(
    shape: tuple[int, int, int], bits: int
) -> None:
    grid = StreamGrid.of(*shape)
    freq = np.ones((1, 256), np.uint16)
    freq[0, 0] = (1 << bits) - 255
    tabid = np.zeros((grid.planes, grid.channels), np.uint8)
    symbols = np.random.default_rng(1).integers(1, 256, shape, dtype=np.uint8)
    out = Case(grid, freq, RansTables.of(freq, bits), tabid, symbols).encoded()
    assert (out.status == DONE).all()
    assert len(out.words) == grid.most_words(bits)
    assert out.counts.max() == grid.stream_words(bits)


def test_what_is_certain_costs_nothing() -> None:
    case = make_case(StreamGrid.of(2, 256, 64), kind="one")
    out = case.encoded()
    assert len(out.words) == 0
    assert (out.states == INITIAL_STATE).all()
    assert (case.decoded(out) == 0).all()
    assert (out.status == DONE).all()


def test_size_is_within_a_hundredth_of_the_entropy() -> None:
    case = make_case(StreamGrid.of(2, 256, 128), bits=12, seed=3)
    share = case.freq[case.tabid[:, None], case.symbols] / (1 << 12)
    ideal = -np.log2(share).sum() / 16
    out = case.encoded()
    assert ideal - 2 * out.states.size <= len(out.words) <= 1.01 * ideal


def test_the_format_stays() -> None:
    """The bytes of one case, which every other version must read."""
    grid = StreamGrid.of(2, 64, 100)
    freq = np.full((3, 31), 20, np.uint16)
    freq[[0, 1, 2], [4, 0, 30]] += (1 << 11) - 31 * 20
    place = np.arange(2 * 64 * 100).reshape(2, 64, 100)
    symbols = (place * place % 97 % 31).astype(np.uint8)
    tabid = (place[:, 0] % 3).astype(np.uint8)
    case = Case(grid, freq, RansTables.of(freq, 11), tabid, symbols)
    out = case.encoded()
    digest = hashlib.sha256(b"".join(a.tobytes() for a in out.arrays())).hexdigest()
    assert digest == "976823c83ae90f2053c1b43ac66d422d4c0b14a994bbba1ad23629abc8ecd4ef"


def test_streams_without_room_are_bad_and_not_written() -> None:
    case = make_case(StreamGrid(4, 9, 40, 8, 2))
    whole = case.encoded()
    ends = np.cumsum(whole.counts)
    for room in (0, 1, int(ends[4]) - 1, int(ends[4]), len(whole.words) - 1):
        out = case.encoded(room)
        fits = (ends <= room).reshape(out.status.shape)
        assert (out.status == np.where(fits, DONE, BAD)).all()
        assert (out.counts == whole.counts).all()
        written = int(ends[fits.ravel()].max(initial=0))
        assert (out.words[:written] == whole.words[:written]).all()
        assert poisoned(out.words[written:])


def test_symbols_that_no_table_knows_spoil_their_own_stream() -> None:
    case = make_case(StreamGrid(3, 9, 40, 8, 2), alphabet=20)
    freq = case.freq.copy()
    freq[:, 0] += freq[:, 19]
    freq[:, 19] = 0
    case = Case(case.grid, freq, RansTables.of(freq, 11), case.tabid, case.symbols % 19)
    case.symbols[0, 3, 0] = 19  # has no frequency
    case.symbols[1, 8, 39] = 20  # is beyond the table
    case.symbols[2, 0, 17] = 255
    case.tabid[2, 39] = 5  # is no table
    out = case.encoded()
    assert out.status.tolist() == [[BAD, DONE, DONE], [DONE, DONE, BAD], [DONE, BAD, BAD]]
    assert out.counts[2, 2] == 0
    symbols = case.decoded(out)
    assert (symbols[0, :, 16:] == case.symbols[0, :, 16:]).all()
    assert out.status[2, 2] == BAD
    assert poisoned(symbols[2, :, 32:])


def test_counts_that_do_not_add_up_spoil_all() -> None:
    case = make_case(StreamGrid(2, 9, 40, 8, 2))
    out = case.encoded()
    good = out.counts.copy()
    for change in (1, -1, 1 << 31, (1 << 32) - 1):
        out.counts[:] = good
        out.counts[1, 1] = np.uint32((int(good[1, 1]) + change) % (1 << 32))
        symbols = case.decoded(out)
        assert (out.status == BAD).all()
        assert poisoned(symbols)
    out.counts[:] = good
    for words in (out.words[:-1], out.words[:0], np.append(out.words, np.uint16(0))):
        case.decoded(Streams(words, good, out.states, out.status))
        assert (out.status == BAD).all()


def test_shapes_that_are_not_the_grids_are_refused() -> None:
    case = make_case(StreamGrid.of(2, 9, 40))
    out = case.encoded()
    for name in ("counts", "states", "status"):
        wrong = Streams(*out.arrays())
        setattr(wrong, name, getattr(out, name)[:1])
        with pytest.raises(ValueError, match=rf"{name} is \[1"):
            case.decoded(wrong)
        with pytest.raises(ValueError, match=rf"{name} is \[1"):
            encode_streams(case.grid, case.tables, case.symbols, case.tabid, *wrong.arrays())
    with pytest.raises(ValueError, match=r"tabid is \[2, 39\]"):
        case.decoded(out, case.tabid[:, :39])
    with pytest.raises(ValueError, match="symbols is"):
        encode_streams(case.grid, case.tables, case.symbols[:, 1:], case.tabid, *out.arrays())


STREAMS = 1000


def mutate(rng: np.random.Generator, out: Streams, tabid: np.ndarray) -> None:
    """Change each stream in one to three places; `counts` still add up to the words."""
    words, counts, states = out.words, out.counts.ravel(), out.states.reshape(STREAMS, -1)
    ends = np.cumsum(counts, dtype=np.int64)
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.integers(0, 6, STREAMS)
        bit = (1 << rng.integers(0, 16, STREAMS)).astype(np.uint16)
        word = ends - 1 - (rng.random(STREAMS) * counts).astype(np.int64)
        one = (kind == 0) & (counts > 0)
        words[word[one]] ^= bit[one]
        lane = rng.integers(0, states.shape[1], STREAMS)
        two = kind == 1
        states[two, lane[two]] ^= np.uint32(1) << rng.integers(0, 32, two.sum(), dtype=np.uint32)
        three = kind == 2
        values = np.array([0, 1, 0xFFFF, 0x10000, 0xFFFFFFFF], np.uint32)
        states[three, lane[three]] = rng.choice(values, three.sum())
        four = kind == 3
        tabid[four, rng.integers(0, tabid.shape[1], four.sum())] = rng.integers(
            0, 8, four.sum(), dtype=np.uint8
        )
        for i in np.flatnonzero(kind[:-1] == 4):  # words change hands with the next stream
            both = int(counts[i]) + int(counts[i + 1])
            counts[i] = rng.integers(0, both + 1)
            counts[i + 1] = both - counts[i]
        for i in np.flatnonzero(kind == 5)[:20]:
            words[ends[i] - int(counts[i]) : ends[i]] = rng.integers(0, 1 << 16)
        ends = np.cumsum(counts, dtype=np.int64)


def test_100000_mutated_streams() -> None:
    """Each is refused, or is what its symbols would have been encoded to; no page faults."""
    case = make_case(StreamGrid(STREAMS, 12, 20, 8, 3), tables=6)
    good = case.encoded()
    rng = np.random.default_rng(7)
    refused = changed = 0
    for turn in range(100):
        at = "start" if turn % 2 else "end"
        out = Streams.of(case.grid, len(good.words), at)
        for here, there in zip(out.arrays(), good.arrays(), strict=True):
            here[:] = there
        tabid = fenced(case.tabid.shape, np.uint8, at)
        tabid[:] = case.tabid
        mutate(rng, out, tabid)
        symbols = case.decoded(out, tabid)
        assert np.isin(out.status, (DONE, BAD)).all()
        refused += int((out.status == BAD).sum())
        same = (tabid == case.tabid).all(axis=1) & (out.states == good.states).all(axis=(1, 2))
        changed += int((~same).sum())

        again = Streams.of(case.grid, case.grid.most_words(11))
        known = np.where(symbols < 31, symbols, 0).astype(np.uint8)
        encode_streams(case.grid, case.tables, known, tabid, *again.arrays())
        ends, ends2 = np.cumsum(out.counts), np.cumsum(again.counts)
        for i in np.flatnonzero(out.status.ravel() == DONE):
            n = int(out.counts[i, 0])
            assert n == again.counts[i, 0]
            assert (out.states[i] == again.states[i]).all()
            assert (out.words[ends[i] - n : ends[i]] == again.words[ends2[i] - n : ends2[i]]).all()
    assert changed > 40_000
    assert refused > changed


def test_noise_is_refused() -> None:
    case = make_case(StreamGrid(STREAMS, 12, 20, 8, 3))
    rng = np.random.default_rng(8)
    for _ in range(10):
        out = Streams.of(case.grid, 40 * STREAMS)
        out.words[:] = rng.integers(0, 1 << 16, out.words.shape)
        out.counts[:] = rng.multinomial(len(out.words), np.full(STREAMS, 1 / STREAMS))[:, None]
        out.states[:] = rng.integers(0, 1 << 32, out.states.shape)
        case.decoded(out, rng.integers(0, 256, case.tabid.shape, dtype=np.uint8))
        assert (out.status == BAD).all()
        case.decoded(out)
        assert (out.status == BAD).all()


def test_threads_do_not_disturb_one_another() -> None:
    cases = [make_case(StreamGrid.of(2, 100, 96), seed=seed) for seed in range(8)]
    alone = [case.encoded() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for one, many in zip(alone, pool.map(Case.encoded, cases), strict=True):
            assert all((a == b).all() for a, b in zip(one.arrays(), many.arrays(), strict=True))
        for case, symbols in zip(cases, pool.map(Case.decoded, cases, alone), strict=True):
            assert (symbols == case.symbols).all()
