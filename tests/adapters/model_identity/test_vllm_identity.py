"""What an engine's KV is called and what is counted: parts of the vLLM connector, without vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import missing

from tierloom.adapters.model_identity import weights as weight_files
from tierloom.adapters.model_identity.config import config_text, strip_starts
from tierloom.adapters.vllm.exchange.identity import adapter_id, drafted, weights_id
from tierloom.stages.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "transformers_version": "5.0.0", "_name_or_path": "/somewhere", "use_cache": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two weight files."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "a.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "b.safetensors").write_bytes(b"b" * 5000)
    return made


def engine(folder: Path | str, **changes: Any) -> Any:
    """As much of a VllmConfig as is read; `changes` go to whichever part has the name."""
    parts = [
        {"model": str(folder), "model_weights": "", "revision": None, "hf_config": config(),
         "dtype": "torch.bfloat16", "quantization": None, "quantization_config": None, "seed": 0,
         "max_model_len": 4096},
        {"load_format": "auto", "download_dir": None, "model_loader_extra_config": {}},
        {"cache_dtype": "auto", "block_size": 16, "kv_cache_dtype_skip_layers": []},
    ]  # fmt: skip
    for name, value in changes.items():
        (part,) = [p for p in parts if name in p]
        part[name] = value
    model, load, cache = (SimpleNamespace(**p) for p in parts)
    return SimpleNamespace(model_config=model, load_config=load, cache_config=cache)


def config(**changes: Any) -> Any:
    return SimpleNamespace(to_dict=lambda: CONFIG | changes)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 1]))


def test_a_copy_elsewhere_has_the_same_name(folder: Path, tmp_path: Path) -> None:
    name = weights_id(engine(folder))
    assert (len(name), int(name, 16) > 0) == (64, True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    (copy / "checkpoint-1").mkdir()
    (copy / "checkpoint-1" / "c.safetensors").write_bytes(b"c")
    assert weights_id(engine(copy)) == name


def test_what_changes_no_kv_changes_no_name(folder: Path) -> None:
    name = weights_id(engine(folder))
    for same in ({"seed": 1}, {"block_size": 128}, {"max_model_len": 99}, {"revision": "main"}):
        assert weights_id(engine(folder, **same)) == name, same
    same_config = config(transformers_version="6", _name_or_path="/x", use_cache=False)
    assert weights_id(engine(folder, hf_config=same_config)) == name


def test_what_changes_kv_changes_the_name(folder: Path) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"dtype": "torch.float32"},
        {"quantization": "fp8"},
        {"cache_dtype": "fp8"},
        {"kv_cache_dtype_skip_layers": ["0"]},
        {"hf_config": config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})},
        {"load_format": "tensorizer"},
        {"load_format": "tensorizer", "model_loader_extra_config": {"tensorizer_uri": "s3://b"}},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 1},
    )
    names = [weights_id(engine(folder, **change)) for change in ({}, *changes)]
    assert len(set(names)) == len(names)


def test_long_rope_is_chosen_by_the_longest_prompt(folder: Path) -> None:
    for kind in ("longrope", "su"):
        long_rope = {"hf_config": config(rope_scaling={"type": kind})}
        short, long = (
            weights_id(engine(folder, max_model_len=n, **long_rope)) for n in (4096, 8192)
        )
        assert short != long


def test_every_byte_of_small_weights_counts(folder: Path) -> None:
    names = {weights_id(engine(folder))}
    for file, at in (("a.safetensors", 0), ("a.safetensors", 10_239), ("b.safetensors", 2500)):
        flip(folder / file, at)
        names.add(weights_id(engine(folder)))
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    names.add(weights_id(engine(folder)))
    assert len(names) == 5


def test_large_weights_are_sampled_and_small_files_beside_them_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "WHOLE", 0)
    large = folder / "a.safetensors"
    with large.open("wb") as f:
        f.truncate(8 << 20)
    name = weights_id(engine(folder))
    assert weights_id(engine(folder)) == name
    gap = weight_files.STRIP + 1
    flip(large, gap)
    assert weights_id(engine(folder)) == name, "between the strips: documented as unseen"
    flip(large, gap)
    for file, at in ((large, 0), (large, (8 << 20) - 1), (folder / "b.safetensors", 4000)):
        flip(file, at)
        assert weights_id(engine(folder)) != name
        flip(file, at)
    with large.open("r+b") as f:
        f.truncate((8 << 20) + 1)
    assert weights_id(engine(folder)) != name


def test_strips_reach_from_the_first_byte_to_the_last() -> None:
    starts = list(strip_starts(10_001, 100, 64))
    assert (len(starts), starts[0], starts[-1]) == (64, 0, 9901)
    assert all(b - a >= 100 for a, b in pairwise(starts))


def test_only_the_kind_that_is_loaded_counts(folder: Path) -> None:
    name = weights_id(engine(folder))
    (folder / "pytorch_model.bin").write_bytes(b"bin")
    (folder / "model.pt").write_bytes(b"pt")
    assert weights_id(engine(folder)) == name
    pt = weights_id(engine(folder, load_format="pt"))
    assert pt not in (name, weights_id(engine(folder, load_format="npcache")))
    flip(folder / "a.safetensors", 0)
    assert weights_id(engine(folder, load_format="pt")) == pt


def test_a_single_file_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    name = weights_id(engine(file))
    flip(file, 3)
    assert weights_id(engine(file)) != name


def test_where_no_file_is_the_name_stands_for_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = weights_id(engine(folder))
    assert not caplog.records
    away = {
        name,
        weights_id(engine(folder, model_weights="s3://bucket/one")),
        weights_id(engine(folder, model_weights="s3://bucket/two")),
        weights_id(engine("tierloom-tests/not-there")),
        weights_id(engine("tierloom-tests/not-there", revision="v2")),
        weights_id(engine("/not/there")),
    }
    assert len(away) == 6
    assert "no weight files found for s3://bucket/one" in caplog.text
    assert "tierloom.weights" in caplog.text


def test_a_hub_id_is_found_in_the_local_cache(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repo = tmp_path / "hub" / "models--org--name"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / ("0" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in folder.glob("*.safetensors"):
        shutil.copy(file, blobs / file.stem)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.stem))
    there = engine("org/name", download_dir=str(tmp_path / "hub"))
    assert weights_id(there) == weights_id(engine(folder))


def test_a_weight_file_that_is_being_replaced_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pread", lambda fd, n, at: b"")
    with pytest.raises(OSError, match=r"a\.safetensors became shorter"):
        weights_id(engine(folder))


def test_a_config_as_text_names_no_place() -> None:
    parts = {"text_config": {"_name_or_path": "/a", "rope_theta": 1.0}, "output_attentions": True}
    assert config_text(CONFIG | parts) == config_text(
        CONFIG | {"text_config": {"rope_theta": 1.0}, "_commit_hash": "x"}
    )
    assert "10000.0" in config_text(CONFIG)
    assert config_text({"q": object(), "s": {"b", "a"}}) == '{"q": "object", "s": ["a", "b"]}'


def test_adapters_are_named_by_content(tmp_path: Path) -> None:
    def made(name: str, weights: bytes = b"w" * 100, **changes: Any) -> str:
        at = tmp_path / name
        at.mkdir()
        config = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": name, **changes}
        (at / "adapter_config.json").write_text(json.dumps(config))
        (at / "adapter_model.safetensors").write_bytes(weights)
        return adapter_id(at)

    first = made("a")
    assert made("b", inference_mode=True) == first
    assert len({first, made("c", b"v" * 100), made("d", lora_alpha=32)}) == 3


@pytest.mark.parametrize("where", [".", "not-there", "org/not-there-either"])
def test_an_adapter_without_weights_has_no_name(where: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter weights"):
        adapter_id(tmp_path if where == "." else where)
    (tmp_path / "adapter_model.bin").write_bytes(b"w")
    with pytest.raises(InputError, match=r"adapter_config\.json cannot be read"):
        adapter_id(tmp_path)


METRICS = """
import json, pickle
import msgspec
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from tierloom.adapters.vllm.exchange.messages import Save
from tierloom.adapters.vllm.exchange.metrics import PromMetrics, Stats
from tierloom.adapters.vllm.worker.transfer_log import TransferLog
from tierloom.stages.kv.prefix import Span

