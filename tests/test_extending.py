"""The examples of docs/extending.md, as they are written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"```\w+\n# (.+?)\n(.*?)```", TEXT, re.DOTALL))
SHELF = ("tierloom_shelf.py", "pyproject.toml", "test_shelf.py")

RUN = """
import sys, numpy, torch, tierloom
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.explain import explain

caches = [torch.randn(2, 40, 16, 2, 8) for _ in range(6)]
layout = tierloom.KVLayout.from_tensors(caches, order="NHD")
stages = {"keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"}}
stages |= {"pack": {"use": "gather"}, "host": {"use": "to_host"}}
stages |= {"cold": {"use": "put", "tier": "cold"}}
back = {"keys": {"use": "hash"}, "plan": {"use": "lookup", "tiers": ["cold"], "want": "prefix"}}
back |= {"fetch": {"use": "get"}, "grow": {"use": "decode"}, "place": {"use": "scatter"}}
for tier in (sys.argv[1], {"use": "tierloom_shelf:Shelf", "url": "here"}):
    config = {
        "version": 1, "tiers": {"cold": tier},
        "graphs": {"store": {"stages": stages}, "retrieve": {"stages": back, "deadline": "30 s"}},
    }
    print(explain(load_config(config)).splitlines()[6].strip())
    with tierloom.open(config, layout=layout, model="m") as pipe:
        tokens, slots = numpy.arange(600), numpy.arange(600)
        kept = [c.clone() for c in caches]
        assert pipe.store(tokens, caches, slots).wait().tokens == 600
        for c in caches:
            c.zero_()
        assert pipe.retrieve(tokens, caches, slots).wait().tokens == 600
        for c, was in zip(caches, kept):
            flat, right = (x.reshape(2, 640, 2, 8)[:, :600] for x in (c, was))
            assert torch.equal(flat, right)
        print(pipe.stats()["tiers"]["cold"]["puts"], "objects put")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The distribution built and installed by pip, in a folder of its own; its environment."""
    source, site = tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("site")
    for name in SHELF:
        (source / name).write_text(BLOCKS[name])
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--disable-pip-version-check", "--target", str(site), str(source)],
        check=True, timeout=100,
    )  # fmt: skip
    path = os.pathsep.join([str(site), str(ROOT / "src")])
    return source, os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def run(installed, *words: str) -> str:
    source, env = installed
    done = subprocess.run(
        [sys.executable, *words], env=env, cwd=source, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_ten_lines() -> None:
    assert len([line for line in BLOCKS["tierloom_shelf.py"].splitlines() if line]) <= 10


def test_a_pipeline_uses_it_by_url_and_by_place(installed) -> None:
    told = run(installed, "-c", RUN, "shelf://here").splitlines()
    assert told == [
        "cold: shelf url shelf://here", "3 objects put",
        "cold: tierloom_shelf:Shelf url here", "3 objects put",
    ]  # fmt: skip


def test_its_scheme_is_known_to_the_checker(installed) -> None:
    source, _ = installed
    (source / "p.yaml").write_text("version: 1\ntiers: {cold: 'shlef://here'}\ngraphs: {}\n")
    done = subprocess.run(
        [sys.executable, "-m", "tierloom.adapters.cli", "check", "./p.yaml"],
        env=installed[1], cwd=source, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no tier has URLs that begin with shlef://" in done.stderr
    assert "did you mean 'shelf'?" in done.stderr


def test_it_passes_the_contract(installed) -> None:
    told = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shelf.py")
    assert re.search(r"\d\d passed", told)
    assert "warning" not in told


@pytest.fixture
def written(tmp_path):
    """All examples in a folder that Python imports from, and its environment."""
    for name, text in BLOCKS.items():
        if name not in SHELF:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    return tmp_path, os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


STAGE = """
import numpy, torch, tierloom

caches = [torch.randn(2, 40, 16, 2, 8) for _ in range(6)]
layout = tierloom.KVLayout.from_tensors(caches, order="NHD")
with tierloom.open("./only_long.yaml", layout=layout, model="m") as pipe:
    for n in (150, 400):
        print(pipe.store(numpy.arange(n), caches, numpy.arange(n)).wait().tokens)
"""


def test_a_stage(written) -> None:
    assert run(written, "-c", STAGE).split() == ["0", "400"]


CODEC = """
from tierloom.stages.catalog import CODECS, STAGES, Codec
line = {line}
CODECS[line.id] = line
STAGES[line.name] = f"{{line.full_module}}:{{line.stage}}"
"""
ROUND = """
import numpy, torch, tierloom
store = {"pack": {"use": "gather"}, "host": {"use": "to_host"}, "small": {"use": "deflate"}}
store["cold"] = {"use": "put", "tier": "cold"}
store = {"keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"}} | store
back = {"keys": {"use": "hash"}, "plan": {"use": "lookup", "tiers": ["cold"], "want": "prefix"}}
back |= {"fetch": {"use": "get"}, "grow": {"use": "decode"}, "place": {"use": "scatter"}}
config = {
    "version": 1, "tiers": {"cold": {"use": "files", "path": "kept"}},
    "graphs": {"store": {"stages": store}, "retrieve": {"stages": back, "deadline": "30 s"}},
}
caches = [torch.randn(2, 40, 16, 2, 8) for _ in range(6)]
layout = tierloom.KVLayout.from_tensors(caches, order="NHD")
with tierloom.open(config, layout=layout, model="m") as pipe:
    tokens, slots, kept = numpy.arange(512), numpy.arange(512), [c.clone() for c in caches]
    assert pipe.store(tokens, caches, slots).wait().tokens == 512
    for c in caches:
        c.zero_()
    assert pipe.retrieve(tokens, caches, slots).wait().tokens == 512
    assert all(torch.equal(c[:, :32], k[:, :32]) for c, k in zip(caches, kept))
    print(pipe.stats()["tiers"]["cold"]["puts"], "objects put")
"""


def test_a_codec(written) -> None:
    folder, _ = written
    line = CODEC.format(line=BLOCKS["registry line"])
    (folder / "conftest.py").write_text(line)
    assert "2 objects put" in run(written, "-c", line + ROUND)
    told = run(written, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_deflate.py")
    assert re.search(r"\d\d passed", told)


def test_a_kernel(written) -> None:
    folder, env = written
    told = run((folder, env | {"TRITON_INTERPRET": "1"}), "absmax/check.py")
    assert told == "all three agree\n"


def test_an_adapter(written) -> None:
    assert run(written, "toy_engine.py") == "512 tokens computed for two prefills of 512\n"


OLD = """
from dataclasses import dataclass
from tierloom.stages.base import Lane, LoopStage

@dataclass(frozen=True, kw_only=True)
class Nothing:
    "No options."

class Drop(LoopStage):
    Options = Nothing
    takes = gives = "keys@host/request"
    lane = Lane.LOOP

    async def plan_async(self, ticket):
        ticket.pieces = ticket.pieces[:1]
"""


def test_a_stage_of_the_release_before(written) -> None:
    """Its names still work, and say what takes their place."""
    folder, env = written
    (folder / "only_long.py").write_text(OLD)
    text = BLOCKS["only_long.yaml"].replace("OnlyLong, least: 200", "Drop")
    text = text.replace('"only_long:OnlyLong", least: 200', '"only_long:Drop"')
    (folder / "only_long.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", STAGE], env=env, cwd=folder,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.split() == ["150", "256"], done.stderr
    assert "RequestStage and BatchStage" in done.stderr
    assert "request.pieces is request.chunks" in done.stderr
