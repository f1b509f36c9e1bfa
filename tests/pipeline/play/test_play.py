"""Pipelines with made-up KV, codecs on KV at hand, and what a notebook shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import tierloom
from tierloom import codecs
from tierloom.pipeline.playing import SHAPES, Playground
from tierloom.pipeline.run.request_trace import Trace
from tierloom.stages.contract.request import Receipt
from tierloom.stages.errors import ConfigError, InputError, Lost
from tierloom.testing import noise

SMALL = (6, 2, 32)


@pytest.fixture
def pipe() -> Iterator[Playground]:
    with tierloom.play("tiered", SMALL, 600) as pipe:
        yield pipe


def drawn(svg: str) -> str:
    """The words of a picture, which is well-formed and has all of them inside."""
    root = ElementTree.fromstring(svg)
    wide, high = float(root.attrib["width"]), float(root.attrib["height"])
    words = []
    for part in root.iter():
        if part.tag.endswith("text"):
            x, y = float(part.attrib["x"]), float(part.attrib["y"])
            assert 0 <= x <= wide, part.text
            assert 0 <= y <= high, part.text
            words.append(part.text or "")
        elif part.tag.endswith("rect"):
            right = float(part.attrib.get("x", 0)) + float(part.attrib["width"])
            assert right <= wide + 1
    return "\n".join(words)


def test_there_and_back(pipe: Playground) -> None:
    assert pipe.store().wait().tiers == {"hot": 3, "warm": 3}
    assert pipe.lookup() == 600
    pipe.empty()
    assert pipe.error() == 1.0
    assert pipe.retrieve(pipe.tokens[:256]).wait().tokens == 256
    assert 0 < pipe.error() < 1
    assert pipe.retrieve().wait().tokens == 600
    assert pipe.error() == 0.0


def test_what_came_wrong_is_seen(pipe: Playground) -> None:
    pipe.caches[3].view(torch.int16)[0, 1, 2, 0, 5] ^= 1
    assert pipe.error() > 0


def test_a_codec_with_loss() -> None:
    with tierloom.play("cachegen", (6, 2, 64), 512) as pipe:
        assert pipe.store().wait().tiers == {"hot": 2, "warm": 2}
        pipe._portal.call(pipe.tiers["hot"].clear)
        pipe.empty()
        assert pipe.retrieve().wait().tiers == {"warm": 2}
        assert 0 < pipe.error() < 0.1


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_shapes_known_by_name(shape: str) -> None:
    """A latent as well."""
    with tierloom.play("minimal", shape, 20) as pipe:
        assert pipe.store().wait().tokens == 20
        pipe.empty()
        assert pipe.retrieve().wait().tokens == 20
        assert pipe.error() == 0.0
        assert (pipe.layout.layers, pipe.layout.dim) == SHAPES[shape][::2]


def test_its_folder_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe = tierloom.play("tiered", SMALL, 300)
    pipe.store().wait()
    (folder,) = tmp_path.glob("tierloom-play-*")
    assert (folder / "warm").is_dir()
    pipe.close()
    assert not folder.exists()
    for wrong in ({"preset": "teired"}, {"shape": "lama"}, {"tokens": 0}):
        with pytest.raises((ConfigError, InputError)):
            tierloom.play(**wrong)
    with pytest.raises(ConfigError):
        tierloom.play("tiered", SMALL, 10, overrides={"order": "native", "chunk.tokens": 24})
    assert not list(tmp_path.iterdir())


def test_memory_fits_what_is_stored(pipe: Playground) -> None:
    needed = 600 * 6 * 2 * 2 * 32 * 2
    assert needed < pipe.spec.tiers["hot"].options.capacity < 4 * needed
    with tierloom.play("tiered", SMALL, 64, overrides={"tiers.hot.capacity": "9 MiB"}) as other:
        assert other.spec.tiers["hot"].options.capacity == 9 << 20


def test_unknown_keywords_are_named_with_the_nearest(pipe: Playground) -> None:
    with pytest.raises(TypeError, match=r"store\(\) has no keyword 'slat': did you mean 'salt'"):
        pipe.store(slat="x")
    with pytest.raises(TypeError, match="has no keyword 'tag': did you mean 'tags'"):
        pipe.begin_lookup(pipe.tokens, tag={})
    with pytest.raises(TypeError, match="has no keyword 'blocks'"):
        pipe.begin_lookup(pipe.tokens, blocks=[1])
    with pytest.raises(TypeError, match=r"open\(\) has no keyword 'weight': did you mean"):
        tierloom.open("minimal", layout=pipe.layout, model="m", weight="x")
    with pytest.raises(TypeError, match=r"play\(\) has no keyword 'replicas'"):
        tierloom.play("minimal", SMALL, 10, replicas=True)


def test_a_trace_has_every_stage_of_every_request(pipe: Playground) -> None:
    with pipe.trace() as trace:
        pipe.store().wait()
        pipe.empty()
        pipe.retrieve().wait()
    pipe.retrieve().wait()
    spans = trace.spans
    assert {s.request for s in spans} == {1, 2}
    for number, graph in ((1, "store"), (2, "retrieve")):
        mine = [s for s in spans if s.request == number]
        assert {s.graph for s in mine} == {graph}
        assert {s.stage for s in mine} == {n.id for n in pipe.spec.graphs[graph].nodes}
        assert all(0 <= s.begin <= s.end for s in mine)
        assert sum(s.chunks for s in mine if s.stage in ("pack", "fetch")) == 3
    assert repr(trace).startswith("<Trace of 2 requests: ")
    words = drawn(trace._repr_html_())
    assert "1 store" in words
    assert "place" in words


def test_one_trace_at_a_time_and_none_is_left(pipe: Playground) -> None:
    with pipe.trace(), pytest.raises(InputError, match="another trace"):
        pipe.trace().__enter__()
    watches = [m.watch for r in pipe._runners.values() for m in r.meters.values()]
    assert watches
    assert not any(watches)
    with pipe.trace() as again:
        pass
    assert "no request" in drawn(again._repr_html_())


def test_a_trace_survives_what_goes_wrong(pipe: Playground) -> None:
    with pipe.trace() as trace:
        pipe.retrieve().cancel()
        pipe.store(deadline=1e-9).wait()
        pipe.store().wait()
    drawn(trace._repr_html_())
    assert isinstance(trace, Trace)


def test_pictures(pipe: Playground) -> None:
    pipe.store().wait()
    words = drawn(pipe._repr_html_())
    assert "3 x " in words
    assert "3: " in words
    assert " of " in words
    assert repr(pipe) == "<Pipeline tiered, tiers: hot (memory), warm (disk)>"
    assert repr(pipe.spec) == (
        "<PipelineSpec tiered, tiers: hot (memory), warm (disk), graphs: store, retrieve>"
    )
    pipe.close()
    assert "closed" in repr(pipe)
    assert "3 x " not in drawn(pipe._repr_html_())


@pytest.mark.parametrize("name", tierloom.presets())
def test_every_preset_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierloom.pipeline.config.load import load_config

    monkeypatch.setattr("tierloom.pipeline.config.load.memory_here", lambda: 1 << 40)
    spec = load_config(name)
    words = drawn(spec._repr_html_()).splitlines()
    assert not {n.id for g in spec.graphs.values() for n in g.nodes} - set(words)
    assert not set(spec.tiers) - set(words)


def test_receipts_and_layouts_are_drawn(pipe: Playground) -> None:
    lost = {Lost.TIER_DOWN: 1}
    words = drawn(Receipt(600, 1 << 21, lost, {"a<b": 3}, 0.5)._repr_html_())
    for part in ("600 tokens: 2 MiB in 500 ms, 4 MiB/s", "a<b", "lost: tier_down", "1 chunk"):
        assert part in words
    assert "no chunk" in drawn(Receipt(0, 0, {}, {}, 0.0)._repr_html_())
    words = drawn(pipe.layout._repr_html_())
    assert "K and V" in words
    assert "1,536 bytes a token" in words
    for order, shape in (("BHNC-KT", (4, 2, 16, 64)), ("MLA", (4, 16, 64))):
        drawn(tierloom.KVLayout.from_tensors([torch.zeros(shape)], order=order)._repr_html_())


def test_codecs_are_measured() -> None:
    kv = noise(2, 6, 300, 2, 64).bfloat16()
    before = kv.clone()
    names = ["none", "zstd", "int8", "int4", "cachegen:small", "progressive:high", "int4+zstd"]
    found = codecs.measure(kv, names)
    assert torch.equal(kv, before)
    bits = {f.codec: f.bits for f in found}
    error = {f.codec: f.error for f in found}
    assert list(bits) == names
    assert bits["none"] == 16
    assert bits["none"] > bits["zstd"] > bits["int8"] > bits["int4"] > bits["cachegen:small"]
    assert error["none"] == error["zstd"] == 0.0
    assert 0 < error["int8"] < error["int4"] < error["cachegen:small"] < 0.3
    assert error["progressive:high"] < error["int4"] == error["int4+zstd"]
    assert bits["int4+zstd"] <= bits["int4"]
    assert all(f.encodes > 0 < f.decodes for f in found)
    assert len(str(found).splitlines()) == 1 + len(names)
    assert "<td" in found._repr_html_()
    words = drawn(found.plot()._repr_html_())
    assert not [name for name in names if name not in words]
    assert drawn(codecs.measure(kv, []).plot().svg)


def test_what_cannot_be_measured_is_said() -> None:
    kv = noise(2, 2, 40, 2, 64)
    for wrong, kind, words in (
        (lambda: codecs.measure(kv[0], ["int4"]), InputError, "wants a tensor"),
        (lambda: codecs.measure(kv * float("nan"), ["int4"]), InputError, "NaN"),
        (lambda: codecs.measure(kv, ["int5"]), ConfigError, "did you mean 'int"),
        (lambda: codecs.measure(kv, ["zstd:99"]), ConfigError, "1..19"),
        (lambda: codecs.measure(kv, ["int4"], chunk=0), InputError, "at least 1"),
    ):
        with pytest.raises(kind, match=words):
            wrong()


def test_public_names_are_listed_and_nothing_heavy_comes_along() -> None:
    assert not {"play", "presets", "Graph", "codecs", "open"} - set(dir(tierloom))
    assert "annotations" not in dir(tierloom)
    assert all(getattr(tierloom, name) is not None for name in tierloom.__all__)
    code = (
        "import sys, tierloom, tierloom.graphs; dir(tierloom); tierloom.presets(); tierloom.Graph;"
        "heavy = {'torch', 'numba', 'matplotlib', 'IPython'} & sys.modules.keys();"
        "tierloom.play('minimal', (2, 1, 8), 16)._repr_html_();"
        "heavy |= {'matplotlib', 'IPython', 'ipykernel'} & sys.modules.keys(); print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stdout
