"""`tierloom calibrate`, and frames that only a calibration can read."""

from __future__ import annotations

import contextlib
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import TINY, Letters, tiny_llama

import tierloom
from tierloom.adapters.cli import commands as cli
from tierloom.adapters.model_identity.weights import files_id
from tierloom.adapters.quality import arms as quality_arms, calibrate, subject as quality_subject
from tierloom.adapters.quality.arms import Stored
from tierloom.adapters.quality.measure import references, score
from tierloom.adapters.quality.subject import subject_of
from tierloom.adapters.transformers.cache import layout_of
from tierloom.adapters.transformers.cached_model import CachedModel
from tierloom.adapters.vllm.exchange.identity import calibrated_id
from tierloom.stages.codecs.cachegen import calibration
from tierloom.stages.codecs.cachegen.coder import HEAD, CodedHead
from tierloom.stages.codecs.cachegen.frame import STEPS
from tierloom.stages.codecs.cachegen.stage import LEVELS, CacheGen, CacheGenOptions
from tierloom.stages.codecs.contract.decoding import decode_frame
from tierloom.stages.codecs.contract.frame_shape import FrameShape, Site
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.contract.stage import ModelFacts
from tierloom.stages.errors import BadObject, ConfigError, TierloomError
from tierloom.stages.kv.object import Header
from tierloom.testing import header_of, mutations

if TYPE_CHECKING:
    from pathlib import Path

    from tierloom.adapters.quality.subject import Subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    found: Subject = subject_of("tiny", tiny_llama().bfloat16(), Letters())
    return found


@pytest.fixture(scope="module")
def seen(subject: Subject) -> calibrate.Seen:
    found: calibrate.Seen = calibrate.observe(subject)
    return found


@pytest.fixture(scope="module")
def data(subject: Subject, seen: calibrate.Seen) -> bytes:
    return calibrate.learned(seen, subject, {})


@pytest.fixture(scope="module")
def transforming(subject: Subject, seen: calibrate.Seen) -> bytes:
    """With a transform of each head for level small."""
    return calibrate.learned(seen, subject)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No files but those of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_known", {})


def made_for(subject: Subject) -> bytes:
    made: bytes = calibrate.learned(calibrate.observe(subject), subject)
    return made


def kept(data: bytes) -> Path:
    calibration.calibrations_folder().mkdir(parents=True, exist_ok=True)
    path = calibration.calibrations_folder() / "one.safetensors"
    path.write_bytes(data)
    return path


def encoded(
    path: Path, kv: torch.Tensor, start: int, level: Any = "default"
) -> tuple[EncodedFrame, FrameShape, Site]:
    options = CacheGenOptions(level=level, calibration=str(path))
    codec = CacheGen(options, None)  # type: ignore[arg-type]
    header = header_of(kv)
    raw = kv.contiguous().view(torch.uint8).numpy().tobytes()
    frame, shape = EncodedFrame(raw, len(raw), b""), FrameShape.of(header, 0, start)
    site = Site(header, 0, b"")
    return codec.frame(frame, shape, site), shape._replace(start=-1), site


@pytest.fixture(scope="module")
def kv(subject: Subject) -> torch.Tensor:
    return references(subject, TINY, 1)[0].kv


def test_the_same_model_gives_the_same_bytes(subject: Subject, data: bytes) -> None:
    assert calibrate.learned(calibrate.observe(subject), subject, {}) == data


