"""`tierloom inspect` on what real pipelines keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Engine, Open, settle, tokens, with_disk

from tierloom.adapters.cli.inspect_object import inspect_object


def kept(opened: Open, folder: Path, use: str, codec: str = "zstd", **options: str) -> None:
    """128 tokens, in two objects, encoded; the pipeline is closed again."""
    engine = Engine(dim=64)
    for t in engine.flat:
        t.copy_(t.round())
    source = with_disk(folder)
    if use == "files":
        source["tiers"]["warm"] = {"use": "files", "path": str(folder)}
    stages = source["graphs"]["store"]["stages"]
    del stages["warm"]
    stages |= {"host": {"use": "to_host", "from": "pack"}, "small": {"use": codec, **options}}
    stages["warm"] = {"use": "put", "tier": "warm", "when_full": "block"}
    pipe = opened(source, engine)
    assert pipe.store(tokens(128), engine.caches, engine.slots(128)).wait().tiers["warm"] == 2
    settle(pipe)
    pipe.close()


def test_objects_of_a_disk_tier(
    opened: Open,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    kept(opened, tmp_path, "disk")
    assert inspect_object(str(tmp_path)) == 0
    keys = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "│" in line][-2:]
    assert inspect_object(f"{tmp_path}@{keys[0][:12]}") == 0
    out = capsys.readouterr().out
    assert keys[0] in out
    assert "planes zstd" in out
    assert "whole" in out
    assert inspect_object(f"{tmp_path}@{'0' * 60}") == 2
    assert "0 objects" in capsys.readouterr().err
    (segment,) = tmp_path.glob("segment-*.slab")
    raw = bytearray(segment.read_bytes())
    raw[raw.find(b"TLM1") + 5000] ^= 1
    segment.write_bytes(raw)
    assert sorted(inspect_object(f"{tmp_path}@{k}") for k in keys) == [0, 1]


def test_objects_of_a_files_tier(opened: Open, tmp_path: Path) -> None:
    kept(opened, tmp_path, "files")
    files = list(tmp_path.rglob("*.tlm"))
    assert [inspect_object(str(f)) for f in files] == [0, 0]


@pytest.mark.parametrize(
    ("codec", "level", "said", "frames"),
    [
        ("cachegen", "small", ["cachegen, small"], 3),
        ("cachegen", "paper-2", ["cachegen, paper-2"], 3),
        ("progressive", "high", [f"progressive, to {n}" for n in ("small", "default", "high")], 9),
    ],
)
def test_levels_of_frames(
    opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, codec: str, level: str, said: list[str], frames: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    kept(opened, tmp_path, "files", codec, level=level)
    for file in tmp_path.rglob("*.tlm"):
        assert inspect_object(str(file)) == 0
        out = capsys.readouterr().out
        assert [out.count(words) for words in said] == [frames // len(said)] * len(said)
        assert "4 to 5" in out
