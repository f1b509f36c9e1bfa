"""A tier of a third party, as docs/plugins.md writes it: installed, in a pipeline, and tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```\w+\n# (\S+)\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.S)

RUN = """
import sys, numpy, torch, tierloom
from tierloom.pipeline.config.load import load
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
    print(explain(load(config)).splitlines()[6].strip())
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
    assert [name for name, _ in BLOCKS] == ["tierloom_shelf.py", "pyproject.toml", "test_shelf.py"]
    for name, text in BLOCKS:
        (source / name).write_text(text)
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


def test_it_is_fifteen_lines() -> None:
    assert len([line for line in dict(BLOCKS)["tierloom_shelf.py"].splitlines() if line]) <= 15


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
