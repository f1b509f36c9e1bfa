"""The Triton rANS kernels against numba, which `test_rans.py` holds to the reference.

Each test runs twice, as in `test_triton.py`; the interpreter pays per step, so streams are short.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, run_interpreted
from paged_cases import GUARD, POISON
from rans_cases import Case, Streams, fenced, make_case

from tierloom.triton_kernels.rans.format import BAD, DONE, StreamGrid
from tierloom.triton_kernels.rans.tables import RansTables
from tierloom.triton_kernels.rans.triton import (
    DeviceTables,
    launch_decode_streams,
    launch_encode_streams,
)


class Guarded:
    """A tensor on the device behind a poisoned guard, itself poisoned or a copy.

    What follows it is another guard, and on a CPU a page that must not even be read.
    """

    def __init__(self, like: np.ndarray, device: str, *, copy: bool = False) -> None:
        self.behind = 0 if device == "cpu" else GUARD
        raw = fenced((GUARD + like.nbytes + self.behind,), np.uint8)
        self.raw = torch.from_numpy(raw).to(device)
        dtype = torch.from_numpy(np.zeros(1, like.dtype)).dtype
        self.tensor = self.raw[GUARD : GUARD + like.nbytes].view(dtype).view(like.shape)
        if copy:
            self.tensor.copy_(torch.from_numpy(np.array(like)))

    def read(self) -> np.ndarray:
        raw = self.raw.cpu()
        assert (raw[:GUARD] == POISON).all()
        assert (raw[len(raw) - self.behind :] == POISON).all()
        return self.tensor.cpu().numpy()


def encoded(case: Case, device: str, room: int) -> Streams:
    like = Streams.of(case.grid, room)
    out = [Guarded(array, device) for array in like.arrays()]
    symbols, tabid = (Guarded(a, device, copy=True) for a in (case.symbols, case.tabid))
    tables = DeviceTables.of(case.tables, device)
    tensors = [guarded.tensor for guarded in out]
    launch_encode_streams(case.grid, tables, symbols.tensor, tabid.tensor, *tensors)
    return Streams(*(guarded.read() for guarded in out))


def decoded(case: Case, streams: Streams, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and status."""
    given = (streams.words, streams.counts, streams.states, case.tabid)
    tensors = [Guarded(array, device, copy=True).tensor for array in given]
    symbols, status = Guarded(case.symbols, device), Guarded(streams.status, device)
    tables = DeviceTables.of(case.tables, device)
    launch_decode_streams(case.grid, tables, *tensors, symbols.tensor, status.tensor)
    return symbols.read(), status.read()


def check(case: Case, device: str) -> None:
    expected = case.encoded()
    got = encoded(case, device, case.grid.most_words(case.tables.bits))
    total = len(expected.words)
    assert (got.words[:total] == expected.words).all()
    assert (got.words[total:].view(np.uint8) == POISON).all()
    assert (got.counts == expected.counts).all()
    assert (got.states == expected.states).all()
    assert (got.status == DONE).all()
    symbols, status = decoded(case, expected, device)
    assert (symbols == case.symbols).all()
    assert (status == DONE).all()


@pytest.mark.parametrize("bits", [10, 11, 12])
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_lanes_and_bits(device: str, lanes: int, bits: int) -> None:
    check(make_case(StreamGrid(1, 4, 2 * lanes + 3, lanes, 2), bits=bits, seed=lanes), device)


@pytest.mark.parametrize("kind", ["equal", "rarest", "one"])
def test_kinds_of_symbols(device: str, kind: str) -> None:
    check(make_case(StreamGrid(1, 9, 40, 32, 1), bits=12, kind=kind, alphabet=60), device)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (1, 70), (3, 8), (17, 9)])
def test_shapes(device: str, tokens: int, channels: int) -> None:
    check(make_case(StreamGrid.of(2, tokens, channels)), device)