stats = Stats()
assert isinstance(stats, KVConnectorStats) and stats.is_empty() and stats.reduce() == {}
stats.add(asked_tokens=2048, loads=1, load_tokens=2016, load_bytes=92_000_000, load_seconds=0.05)
stats.count("hit_tokens.hot", 2016)
stats.count("lost.corrupt")
stats.count("stores", 0)
assert "stores" not in stats.data and not stats.is_empty()
for seconds in (0.002, 0.3):
    stats.note("load_duration_seconds", seconds)
wired = msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict()))
there = Stats(data=wired)
assert there == stats == pickle.loads(pickle.dumps(stats))
sum_ = there.aggregate(stats)
assert wired == stats.data, "the dict of the wire is not ours to change"
taken = sum_.take()
assert sum_.is_empty() and taken.data["load_tokens"] == 4032 and taken.data["lost.corrupt"] == 2

kinds = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
config = type("Config", (), {"kv_transfer_config": None})()
prom = PromMetrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
prom.observe(taken.to_dict(), 1)
prom.observe({"loads": 1}, 1)
for unknown in ({"new": 1, "new.x": 1, "hit_tokens.": 1, "loads": "x"}, {"stores": float("nan")},
                {"stores": float("inf")}, {"stores": -1}, {"load_tokens": {"a": 1}}):
    prom.observe(unknown, 0)