def test_the_model_is_left_as_it_was() -> None:
    """RoPE's frequencies too, which a dtype of 16 bits would round."""
    model = tiny_llama()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    subject = subject_of("tiny", model, Letters())
    before = [b.clone() for b in (*model.buffers(), *model.parameters())]
    assert len(calibrate._fingerprints(subject)) == 2
    after = (*model.buffers(), *model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_what_was_learned(subject: Subject, data: bytes) -> None:
    found = calibration.read_calibration(kept(data))
    shape = subject.shape
    assert found.means.shape == (2, shape.layers, shape.heads * shape.dim)
    assert found.models >= {subject.weights}
    assert len(found.models) == 2, "as float32, and as the bfloat16 that it was"
    assert (found.steps[0] < found.steps[1]).all()
    assert (found.steps[1] < found.steps[2]).all()
    assert all(1 < len(b.tables) <= 64 for b in found.books)
    assert calibration.for_model(subject.weights) is found
    assert calibration.for_model("") is None


def test_safetensors_reads_it(data: bytes) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    ours = calibration.from_safetensors(data)[1]
    theirs = safetensors.load(data)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_frames_are_smaller_and_as_good(subject: Subject, seen: calibrate.Seen) -> None:
    data = calibrate.learned(seen, subject, {}, STEPS)  # steps as they are without it
    captured = references(subject, TINY, 2)
    found = []
    for with_file in (False, True):
        if with_file:
            kept(data)
        with Stored("cachegen:high", subject, TINY.chunk) as arm:
            found.append((arm, score(subject, arm, captured)))
    own, learned = (s for _, s in found)
    payload = [sum(o.payload for o in s.outcomes) for s in (own, learned)]
    assert payload[1] < payload[0]
    assert learned.report()["kl"] < 2 * own.report()["kl"]


@pytest.mark.parametrize("start", [0, 64])
def test_a_frame_names_its_calibration(data: bytes, kv: torch.Tensor, start: int) -> None:
    path = kept(data)
    part = kv[:, :, start : start + 64]
    frame, shape, site = encoded(path, part, start)
    assert (
        CodedHead(*HEAD.unpack_from(frame.data)).calibration
        == calibration.read_calibration(path).id
    )
    out = decode_frame(frame.data, shape, frame.codecs, site)
    y = torch.frombuffer(bytearray(out), dtype=torch.bfloat16).view(part.shape).float()
    assert (y - part.float()).norm() < 0.2 * part.float().norm()
    assert torch.equal(y[:, :, :4], part[:, :, :4].float()) == (start == 0)


def test_coefficients_are_half_a_step_off_at_most(transforming: bytes, kv: torch.Tensor) -> None:
    """And what is not coefficients is as without a transform."""
    path = kept(transforming)
    found = calibration.read_calibration(path)
    assert found.transforms is not None
    assert found.transformed == {2}
    part = kv[:, :, 64:128].float()
    frame, shape, site = encoded(path, part, 64, "small")
    assert CodedHead(*HEAD.unpack_from(frame.data)).calibration == found.id
    out = decode_frame(frame.data, shape, frame.codecs, site)
    assert bytes(out) == bytes(decode_frame(frame.data, shape, frame.codecs, site))
    y = torch.frombuffer(bytearray(out), dtype=torch.float32).view(part.shape)
    error = (y - part).numpy().transpose(0, 1, 3, 2, 4)[1]  # of V, which is not turned
    off = error @ found.transforms[0][1].swapaxes(-1, -2)
    steps = found.steps[2, 1].reshape(off.shape[0], off.shape[1], 1, -1)
    assert 0.3 < np.abs(off / steps).max() < 0.51
    k = (y - part)[0].norm() / part[0].norm()
    assert 0 < k < 0.5


def test_coefficients_are_uncorrelated_and_cost_the_same(
    subject: Subject, seen: calibrate.Seen, data: bytes, transforming: bytes
) -> None:
    before, after = (calibration.read_calibration(kept(d)) for d in (data, transforming))
    assert (before.means == after.means).all()
    assert (before.steps[:2] == after.steps[:2]).all()
    matrices, size = calibrate.transforms(seen, after.means)
    made = np.concatenate(
        [calibrate.through(kv - after.means[:, :, None], matrices) for kv in seen.kv], 2
    )
    heads = made.reshape(*made.shape[:3], -1, subject.shape.dim).transpose(0, 1, 3, 4, 2)
    covariance = heads @ heads.swapaxes(-1, -2)
    apart = covariance / np.sqrt(
        np.einsum("...ii,...jj->...ij", covariance, covariance)
    ) - np.eye(subject.shape.dim)  # fmt: skip
    assert np.abs(apart).max() < 0.02, "uncorrelated"
    inverse = np.linalg.inv(matrices.astype(np.float64)) * (1 / size)[..., None, None]
    cost = inverse.swapaxes(-1, -2) @ seen.metric @ inverse
    assert np.allclose(cost, np.eye(subject.shape.dim), atol=0.02), "all errors cost the same"


def test_first_tokens_stay_with_a_transform(transforming: bytes, kv: torch.Tensor) -> None:
    part = kv[:, :, :64]
    frame, shape, site = encoded(kept(transforming), part, 0, "small")
    out = decode_frame(frame.data, shape, frame.codecs, site)
    y = torch.frombuffer(bytearray(out), dtype=torch.bfloat16).view(part.shape)
    assert torch.equal(y[:, :, :4], part[:, :, :4])
    assert not torch.equal(y[:, :, 4:], part[:, :, 4:])


def test_without_its_calibration_a_frame_is_a_miss(
    data: bytes, kv: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(data)
    frame, shape, site = encoded(path, kv[:, :, :64], 0)
    path.unlink()
    decode_frame(frame.data, shape, frame.codecs, site)  # this process has read it
    monkeypatch.setattr(calibration, "_known", {})
    with pytest.raises(BadObject, match="copy it there, or name it in decode's `calibrations`"):
        decode_frame(frame.data, shape, frame.codecs, site)
    kept(data)
    decode_frame(frame.data, shape, frame.codecs, site)


def test_another_start_or_layer_is_another_frame(data: bytes, kv: torch.Tensor) -> None:
    frame, shape, site = encoded(kept(data), kv[:, :, :64], 0)
    head = CodedHead(*HEAD.unpack_from(frame.data))
    for change in ({"layer": 1}, {"kv_head": 1}, {"level": 3}, {"calibration": 1}):
        wrong = HEAD.pack(*head._replace(**change)) + bytes(frame.data)[HEAD.size :]
        with pytest.raises(BadObject):
            decode_frame(wrong, shape, frame.codecs, site)


def test_what_the_model_never_did_is_coded_without(data: bytes, kv: torch.Tensor) -> None:
    frame, shape, site = encoded(kept(data), kv[:, :, :64] * 1e9, 0)
    assert CodedHead(*HEAD.unpack_from(frame.data)).calibration == 0
    decode_frame(frame.data, shape, frame.codecs, site)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["default", "small"])
def test_hostile_bytes(transforming: bytes, kv: torch.Tensor, level: str) -> None:
    frame, shape, site = encoded(kept(transforming), kv[:, :1, :16], 64, level)
    refused = 0
    for wrong in mutations(bytes(frame.data), 100_000):
        try:
            out = decode_frame(wrong, shape, frame.codecs, site)
        except BadObject:  # noqa: PERF203
            refused += 1
        else:
            assert memoryview(out).nbytes == shape.nbytes
    assert 0 < refused < 100_000


def test_files_that_are_none(data: bytes, tmp_path: Path, kv: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        CacheGen(CacheGenOptions(calibration=str(tmp_path / "none")), None)  # type: ignore[arg-type]
    for i, wrong in enumerate((b"", b"x" * 100, data[:-1], data[: len(data) // 2])):
        (tmp_path / f"{i}").write_bytes(wrong)
        with pytest.raises(ConfigError, match="write it anew with tierloom calibrate"):
            calibration.read_calibration(tmp_path / f"{i}")
    for i, wrong in enumerate(mutations(data, 200)):
        (tmp_path / f"m{i}").write_bytes(wrong)
        with contextlib.suppress(ConfigError):
            calibration.read_calibration(tmp_path / f"m{i}")


@pytest.mark.parametrize("bad", ["singular", "no number", "of another shape", "no level"])
def test_transforms_that_are_none(transforming: bytes, tmp_path: Path, bad: str) -> None:
    metadata, tensors = calibration.from_safetensors(transforming)
    matrices = tensors["transforms"].copy()
    if bad == "singular":
        matrices[1, 2, 0] = 0
    elif bad == "no number":
        matrices[0, 0, 0, 0, 0] = np.inf
    elif bad == "of another shape":
        matrices = matrices[:, :1]
    else:
        metadata["transformed"] = '["medium"]'
    metadata.pop("tierloom")
    path = tmp_path / "bad"
    path.write_bytes(calibration.safetensors_bytes({**tensors, "transforms": matrices}, metadata))
    with pytest.raises(ConfigError, match="write it anew with tierloom calibrate"):
        calibration.read_calibration(path)


def test_files_of_another_version_are_refused_with_the_cure(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, tensors = calibration.from_safetensors(data)
    monkeypatch.setattr(calibration, "VERSION", "1")
    metadata.pop("tierloom")
    path = tmp_path / "old"
    path.write_bytes(calibration.safetensors_bytes(tensors, metadata))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"version 1.*write it anew with tierloom calibrate"):
        calibration.read_calibration(path)


def test_a_calibration_of_another_model_is_refused_by_name(
    subject: Subject, data: bytes, tmp_path: Path
) -> None:
    other = calibration.from_safetensors(data)
    tensors: dict[str, Any] = {
        n: t[..., :1, :] if n in ("means", "steps", "tabid") else t for n, t in other[1].items()
    }
    metadata = {k: v for k, v in other[0].items() if k != "tierloom"}
    path = tmp_path / "one-layer"
    path.write_bytes(calibration.safetensors_bytes(tensors, metadata))
    with pytest.raises(TierloomError, match="is of another model: it has 1 layers"):
        Stored(f"cachegen:default,calibration={path}", subject, TINY.chunk)


@pytest.mark.parametrize("words", [[], ["--no-transform"]])
def test_the_command_writes_where_it_is_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(quality_subject, "load_subject", lambda _: subject)
    monkeypatch.setattr("sys.argv", ["tierloom", "calibrate", "--model", "tiny", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert "of tiny," in capsys.readouterr().out
    found = calibration.for_model(subject.weights)
    assert found is not None
    assert found.transformed == (set() if words else {2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it is shared: in bfloat16, in files."""
    made: Path = tmp_path_factory.mktemp("models") / "mine"
    tiny_llama().bfloat16().save_pretrained(made)
    return made


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def vllm_config(folder: Path, **changes: Any) -> Any:
    """As much of vLLM's configuration as is read to find a calibration."""
    model = {"model": str(folder), "model_weights": "", "revision": None} | changes
    load = SimpleNamespace(load_format=model.pop("load_format", "auto"), download_dir=None)
    return SimpleNamespace(model_config=SimpleNamespace(**model), load_config=load)


def kept_head(pipe: Any, folder: Path, kv: torch.Tensor) -> CodedHead:
    """The head of the first frame of what a pipeline keeps of `kv`."""
    with pipe:
        planes = list(zip(kv[0], kv[1], strict=True))
        slots = torch.arange(kv.shape[2])
        pipe.store(slots.to(torch.int32), planes, slots, layout=layout_of(planes)).wait()
    page = next(folder.rglob("*.tlm")).read_bytes()
    frame = Header.unpack(page[: Header.length(page)]).frames[0]
    assert frame.codecs
    return CodedHead(*HEAD.unpack_from(page, frame.offset))


@pytest.mark.parametrize("rope_theta", [10000.0, 500000.0, None])
def test_an_engine_finds_it_by_the_models_files(
    folder: Path, kv: torch.Tensor, tmp_path: Path, rope_theta: float | None
) -> None:
    """Whatever it calls the weights; but not where it turns K otherwise."""
    found = calibration.read_calibration(
        kept(made_for(subject_of("mine", loaded(folder, torch.float32), Letters())))
    )
    name = calibrated_id(vllm_config(folder))
    assert name in found.models
    rope = json.dumps({"rope_theta": rope_theta, "rope_type": "default"}) if rope_theta else ""
    row = torch.empty(1, *kv.shape[3:], dtype=kv.dtype)
    pipe = tierloom.open(
        quality_arms._config(quality_arms.parse_codec("cachegen"), str(tmp_path), 64, 1 << 26),
        layout=layout_of([(row, row)] * kv.shape[1]), model="", weights="another name",
        rope=rope, facts=ModelFacts(kv.shape[1], name),
    )  # fmt: skip
    head = kept_head(pipe, tmp_path, kv[:, :, :64])
    assert head.calibration == (0 if rope_theta == 500000.0 else found.id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_finds_it_in_every_dtype(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    subject = subject_of("mine", loaded(folder, torch.float32), Letters())
    found = calibration.read_calibration(kept(made_for(subject)))
    source = quality_arms._config(quality_arms.parse_codec("cachegen"), str(tmp_path), 64, 1 << 26)
    with CachedModel(loaded(folder, dtype), config=source) as model:
        model.generate(torch.arange(1, 100)[None], max_new_tokens=1, do_sample=False)
    page = next(tmp_path.rglob("*.tlm")).read_bytes()
    frame = Header.unpack(page[: Header.length(page)]).frames[0]
    assert CodedHead(*HEAD.unpack_from(page, frame.offset)).calibration == found.id


def test_the_name_of_a_models_files(folder: Path, tmp_path: Path) -> None:
    name = files_id(str(folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    assert files_id(str(copy)) == name == calibrated_id(vllm_config(copy))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert files_id(str(copy)) not in (name, "")
    weights.unlink()
    assert files_id(str(copy)) == files_id("") == files_id("no/such-model") == ""
    assert calibrated_id(vllm_config(folder, load_format="dummy")) == ""
    assert calibrated_id(vllm_config(folder, model_weights="s3://bucket")) == ""
    assert calibration.for_model("", "") is None


def test_the_paper_cuts_by_the_whole_models_depth(kv: torch.Tensor, tmp_path: Path) -> None:
    """A share of two layers of 32 has no cut in it."""
    row = torch.empty(1, *kv.shape[3:], dtype=kv.dtype)
    for layers, most in ((0, [15, 7, 7]), (32, [15, 15, 15])):
        folder = tmp_path / str(layers)
        source = quality_arms._config(
            quality_arms.parse_codec("cachegen:paper-2"), str(folder), 64, 1 << 26
        )
        pipe = tierloom.open(
            source, layout=layout_of([(row, row)] * kv.shape[1]), model="m",
            facts=ModelFacts(layers),
        )  # fmt: skip
        head = kept_head(pipe, folder, kv[:, :, :64])
        assert LEVELS[head.level] == "paper-2"
        page = next(folder.rglob("*.tlm")).read_bytes()
        header = Header.unpack(page[: Header.length(page)])
        shape = FrameShape.of(header, 0)
        frame = header.frames[0]
        own = shape.planes * (1 + 2 * shape.tokens + 2 * shape.channels)
        at = frame.offset + frame.stored - own
        assert list(page[at : at + 3]) == most
