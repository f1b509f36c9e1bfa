"""TLM1: golden bytes, round trips, and every kind of damage."""

import hashlib
import random
import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, strategies as st

from tierloom.stages.errors import BadObject, Damaged
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Frame, Header, Object, header_size, name_of, plan_frames
from tierloom.stages.kv.text import Text, pack_text
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Arena

GEOMETRY = Geometry(kv=2, layers=5, heads=3, dim=8, dtype="bfloat16", block_tokens=1)


def header(tokens: int = 50, group: int = 2) -> Header:
    links = bytes(range(64))
    layers = [min(group, GEOMETRY.layers - at) for at in range(0, GEOMETRY.layers, group)]
    raw = [GEOMETRY.frame_bytes(n, tokens) for n in layers]
    return Header(
        key=links[-32:],
        namespace=b"n" * 32,
        parent=b"p" * 32,
        token_digest=b"t" * 32,
        tokens=tokens,
        grain=32,
        group=group,
        geometry=GEOMETRY,
        links=links,
        frames=plan_frames(header_size(len(raw), 2), raw, raw),
    )


def scanned(h: Header, scans: int, codecs: bytes = b"\x0b") -> Header:
    """The same as a progressive codec would leave it; plain where no codecs are said."""
    raw = [f.raw for f in h.frames] * scans
    stored = [n // 8 if codecs else n for n in raw]
    frames = plan_frames(header_size(len(raw), 2), raw, stored)
    return h._replace(frames=tuple(f._replace(codecs=codecs) for f in frames), scans=scans)


def whole() -> bytes:
    """A sealed object as bytes, its frames filled with a counter."""
    h, arena = header(), Arena(1 << 20, huge_pages=False)
    lease = arena.lease(h.nbytes)
    lease.view[:] = bytes(h.nbytes)
    checksums = []
    for i, f in enumerate(h.frames):
        data = bytes((i + j) % 251 for j in range(f.stored))
        lease.view[f.offset : f.offset + f.stored] = data
        checksums.append(xxhash.xxh3_64_intdigest(data))
    Object(h, lease).seal(checksums)
    out = bytes(lease.view)
    lease.release()
    arena.close()
    return out


def verified(raw: bytes) -> Header:
    """Read an object as a reader would: header first, then every frame. Raises BadObject."""
    h = Header.unpack(raw, key=header().key, namespace=b"n" * 32)
    if len(raw) < h.nbytes:
        raise BadObject("cut short")
    for f in h.frames:
        if xxhash.xxh3_64_intdigest(raw[f.offset : f.offset + f.stored]) != f.checksum:
            raise BadObject("frame")
    return h


def test_golden_object() -> None:
    assert (
        hashlib.sha256(whole()).hexdigest()
        == "5122ed938c5d3a3d8da16ca865903f08eb20a59bec2e887d2f6acb91ab6c8a07"
    )


def test_fields_lie_where_the_docs_say() -> None:
    raw = whole()
    assert raw[:4] == b"TLM1"
    assert struct.unpack_from("<HHQ", raw, 4) == (1, 0, PAGE)
    assert struct.unpack_from("<Q", raw, 24) == (len(raw),)
    assert raw[32:64] == header().key
    assert raw[64:96] == b"n" * 32
    assert raw[96:128] == b"p" * 32
    assert struct.unpack_from("<IIHHHHI", raw, 160) == (50, 32, 2, 2, 5, 3, 8)
    offset, stored, plain, _, codecs = struct.unpack_from("<QQQQ8s", raw, 200)
    assert (offset, stored, plain, codecs) == (
        PAGE,
        2 * 2 * 50 * 3 * 8 * 2,
        2 * 2 * 50 * 3 * 8 * 2,
        bytes(8),
    )


def test_a_header_says_what_was_said() -> None:
    h = verified(whole())
    plain = header()
    assert h._replace(frames=plain.frames) == plain
    assert [f._replace(checksum=0) for f in h.frames] == list(plain.frames)


@pytest.mark.parametrize("scans", [1, 2, 3])
def test_scans(scans: int) -> None:
    h = scanned(header(), scans)
    assert Header.unpack(h.pack()) == h
    assert h.groups == 3
    assert len(h.frames) == 3 * scans


@given(st.integers(0, len(whole()) * 8 - 1))
def test_no_flipped_bit_is_believed(bit: int) -> None:
    raw = bytearray(whole())
    raw[bit // 8] ^= 1 << bit % 8
    h = header()
    padding = any(
        f.offset + f.stored <= bit // 8 < f.offset + -(-f.stored // PAGE) * PAGE for f in h.frames
    )
    if padding:  # carries nothing
        verified(bytes(raw))
        return
    with pytest.raises(BadObject):
        verified(bytes(raw))


@given(st.integers(0, len(whole()) - 1))
def test_no_truncated_object_is_believed(length: int) -> None:
    with pytest.raises(BadObject):
        verified(whole()[:length])


@given(st.integers(0, len(whole()) // PAGE - 1))
def test_no_zeroed_page_is_believed(page: int) -> None:
    raw = bytearray(whole())
    raw[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    with pytest.raises(BadObject):
        verified(bytes(raw))


def test_another_object_is_not_taken_for_this_one() -> None:
    with pytest.raises(BadObject, match="holds object"):
        Header.unpack(whole(), key=b"x" * 32)
    with pytest.raises(BadObject, match="namespace"):
        Header.unpack(whole(), key=header().key, namespace=b"x" * 32)


@pytest.mark.parametrize(
    "lie",
    [
        {"frames": (Frame(PAGE, 1 << 40, 1 << 40), *header().frames[1:])},
        {"frames": header().frames[:-1]},
        {"frames": (), "geometry": replace(GEOMETRY, layers=0)},
        {"frames": tuple(f._replace(offset=f.offset + PAGE) for f in header().frames)},
        {"frames": (header().frames[0]._replace(stored=8), *header().frames[1:])},
        {"tokens": 51},
        {"tokens": 0},
        {"links": b""},
        {"links": b"x" * 64},
        {"group": 3},
        {"scans": 3},
        {"scans": 2, "frames": header().frames[:2]},
        {"scans": 2, "frames": scanned(header(), 2, b"").frames},
        {"scans": 1, "frames": scanned(header(), 2).frames},
    ],
    ids=str,
)
def test_a_well_sealed_lie_is_still_refused(lie: dict) -> None:
    """The checksum only proves what was written; the fields must agree with one another too."""
    with pytest.raises(BadObject):
        Header.unpack(header()._replace(**lie).pack())


@given(st.binary(max_size=2 * PAGE))
def test_noise_is_not_an_object(noise: bytes) -> None:
    for raw in (noise, b"TLM1" + noise, b"TLM1\x01\x00\x00\x00" + struct.pack("<Q", PAGE) + noise):
        with pytest.raises(BadObject):
            Header.unpack(raw)


def test_a_header_grows_by_whole_pages() -> None:
    geometry = replace(GEOMETRY, layers=400)
    raw = [geometry.frame_bytes(1, 32)] * 400
    h = header()._replace(
        geometry=geometry,
        group=1,
        tokens=32,
        links=bytes(32),
        key=bytes(32),
        frames=plan_frames(header_size(400, 1), raw, raw),
    )
    assert h.header_bytes == 4 * PAGE == h.frames[0].offset
    assert Header.unpack(h.pack()) == h
    assert Header.length(h.pack()[:PAGE]) == 4 * PAGE


def test_memory_is_not_read_beyond_what_is_given() -> None:
    raw = np.frombuffer(whole(), np.uint8)
    assert verified(raw.tobytes()).tokens == 50


def test_hostile_headers_whose_checksum_is_right() -> None:
    """Whoever writes into a shared store can compute a checksum: BadObject, and nothing else."""
    rng, good = random.Random(0), bytearray(whole()[:PAGE])
    refused = 0
    for _ in range(20_000):
        page = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, size = rng.randrange(8, 480), rng.choice((1, 2, 4, 8))
            page[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        page[16:24] = bytes(8)
        page[16:24] = xxhash.xxh3_64_intdigest(page).to_bytes(8, "little")
        try:
            Header.unpack(page)
        except BadObject:
            refused += 1
    assert 1000 < refused < 20_000


def test_an_object_has_a_name_among_many_namespaces() -> None:
    raw, h = whole(), header()
    name = name_of(h.namespace, h.key)
    assert Header.unpack(raw, key=name).key == h.key
    for key, space in ((name, h.namespace), (name_of(b"o" * 32, h.key), b"")):
        with pytest.raises(BadObject, match="holds object"):
            Header.unpack(raw, key=key, namespace=space)


TEXT = Text(np.arange(50, dtype=np.int32) * 977, 1234, b"r" * 32, b"p" * 32, b"o" * 32)


def with_text(h: Header) -> Header:
    h = h._replace(packed_text=pack_text(TEXT))
    return h.with_frames([f.raw for f in h.frames], [f.raw for f in h.frames])


def test_a_header_carries_its_text() -> None:
    h = with_text(header())
    page = h.pack()
    assert page[4] == 2
    assert h.header_bytes == len(page) == PAGE
    back = Header.unpack(page)
    assert back == h
    assert back.text is not None
    assert back.text.ids.tolist() == TEXT.ids.tolist()
    assert back.text[1:] == TEXT[1:]


def test_without_a_text_the_version_stays_1() -> None:
    assert header().pack()[4] == 1
    assert Header.unpack(header().pack()).text is None


@given(st.integers(0, PAGE * 8 - 1))
def test_any_turned_bit_of_a_text_is_damage(bit: int) -> None:
    page = bytearray(with_text(header()).pack())
    page[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Damaged):
        Header.unpack(page)


def test_a_text_longer_than_the_header_is_damage() -> None:
    page = bytearray(with_text(header()).pack())
    struct.pack_into("<I", page, 160, 4000)  # tokens
    struct.pack_into("<Q", page, 16, 0)
    struct.pack_into("<Q", page, 16, xxhash.xxh3_64_intdigest(page))
    with pytest.raises(Damaged, match="contradict"):
        Header.unpack(page)