prom.observe({"loads": 1, "lost.corrupt": 1, "now.0": {"off": 1.0}}, 7)

figures = {"0": {
    "off": None, "stages": {}, "graphs": {}, "arena": dict(used=3, flight=1, total=8, leases=2),
    "tiers": {"hot": dict(
        nbytes=5, capacity=9, objects=1, bytes_in=0, bytes_out=0, reads_down_since=0,
        writes_down_since=7.0, latency=0.5, bandwidth=4, hits=3,
    )},
}}
log = TransferLog(1, lambda: figures)
first, second = log.take(), log.take()
assert list(first.data) == ["now.1"] and second is None, "once a second"
assert first.is_empty() and first.reduce() == {}, "no log line for gauges alone"
other = TransferLog(0, lambda: {"0": figures["0"] | {"off": "why", "tiers": {}}}).take()
whole = Stats(data=msgspec.msgpack.decode(msgspec.msgpack.encode(first.aggregate(other).data)))
prom.observe(whole.to_dict(), 1)
figures["0"]["tiers"]["hot"]["nbytes"] = 6
later = TransferLog(1, lambda: figures).take()
prom.observe(later.to_dict(), 1)
prom.observe({"now.0": {"tier_used_bytes|a|b": 1, "other": 2, "off": "x"}, "now.": 3}, 0)
assert TransferLog(0, dict).take() is None, "where nothing is kept"
broken = TransferLog(0)
broken.stored(Save(1, "r", Span(b"", b"", 0, 0), ()), [])
assert not [name for name in broken.stats.data if name.endswith("size_bytes")]
text = [line for line in generate_latest().decode().splitlines() if "_created" not in line]
print(json.dumps({"text": text, "reduced": taken.reduce()}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_metrics(tmp_path: Path) -> None:
    """In the environment of vLLM, whose classes are subclassed."""
    if not PYTHON.exists():
        missing("vllm", f"{PYTHON} is not there", "make vllm")
    done = subprocess.run(
        [PYTHON, "-c", METRICS], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["reduced"] == {
        "loaded tokens": 4032, "loaded GB": 0.184, "load GB/s": 1.84, "asked tokens": 4096,
        "hit tokens hot": 4032, "lost corrupt": 2,
    }  # fmt: skip
    ours = {line for line in got["text"] if line.startswith("vllm:tierloom")}
    one = 'engine="1",model_name="m"'
    assert {
        f"vllm:tierloom_loads_total{{{one}}} 3.0",
        f"vllm:tierloom_load_bytes_total{{{one}}} 1.84e+08",
        f'vllm:tierloom_hit_tokens_total{{{one},tier="hot"}} 4032.0',
        f'vllm:tierloom_lost_chunks_total{{cause="corrupt",{one}}} 2.0',
        'vllm:tierloom_store_seconds_total{engine="0",model_name="m"} 0.0',
        'vllm:tierloom_lost_chunks_total{cause="no_room",engine="0",model_name="m"} 0.0',
        'vllm:tierloom_load_duration_seconds_bucket{engine="1",le="0.005",model_name="m"} 2.0',
        'vllm:tierloom_load_duration_seconds_bucket{engine="1",le="0.5",model_name="m"} 4.0',
        f"vllm:tierloom_load_duration_seconds_count{{{one}}} 4.0",
        f'vllm:tierloom_tier_used_bytes{{{one},tier="hot"}} 6.0',
        f'vllm:tierloom_tier_up{{direction="puts",{one},tier="hot"}} 0.0',
        f'vllm:tierloom_tier_up{{direction="reads",{one},tier="hot"}} 1.0',
        f'vllm:tierloom_arena_bytes{{{one},use="kept"}} 4.0',
        f"vllm:tierloom_off{{{one}}} 1.0",
    } <= ours
    assert not [line for line in ours if 'engine="0"' in line and not line.endswith(" 0.0")]


def test_a_draft_models_weights_are_in_the_name(folder: Path, tmp_path: Path) -> None:
    """Its KV lies beside the model's own; drafts without KV change no name."""
    draft = tmp_path / "draft"
    shutil.copytree(folder, draft)

    def named(method: str) -> str:
        made = engine(folder)
        made.speculative_config = SimpleNamespace(
            method=method, draft_model_config=engine(draft).model_config, num_speculative_tokens=3
        )
        return weights_id(made)

    plain = weights_id(engine(folder))
    assert named("ngram") == plain
    first = named("draft_model")
    assert first != plain
    (draft / "b.safetensors").write_bytes(b"c" * 5000)
    assert named("draft_model") not in (first, plain)
    made = engine(folder, max_model_len=2048)
    assert drafted(made) == 0
    made.speculative_config = SimpleNamespace(
        method="draft_model", draft_model_config=made.model_config, num_speculative_tokens=3
    )
    assert drafted(made) == 2045
