"""The quality harness: what must hold of its figures whatever the codec, on a tiny random model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import real_model
from tiny import TINY, Letters, letters, tiny_llama

from tierloom.adapters.cli import commands as cli
from tierloom.adapters.quality import documents as quality_documents
from tierloom.adapters.quality.arms import Stored, codecs, parse_codec
from tierloom.adapters.quality.documents import Sizes, documents
from tierloom.adapters.quality.measure import read_on, references, score
from tierloom.adapters.quality.score import Outcome, Score, interval, ratio
from tierloom.adapters.quality.subject import load_subject, subject_of
from tierloom.stages.errors import ConfigError, InputError, TierloomError
from tierloom.stages.kv.object import header_size
from tierloom.stages.memory.allocator import aligned

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))
from quality.literature import baselines  # noqa: E402
from quality.peers import peers  # noqa: E402

sys.path.pop()

FIGURES = {"bits_per_element", "kl", "kl_p95", "dnll", "top1", "documents"}


@pytest.fixture(scope="module")
def subject():
    return subject_of("tiny", tiny_llama(), Letters())


@pytest.fixture(scope="module")
def captured(subject):
    return references(subject, TINY, 2)


@pytest.fixture(scope="module")
def floor(subject, captured) -> Score:
    with Stored("none", subject, TINY.chunk) as arm:
        return score(subject, arm, captured)


def of(arms: list[Any], name: str) -> Any:
    return next(a for a in arms if a.name == name)


def test_there_are_documents_enough_everywhere(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(quality_documents, "LICENCE", tmp_path / "not Debian")
    made = documents(letters, Sizes())
    assert len(made) >= 8
    assert len({d.digest for d in made}) == len(made)
    for d in made:
        n, suffix = d.spans[-1]
        assert suffix >= 96
        assert len(d.ids) == n + suffix + 1
    assert [d.digest for d in made] == [d.digest for d in documents(letters, Sizes())]


def test_needles_are_told_once_and_asked_once() -> None:
    found = [d for d in documents(letters, Sizes()) if d.values]
    assert [d.context for d in found] == [512, 1024]
    for d in found:
        plain = b"\0" + bytes(i - 2 for i in d.ids[1:])  # where the BOS stands, a zero
        context, suffix = plain[: d.context], plain[d.context :]
        assert len(d.values) == 8
        for first, last in d.values:
            asked = b" is" + plain[first:last] + b"."
            assert context.count(asked) == suffix.count(asked) == 1


def test_nothing_is_learned_from_what_is_tested() -> None:
    def windows(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 16]) for i in range(len(words) - 15)}

    tested = [*quality_documents.texts().values()]
    tested.append(quality_documents.topics()[quality_documents.FILLER])
    learned = set().union(*map(windows, quality_documents.calibration_texts()))
    assert learned
    assert not [t[:60] for t in tested if windows(t) & learned]


@pytest.mark.parametrize("name", ["", " ", "no/such/folder"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--model .*{name}.*pass smollm2, or"):
        load_subject(name)


def test_sizes_that_no_model_or_text_has_are_refused() -> None:
    assert Sizes().upto(1000).contexts == (512,)
    with pytest.raises(InputError, match=r"reads 600 tokens.*pass smaller Sizes"):
        Sizes().upto(600)
    with pytest.raises(InputError, match="pass smaller Sizes"):
        documents(letters, Sizes(contexts=(10_000_000,)))


def test_reading_on_the_models_own_kv_is_the_full_computation(subject, captured) -> None:
    """Had the KV not been rounded, there would be no floor."""
    r = captured[0]
    ids = torch.tensor([r.document.ids[:-1]])
    with torch.no_grad():
        out = subject.model(input_ids=ids, use_cache=True)
    kv = [[t[0, :, :128].transpose(0, 1) for t in (c.keys, c.values)] for c in
          out.past_key_values.layers]  # fmt: skip
    kv = torch.stack([torch.stack([layer[i] for layer in kv]) for i in (0, 1)])
    got = read_on(subject, kv, r.document.ids[128:160])
    assert torch.allclose(got, r.logp[0], atol=1e-4)
    assert torch.allclose(kv.bfloat16(), r.kv)
    assert torch.allclose(r.logp[0].exp().sum(-1), torch.ones(32), atol=1e-4)


def test_the_floor_is_low_and_not_zero(floor) -> None:
    assert 0 < floor.kl < 1e-3
    assert all(o.exact for o in floor.outcomes)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "zstd:planes=false", "zstd:9+lz4"])
def test_lossless_is_the_floor_exactly(subject, captured, floor, codec) -> None:
    with Stored(codec, subject, TINY.chunk) as arm:
        found = score(subject, arm, captured)
    for got, want in zip(found.outcomes, floor.outcomes, strict=True):
        assert got.exact
        assert (got.kl == want.kl).all()
        assert (got.dnll, got.top1) == (want.dnll, want.top1)
        assert got.payload <= want.payload


def test_bits_are_the_bytes_of_the_objects(subject, captured) -> None:
    """No codec: the length of every object is known beforehand."""
    kv = captured[0].kv
    before = kv.clone()
    with Stored("none", subject, 64) as arm:
        got = arm.treat(captured[0].ids, kv)
        again = arm.treat(captured[0].ids, kv)
        assert not list(Path(arm._folder.name).rglob("*.tlm"))
    frame = 2 * 3 * 64 * 2 * 16 * 2  # K and V of three layers, 64 tokens, 2 heads of 16, bf16
    assert (got.stored, got.payload) == (2 * (header_size(1, 2) + aligned(frame)), 2 * frame)
    assert again.stored == got.stored
    assert torch.equal(got.kv, kv)
    assert torch.equal(kv, before)


def test_what_does_not_come_back_is_an_error(subject, captured, monkeypatch) -> None:
    with Stored("none", subject, 64) as arm:
        kept = arm._pipe.retrieve
        monkeypatch.setattr(arm._pipe, "retrieve", lambda ids, *a, **k: kept(ids + 1, *a, **k))
        with pytest.raises(TierloomError, match="codec none: 0 of 128 tokens came back"):
            arm.treat(captured[0].ids, captured[0].kv)
    assert not Path(arm._folder.name).exists()


def test_fewer_bits_cost_more(subject, captured, floor) -> None:
    arms = baselines(TINY.chunk)
    names = ("int8 per token", "KIVI-4", "KIVI-2")
    scores = [floor, *(score(subject, of(arms, name), captured) for name in names)]
    assert [s.bits for s in scores] == sorted((s.bits for s in scores), reverse=True)
    assert [s.kl for s in scores] == sorted(s.kl for s in scores)
    assert scores[0].kl < scores[1].kl / 2 < scores[3].kl / 20
    assert not any(o.exact for s in scores[1:] for o in s.outcomes)


def test_a_report_by_hand() -> None:
    def outcome(name: str, kl: list[float], nbytes: int, **more: Any) -> Outcome:
        return Outcome(name, 100, nbytes, nbytes - 10, False, np.array(kl), 0.1, 0.5,
                       ((64, kl[0]), (128, kl[1])), **more)  # fmt: skip

    got = Score("x", (
        outcome("a", [0.0, 0.2], 50),
        outcome("b", [0.4, 0.6], 100, needle_nll=np.array([1.0, 3.0]), needle_hit=np.ones(2)),
    )).report()  # fmt: skip
    assert got.keys() >= FIGURES
    assert (got["bits_per_element"], got["payload_bits_per_element"]) == (6.0, 5.2)
    assert (got["kl"], got["kl_p95"], got["dnll"], got["top1"]) == (0.3, 0.57, 0.1, 0.5)
    assert got["kl_by_context"] == {"64": 0.2, "128": 0.4}
    assert (got["needle_nll"], got["needle_recall"], got["documents"]) == (2.0, 1.0, 2)
    assert got["kl_interval"] == [0.1, 0.5]
    assert json.loads(json.dumps(got)) == got


def test_intervals_are_paired() -> None:
    a = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    low, high = interval(a)
    assert a.min() < low < a.mean() < high < a.max()
    share, ends = ratio(a / 2, a)
    assert share == 0.5
    assert ends == pytest.approx((0.5, 0.5))


def test_codecs_are_named_as_in_yaml() -> None:
    assert parse_codec("none") == []
    assert parse_codec("zstd") == [("zstd", {})]
    assert parse_codec("zstd:7,planes=false") == [("zstd", {"level": 7, "planes": False})]
    assert parse_codec("lz4+zstd:level=3") == [("lz4", {}), ("zstd", {"level": 3})]
    assert {"zstd", "lz4"} <= set(codecs())
    assert not {"decode", "gather", "get", "put", "scatter", "to_host"} & set(codecs())
    with pytest.raises(ConfigError, match="unknown codec 'ztsd': did you mean 'zstd'"):
        parse_codec("zstd+ztsd")
    with pytest.raises(ConfigError, match="unknown codec 'scatter'"):
        parse_codec("scatter")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tierloom", "quality", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model as users have it: weights, config and tokenizer in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    made = tmp_path_factory.mktemp("models") / "mine"
    tiny_llama().save_pretrained(made)
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(made)
    return made


def test_the_command_measures_a_model_of_ones_own(run, folder) -> None:
    code, out, err = run(
        "--model", str(folder), "--codec", "zstd:3", "--json", "f.json", "--documents", "1"
    )
    assert (code, err) == (0, "")
    assert "bits per element" in out
    report = json.loads(Path("f.json").read_text())
    assert report.keys() >= FIGURES | {"model", "codec", "kl_floor", "kl_interval", "bit_exact"}
    assert (report["model"], report["codec"], report["documents"]) == ("mine", "zstd:3", 1)
    assert report["kl"] == report["kl_floor"] > 0
    assert report["bit_exact"]
    assert 8 < report["bits_per_element"] < 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--codec", "ztsd"), "did you mean 'zstd'?"),
        (("--codec", "zstd:level=99"), "level must lie in 1..19"),
        (("--codec", "zstd:plane=1"), "did you mean 'planes'?"),
        (("--codec", "zstd", "--model", "nowhere"), "pass smollm2, or the folder of a model"),
    ],
)
def test_a_mistake_is_told_with_its_cure(run, words, said, monkeypatch) -> None:
    computed = []
    monkeypatch.setattr("tierloom.adapters.quality.measure.references", computed.append)
    code, out, err = run(*words)
    assert (code, out, computed) == (2, "", [])
    assert said in err
    assert err.startswith("--")


def test_without_transformers_the_command_says_how_to_get_it(run, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert run("--codec", "zstd") == (
        2, "", "transformers is not installed: pip install 'tierloom[hf]'\n"
    )  # fmt: skip


@real_model
@pytest.mark.slow
def test_a_real_model_tells_rules_apart() -> None:
    """The order of papers.md 8.1, on one short document."""
    from tierloom.adapters.quality.subject import load_subject

    real = load_subject("smollm2")
    one = references(real, TINY, 1)
    arms = [*peers(64), *baselines(64)]
    order = ("int8 per token", "LMCache's fp8", "LMCache's cachegen L3", "LMCache's cachegen L1")
    kls = [score(real, of(arms, name), one).kl for name in order]
    assert kls == sorted(kls)
    assert kls[0] < 1e-2 < kls[-1]
    assert math.isclose(score(real, of(arms, order[0]), one).bits, 8 + 16 / 192)
