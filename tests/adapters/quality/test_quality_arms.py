"""Arms and gates of `make quality`, and the results that are committed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tierloom.adapters.quality.score import Outcome, Score
from tierloom.adapters.quality.subject import Treated

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))
from quality.chunks import uniform  # noqa: E402
from quality.gates import judged  # noqa: E402
from quality.literature import baselines  # noqa: E402
from quality.peers import cachegen, fp8_cast, peers, turboquant  # noqa: E402
from quality.report import markdown  # noqa: E402

sys.path.pop()


def test_gates_go_by_the_ends_of_intervals() -> None:
    def arm(name: str, kls: list[float], nbytes: int, exact: bool = False) -> Score:
        return Score(name, tuple(
            Outcome(str(i), 8, nbytes, nbytes, exact, np.array([k]), 0, 1, ())
            for i, k in enumerate(kls)
        ))  # fmt: skip

    def verdicts(*arms: Score) -> dict[str, str]:
        return {g["gate"]: g["verdict"] for g in judged({a.arm: a for a in arms})}

    assert verdicts(arm("int4", [1e-3, 2e-3], 4)) == {"int4": "met"}
    assert verdicts(arm("int4", [1e-3, 2e-3], 5)) == {"int4": "missed"}
    assert verdicts(arm("int4", [1e-3, 2e-2], 4)) == {"int4": "open"}
    assert verdicts(arm("int4", [1e-2, 2e-2], 4)) == {"int4": "missed"}
    assert verdicts(arm("zstd", [1e-5], 11, exact=True)) == {"lossless, planes": "met"}
    assert verdicts(arm("zstd", [1e-5], 11)) == {"lossless, planes": "missed"}
    cast = arm("LMCache's fp8", [4e-3, 8e-3], 8)
    assert verdicts(arm("fp8", [1e-3, 2e-3], 8), cast) == {"fp8, target": "met"}
    assert verdicts(arm("fp8", [3e-3, 6e-3], 8), cast) == {"fp8, target": "missed"}
    assert verdicts(arm("fp8", [1e-3], 8)) == {"fp8, target": "open"}


def test_the_peers_container_is_counted_as_its_formula_says() -> None:
    """Constant KV codes to next to nothing: what is left is tables, lengths and scales."""
    layers, tokens, heads, dim = 12, 256, 3, 64
    kv = torch.ones(2, layers, tokens, heads, dim)
    for level, table in ((3, 32), (2, 32), (1, 16)):
        made = cachegen(kv, level)
        bits = 8 * made.nbytes / kv.numel()
        fixed = 16 * (table + 1) / tokens + 32 / tokens + 16 / (heads * dim)
        assert 0 <= bits - fixed <= 16 / tokens  # a stream that says nothing is a byte or two
        assert torch.allclose(made.kv, kv)
    assert not cachegen(torch.zeros_like(kv), 2).kv.any()


@pytest.mark.parametrize("arm", [*peers(128), *baselines(128)], ids=lambda a: a.name)
def test_every_rule_gives_back_kv_of_its_shape(arm) -> None:
    kv = torch.randn((2, 6, 200, 2, 32), generator=torch.Generator().manual_seed(1)).bfloat16()
    before = kv.clone()
    got = arm.treat(torch.arange(200), kv)
    assert isinstance(got, Treated)
    assert (got.kv.shape, got.kv.dtype) == (kv.shape, torch.bfloat16)
    assert 0 < got.stored < kv.nbytes
    assert torch.equal(kv, before)
    error = (got.kv.float() - kv.float()).pow(2).mean()
    assert error < 0.35  # of a variance of 1
    assert torch.isfinite(error)


def test_what_saturates_is_a_number() -> None:
    assert fp8_cast(torch.tensor([6e4, -6e4])).kv.tolist() == [448.0, -448.0]


def test_more_bits_are_nearer() -> None:
    kv = torch.randn((2, 6, 64, 2, 32), generator=torch.Generator().manual_seed(2))
    error = lambda made: (made.kv - kv).pow(2).mean().item()  # noqa: E731
    assert error(cachegen(kv, 3)) < error(cachegen(kv, 1))
    assert error(turboquant(kv, 4)) < error(turboquant(kv, 3))
    back, nbytes = uniform(kv[..., :9], 4, -1, 4)  # the last group is short
    assert (back.shape, nbytes) == ((2, 6, 64, 2, 9), 2 * 6 * 64 * 2 * (9 / 2 + 3 * 4))
    assert (back - kv[..., :9]).abs().max() < 0.25


def test_the_notebook_is_one_and_runs_no_model() -> None:
    book = json.loads((ROOT / "benchmarks/quality/quality.ipynb").read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({c["id"] for c in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile("".join(cell["source"]), cell["id"], "exec")


def test_what_is_committed_belongs_together() -> None:
    kept = ROOT / "benchmarks/results/quality-smollm2.json"
    results = json.loads(kept.read_text())
    assert kept.with_suffix(".md").read_text() == markdown(results)
    assert kept.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert len(results["documents"]) >= 8
    for arm in results["arms"].values():
        assert arm.keys() >= {"bits_per_element", "kl", "kl_p95", "dnll", "top1", "documents"}
        assert not arm["bit_exact"] or arm["kl"] == results["arms"]["none"]["kl"]


def test_the_page_on_codecs_shows_what_was_measured() -> None:
    arms = json.loads((ROOT / "benchmarks/results/quality-smollm2.json").read_text())["arms"]
    page = (ROOT / "docs/codecs.md").read_text()
    rows = re.findall(r"^\| `([^`|]+)` \| ([\d.]+) \| ([\d.e-]+) \|", page, re.MULTILINE)
    assert len(rows) > 12
    for name, bits, kl in rows:
        arm = arms[name]
        assert bits == f"{arm['bits_per_element']:.2f}", name
        assert kl == ("0" if arm["bit_exact"] else f"{arm['kl']:.2g}"), name