@pytest.mark.gpu
def test_streams_of_many_words_cuda() -> None:
    """Too many for one program of `rans_compact`, and too many steps for the interpreter."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and compiled kernels")
    check(make_case(StreamGrid.of(3, 256, 192), kind="rarest"), "cuda")


def test_streams_without_room(device: str) -> None:
    case = make_case(StreamGrid(2, 5, 40, 8, 2))
    whole = case.encoded()
    room = int(whole.counts.ravel()[:4].sum())
    for missing in (0, 1):
        got = encoded(case, device, room - missing)
        expected = case.encoded(room - missing)
        for a, b in zip(got.arrays(), expected.arrays(), strict=True):
            assert (a == b).all()
        assert (got.status == BAD).sum() == 2 + missing


def test_symbols_and_tables_that_are_not_known(device: str) -> None:
    case = make_case(StreamGrid(2, 5, 40, 8, 2), alphabet=20)
    freq = case.freq.copy()
    freq[:, 0] += freq[:, 19]
    freq[:, 19] = 0
    case = Case(case.grid, freq, RansTables.of(freq, 11), case.tabid, case.symbols % 19)
    case.symbols[0, 3, 0] = 19
    case.symbols[0, 4, 20] = 255
    case.tabid[1, 39] = 5
    expected = case.encoded()
    got = encoded(case, device, len(expected.words))
    for a, b in zip(got.arrays(), expected.arrays(), strict=True):
        assert (a == b).all()
    assert got.status.tolist() == [[BAD, BAD, DONE], [DONE, DONE, BAD]]
    symbols, status = decoded(case, expected, device)
    assert status.tolist() == got.status.tolist()
    assert (symbols[1, :, 32:] == POISON).all()


@pytest.mark.parametrize("harm", ["words", "states", "few", "many", "moved"])
def test_hostile_bytes_are_refused_as_numba_refuses_them(device: str, harm: str) -> None:
    case = make_case(StreamGrid(2, 6, 40, 8, 2))
    streams = case.encoded()
    rng = np.random.default_rng(3)
    if harm == "words":
        streams.words[::7] ^= rng.integers(0, 1 << 16, len(streams.words[::7]), dtype=np.uint16)
    elif harm == "states":
        streams.states[0, :2] = rng.integers(0, 1 << 17, streams.states[0, :2].shape)
        streams.states[1, 2, 7] = 1  # a state that no encoder leaves
    elif harm == "few":
        streams.words = streams.words[:-1]
    elif harm == "many":
        streams.counts[1, 2] = np.uint32(0xFFFFFFF0)
    else:
        streams.counts[0, 0] += np.uint32(3)
        streams.counts[0, 1] -= np.uint32(3)
    expected = case.decoded(streams)
    symbols, status = decoded(case, streams, device)
    assert (status == streams.status).all()
    assert (status == BAD).any()
    for place in np.argwhere(status == DONE):
        channels = slice(place[1] * 16, place[1] * 16 + 16)
        assert (symbols[place[0], :, channels] == expected[place[0], :, channels]).all()


def test_a_lane_without_channels_reads_nothing(device: str) -> None:
    """Else its state could be forged: 1 becomes the initial state by a word of 0, wherever."""
    one = make_case(StreamGrid(1, 2, 5, 8, 1), seed=1)
    stream = one.encoded()
    places = len(stream.words) + 1
    case = make_case(StreamGrid(places, 2, 5, 8, 1))
    case.tabid[:] = one.tabid
    forged = Streams.of(case.grid, places * places)
    forged.words[:] = np.concatenate([np.insert(stream.words, i, 0) for i in range(places)])
    forged.counts[:] = places
    forged.states[:] = stream.states
    forged.states[:, :, 7] = 1
    assert (decoded(case, forged, device)[1] == BAD).all()
    case.decoded(forged)
    assert (forged.status == BAD).all()


def test_shapes_that_are_not_the_grids_are_refused() -> None:
    case = make_case(StreamGrid.of(2, 9, 40))
    out = [torch.from_numpy(np.array(array)) for array in case.encoded().arrays()]
    tables = DeviceTables.of(case.tables, "cpu")
    symbols, tabid = torch.from_numpy(case.symbols), torch.from_numpy(case.tabid)
    with pytest.raises(ValueError, match="symbols is"):
        launch_encode_streams(case.grid, tables, symbols[:, 1:], tabid, *out)
    with pytest.raises(ValueError, match="tabid is"):
        launch_decode_streams(case.grid, tables, *out[:3], tabid[1:], symbols, out[3])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=12)
