"""`tierloom calibrate`, and frames that only a calibration can read."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from contracts import header_of, mutations

from tierloom.adapters import calibrate, cli, quality_measure
from tierloom.adapters.quality_arms import Stored
from tierloom.adapters.quality_documents import Sizes
from tierloom.adapters.quality_measure import references, score, subject_of
from tierloom.stages.codecs import calibration
from tierloom.stages.codecs.cachegen import CacheGen, CacheGenOptions
from tierloom.stages.codecs.cachegen_coder import HEAD, Head
from tierloom.stages.codecs.cachegen_frame import STEPS
from tierloom.stages.codecs.shape import FrameShape, Site
from tierloom.stages.codecs.table import decode_frame
from tierloom.stages.errors import BadObject, ConfigError, TierloomError
from tierloom.stages.payload import EncodedFrame

if TYPE_CHECKING:
    from pathlib import Path

    from tierloom.adapters.quality_measure import Subject


TINY = Sizes(contexts=(128,), suffix=32, chunk=64)


class Letters:
    """A tokenizer that needs no files: a token per byte, behind a BOS."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *(b + 2 for b in text.encode("utf-8"))]}


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def subject() -> Subject:
    found: Subject = subject_of("tiny", tiny_llama().bfloat16(), Letters())
    return found


@pytest.fixture(scope="module")
def data(subject: Subject) -> bytes:
    return calibrate.calibrate(subject)


@pytest.fixture(scope="module")
def transforming(subject: Subject) -> bytes:
    """With a transform of each head for level small."""
    return calibrate.calibrate(subject, transformed=calibrate.TRANSFORMED)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No files but those of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_known", {})


def kept(data: bytes) -> Path:
    calibration.folder().mkdir(parents=True, exist_ok=True)
    path = calibration.folder() / "one.safetensors"
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
    assert calibrate.calibrate(subject) == data


def test_what_was_learned(subject: Subject, data: bytes) -> None:
    found = calibration.read(kept(data))
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
    ours = calibration.unpacked(data)[1]
    theirs = safetensors.load(data)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_frames_are_smaller_and_as_good(subject: Subject) -> None:
    data = calibrate.calibrate(subject, STEPS)  # steps as they are without it
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
    assert Head(*HEAD.unpack_from(frame.data)).calibration == calibration.read(path).id
    out = decode_frame(frame.data, shape, frame.codecs, site)
    y = torch.frombuffer(bytearray(out), dtype=torch.bfloat16).view(part.shape).float()
    assert (y - part.float()).norm() < 0.2 * part.float().norm()
    assert torch.equal(y[:, :, :4], part[:, :, :4].float()) == (start == 0)


def test_coefficients_are_half_a_step_off_at_most(transforming: bytes, kv: torch.Tensor) -> None:
    """And what is not coefficients is as without a transform."""
    path = kept(transforming)
    found = calibration.read(path)
    assert found.transforms is not None
    assert found.transformed == {2}
    part = kv[:, :, 64:128].float()
    frame, shape, site = encoded(path, part, 64, "small")
    assert Head(*HEAD.unpack_from(frame.data)).calibration == found.id
    out = decode_frame(frame.data, shape, frame.codecs, site)
    assert bytes(out) == bytes(decode_frame(frame.data, shape, frame.codecs, site))
    y = torch.frombuffer(bytearray(out), dtype=torch.float32).view(part.shape)
    error = (y - part).numpy().transpose(0, 1, 3, 2, 4)[1]  # of V, which is not turned
    off = error @ found.transforms[0][1].swapaxes(-1, -2)
    steps = found.steps[2, 1].reshape(off.shape[0], off.shape[1], 1, -1)
    assert 0.3 < np.abs(off / steps).max() < 0.51
    k = (y - part)[0].norm() / part[0].norm()
    assert 0 < k < 0.5


def test_transforms_bring_smaller_frames(
    subject: Subject, data: bytes, transforming: bytes
) -> None:
    """K and V of a model whose channels go together: an error in its metric costs fewer bits."""
    before, after = (calibration.read(kept(d)) for d in (data, transforming))
    assert (before.means == after.means).all()
    assert (before.steps[:2] == after.steps[:2]).all()
    seen = calibrate.observe(subject)
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
    head = Head(*HEAD.unpack_from(frame.data))
    for change in ({"layer": 1}, {"kv_head": 1}, {"level": 3}, {"calibration": 1}):
        wrong = HEAD.pack(*head._replace(**change)) + bytes(frame.data)[HEAD.size :]
        with pytest.raises(BadObject):
            decode_frame(wrong, shape, frame.codecs, site)


def test_what_the_model_never_did_is_coded_without(data: bytes, kv: torch.Tensor) -> None:
    frame, shape, site = encoded(kept(data), kv[:, :, :64] * 1e9, 0)
    assert Head(*HEAD.unpack_from(frame.data)).calibration == 0
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
            calibration.read(tmp_path / f"{i}")
    for i, wrong in enumerate(mutations(data, 200)):
        (tmp_path / f"m{i}").write_bytes(wrong)
        with contextlib.suppress(ConfigError):
            calibration.read(tmp_path / f"m{i}")


@pytest.mark.parametrize("bad", ["singular", "no number", "of another shape", "no level"])
def test_transforms_that_are_none(transforming: bytes, tmp_path: Path, bad: str) -> None:
    metadata, tensors = calibration.unpacked(transforming)
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
    path.write_bytes(calibration.packed({**tensors, "transforms": matrices}, metadata))
    with pytest.raises(ConfigError, match="write it anew with tierloom calibrate"):
        calibration.read(path)


def test_files_of_another_version_are_refused_with_the_cure(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, tensors = calibration.unpacked(data)
    monkeypatch.setattr(calibration, "VERSION", "1")
    metadata.pop("tierloom")
    path = tmp_path / "old"
    path.write_bytes(calibration.packed(tensors, metadata))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"version 1.*write it anew with tierloom calibrate"):
        calibration.read(path)


def test_a_calibration_of_another_model_is_refused_by_name(
    subject: Subject, data: bytes, tmp_path: Path
) -> None:
    other = calibration.unpacked(data)
    tensors: dict[str, Any] = {
        n: t[..., :1, :] if n in ("means", "steps", "tabid") else t for n, t in other[1].items()
    }
    metadata = {k: v for k, v in other[0].items() if k != "tierloom"}
    path = tmp_path / "one-layer"
    path.write_bytes(calibration.packed(tensors, metadata))
    with pytest.raises(TierloomError, match="is of another model: it has 1 layers"):
        Stored(f"cachegen:default,calibration={path}", subject, TINY.chunk)


def test_the_command_writes_where_it_is_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality_measure, "load_subject", lambda _: subject)
    monkeypatch.setattr("sys.argv", ["tierloom", "calibrate", "--model", "tiny"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert "of tiny," in capsys.readouterr().out
    assert calibration.for_model(subject.weights) is not None
