"""What an earlier commit has kept is read still, byte for byte, and written still.

`data/` holds it, and `make.py` wrote it. Each test works on a copy. What differs between any two
writers is left out of what is compared: nonces, and the words that Redis' writers draw.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import golden_cases as golden
import pytest
from golden_cases import CASES, DATA
from servers import ask, redis

EXPECTED = golden.expected()


def same_library(name: str) -> None:
    """Whoever has another zstd or lz4 may write other bytes. That he reads these is tested."""
    for use in {*CASES[name].codecs} & {*golden.LIBRARIES}:
        here, there = golden.LIBRARIES[use], EXPECTED["libraries"][use]
        if here != there:
            pytest.skip(f"the data are of {use} {there}; {here} is here")


def copied(of: str, tmp_path: Path) -> Path:
    target = tmp_path / "kept"
    shutil.copytree(DATA / of, target)
    return target


def same_tokens(name: str, found: str) -> None:
    case = CASES[name]
    assert found == EXPECTED["decoded"][name]
    assert (found == golden.digest(golden.caches(case))) == (not case.lossy)


@pytest.mark.parametrize("name", golden.FILES)
def test_files_are_read(tmp_path: Path, name: str) -> None:
    case, folder = CASES[name], copied(f"files/{name}", tmp_path)
    with golden.opened(case, golden.files(folder), tmp_path) as pipe:
        same_tokens(name, golden.retrieved(pipe, case))
    assert golden.tree(folder) == golden.tree(DATA / "files" / name), "nothing was thrown away"


@pytest.mark.parametrize("name", golden.FILES)
def test_files_are_written_as_they_were(tmp_path: Path, name: str) -> None:
    case, folder = CASES[name], tmp_path / "fresh"
    golden.write_files(case, folder, tmp_path)
    wrote, had = golden.tree(folder), golden.tree(DATA / "files" / name)
    assert {*wrote} == {*had}, "names"
    same_library(name)
    if case.random:  # each frame has a nonce of its own
        wrote, had = ({p: text.split(":")[0] for p, text in t.items()} for t in (wrote, had))
    assert wrote == had


@pytest.mark.parametrize("name", golden.DISK)
def test_a_disk_is_read(tmp_path: Path, name: str) -> None:
    folder = copied("disk", tmp_path)
    with golden.on_disk(name, folder, tmp_path) as pipe:
        same_tokens(name, golden.retrieved(pipe, CASES[name]))
        astray = CASES[name].ids.copy()
        astray[50:] = 7
        assert pipe.lookup(astray) == 48, "the index knows the links inside a chunk"


def test_a_disk_is_written_as_it_was(tmp_path: Path) -> None:
    """Nothing in it tells of time or place: there is no time to live, and `lock` is empty."""
    golden.write_disk(tmp_path / "fresh", tmp_path)
    assert golden.tree(tmp_path / "fresh") == golden.tree(DATA / "disk")


def test_a_log_is_read(tmp_path: Path) -> None:
    kept = golden.LOGGED
    folder = copied("disk-open", tmp_path)
    with golden.on_log(folder, tmp_path) as pipe:
        assert pipe.lookup(kept["dropped"].ids) == 0
        for name in ("pinned", "let go", "last"):
            assert golden.retrieved(pipe, kept[name]) == golden.digest(golden.caches(kept[name]))
        for n in range(3):
            golden.stored(pipe, golden.ONE._replace(seed=f"later {n}"))
        there = {name: pipe.lookup(case.ids) for name, case in kept.items()}
        assert there == {"dropped": 0, "pinned": 32, "let go": 0, "last": 0}


def test_a_log_is_written_as_it_was(tmp_path: Path) -> None:
    with golden.write_log(tmp_path / "fresh", tmp_path):
        assert golden.tree(tmp_path / "fresh") == golden.tree(DATA / "disk-open")


@pytest.mark.parametrize("name", golden.REDIS)
def test_redis_is_read_and_written(tmp_path: Path, name: str) -> None:
    case, before = CASES[name], (DATA / "redis" / f"{name}.resp").read_bytes()
    with redis() as server:
        golden.replay(server.port, before)
        had = golden.kept(server.port)
        assert golden.as_commands(had) == before
        with golden.opened(case, golden.redis_at(server.port), tmp_path) as pipe:
            same_tokens(name, golden.retrieved(pipe, case))
            assert golden.kept(server.port) == had, "nothing was thrown away"
            ask(server.port, "FLUSHALL")
            golden.stored(pipe, case)
        wrote, had = (golden.without_writers(x) for x in (golden.kept(server.port), had))
    if case.random:
        wrote, had = ({n: len(value) for n, value in x.items()} for x in (wrote, had))
    assert {*wrote} == {*had}, "names"
    assert [n for n in had if wrote[n] != had[n]] == []


@pytest.mark.parametrize("what", golden.IDENTITIES)
def test_names(tmp_path: Path, what: str) -> None:
    found = golden.names_of(golden.IDENTITIES[what], tmp_path)
    assert found == EXPECTED["names"][what]


def test_names_are_all_different() -> None:
    names = [each for found in EXPECTED["names"].values() for each in found]
    assert len({*names}) == len(names) == 2 * len(golden.IDENTITIES)


@pytest.mark.parametrize("name", [n for n in golden.FILES if CASES[n].codecs])
def test_codecs_are_in_the_data(name: str) -> None:
    """No frame of a whole chunk passed as it is. The header is read here by its description."""
    for path in (DATA / "files" / name).rglob("*.tlm"):
        raw = path.read_bytes()
        (tokens,) = struct.unpack_from("<I", raw, 160)
        frames, _, finer = struct.unpack_from("<HHH", raw, 186)
        assert frames == 2 * (1 + finer)
        codecs = [raw[at + 32 : at + 40].rstrip(b"\0") for at in range(200, 200 + 40 * frames, 40)]
        assert tokens < CASES[name].chunk or all(map(len, codecs))


def test_a_byte_that_differs_is_seen(tmp_path: Path) -> None:
    """Else all of this would prove nothing."""
    folder = copied("files/plain", tmp_path)
    path = sorted(folder.rglob("*.tlm"))[0]
    with path.open("r+b") as file:
        file.seek(4096)
        (byte,) = file.read(1)
        file.seek(4096)
        file.write(bytes([byte ^ 1]))
    with (
        golden.opened(CASES["plain"], golden.files(folder), tmp_path) as pipe,
        pytest.raises(AssertionError, match="Receipt"),
    ):
        golden.retrieved(pipe, CASES["plain"])
