"""Passages of other prompts, reused by `generate`: what is in place, and that nothing exact is
touched by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from tierloom.adapters.transformers.model import rope, shape_of, with_cache
from tierloom.adapters.transformers.selective import Selective
from tierloom.stages.kv.rope import rotation

from .conftest import VOCAB, greedy, spread, tiny_llama, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierloom.adapters.transformers.cached_model import CachedModel

SYSTEM = tokens(64, 1)
ONE, TWO, THREE = tokens(128, 2), tokens(128, 3), tokens(128, 4)
QUESTION = tokens(20, 5)
SMALL = {"chunk.tokens": 64, "chunk.grain": 32, "tiers.hot.capacity": "64 MiB"}


def prompt(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([SYSTEM, *parts, QUESTION], 1)


KEPT, ASKED = prompt(ONE, TWO, THREE), prompt(THREE, ONE, TWO)


@pytest.fixture(scope="module")
def model():
    return spread(tiny_llama(max_position_embeddings=2048))


@pytest.fixture
def blending(keep: Callable[..., CachedModel], model) -> Callable[..., CachedModel]:
    def open_(**mend: object) -> CachedModel:
        stage = {
            f"graphs.retrieve.stages.mend.{k}": v for k, v in {"worth": "always", **mend}.items()
        }
        kept = keep(model, config="blend", overrides=SMALL | stage)
        kept.generate(KEPT, max_new_tokens=1, do_sample=False)
        kept.flush()
        return kept

    return open_


def computed(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """K and V of each layer by a plain forward."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(input_ids=ids, **with_cache(model.base_model, cache))
    return [x.keys for x in cache.layers] + [x.values for x in cache.layers]


def expected(model, mask: np.ndarray) -> list[torch.Tensor]:
    """The same for ASKED without its question, by plain indexing and one selective forward."""
    was = computed(model, KEPT)
    shape = shape_of(model)
    selective = Selective(model, shape, rotation(rope(model), shape.dim, shape.layers))
    order = np.r_[0:64, 320:448, 64:192, 192:320]
    rows = [plane[:, :, order].clone() for plane in was]
    keys, values = rows[: shape.layers], rows[shape.layers :]
    shift = torch.arange(448) - torch.from_numpy(order)
    keys = selective.turned(keys, shift)
    selective.recompute(ASKED[0, :448], mask, keys, values)
    return keys + values


@pytest.mark.parametrize("policy", ["none", "heads", "probe"])
def test_what_is_in_place_is_what_a_selective_forward_makes(blending, model, policy: str) -> None:
    kept = blending(policy=policy, heads=8, share=0.07)
    cache = kept._cache(ASKED, room=64, stepwise=True, blend=kept._selective())
    done = cache.blended
    assert (done.tokens, done.exact) == (448, 64)
    mask = np.zeros(448, np.bool_)
    if policy != "none":
        for seam in (64, 192):  # the third passage follows the second, as it did
            mask[seam : seam + 8] = True
    if policy == "probe":
        chosen = done.computed - int(mask.sum())
        assert 0 < chosen <= int(0.07 * 384)
        mask = np.zeros(448, np.bool_)
        for a, b in cache.loading.compute(kept_scores(kept)):
            mask[a : min(b, 448)] = True
    assert done.computed == mask.sum()
    want = expected(model, mask)
    rows = [r.rows_k for r in cache._rows] + [r.rows_v for r in cache._rows]
    for plane, found in zip(want, rows, strict=True):
        assert (plane[0].transpose(0, 1) - found[:448]).abs().max() < 1e-4
    # what follows the passages goes along, and only where something is computed
    assert done.ready == (448 if policy == "none" else 467)
    for plane, found in zip(read_on(model, want, done.ready), rows, strict=True):
        assert (plane[0].transpose(0, 1) - found[: done.ready]).abs().max() < 1e-4
    cache.abandon()


def read_on(model, planes: list[torch.Tensor], end: int) -> list[torch.Tensor]:
    """A plain forward of ASKED from `planes` on."""
    cache, layers = DynamicCache(config=model.config), len(planes) // 2
    for i in range(layers):
        cache.update(planes[i].clone(), planes[layers + i].clone(), i)
    if end > (first := planes[0].shape[2]):
        with torch.no_grad():
            model.base_model(input_ids=ASKED[:, first:end], **with_cache(model.base_model, cache))
    return [x.keys for x in cache.layers] + [x.values for x in cache.layers]


def kept_scores(kept: CachedModel) -> np.ndarray:
    """What the question attends to, over KV as it was loaded."""
    selective, shape = kept._selective(), kept.shape
    was = computed(kept.model, KEPT)
    order = np.r_[0:64, 320:448, 64:192, 192:320]
    rows = [plane[:, :, order].clone() for plane in was]
    shift = torch.arange(448) - torch.from_numpy(order)
    keys = selective.turned(rows[: shape.layers], shift)
    return selective.scores(ASKED[0, 448:], keys, rows[shape.layers :])


def test_generate_reuses_passages_and_says_so(blending) -> None:
    kept = blending(policy="heads", heads=8)
    out = kept.generate(ASKED, max_new_tokens=4, do_sample=False, blend=True)
    assert out.shape == (1, 468 + 4)
    last = kept.last
    assert (last.blended_tokens, last.computed_tokens, last.not_blended) == (384, 16, "")
    assert last.hit_tokens == 448 - 16


def test_a_model_that_hides_its_queries_has_heads_computed(blending, model, monkeypatch) -> None:
    """It attends by itself, whatever the registry says: a mask is all that it is told."""
    kept = blending(policy="probe", heads=8)
    selective = kept._selective()
    monkeypatch.setattr(selective, "model", SimpleNamespace(
        config=model.config, set_attn_implementation=lambda name: None
    ))  # fmt: skip
    cache = kept._cache(ASKED, room=64, stepwise=True, blend=selective)
    assert cache.blended.computed == 16
    mask = np.zeros(448, np.bool_)
    mask[64:72] = mask[192:200] = True
    for plane, rows in zip(expected(model, mask), [r.rows_k for r in cache._rows], strict=False):
        assert (plane[0].transpose(0, 1) - rows[:448]).abs().max() < 1e-4
    cache.abandon()


def test_nobody_else_notices(blending, model) -> None:
    """After a blend a plain call gets what it gets cold, and finds no approximate KV."""
    kept = blending(policy="none")
    kept.generate(ASKED, max_new_tokens=4, do_sample=False, blend=True)
    kept.flush()
    assert kept.pipe.lookup(ASKED[0].numpy()) == 64
    out = kept.generate(ASKED, max_new_tokens=12, do_sample=False)
    assert kept.last.hit_tokens == 64
    assert torch.equal(out, greedy(model, ASKED))
    again = kept.generate(KEPT, max_new_tokens=12, do_sample=False)
    assert kept.last.hit_tokens > 384
    assert torch.equal(again, greedy(model, KEPT))


def test_the_test_above_can_fail(blending, model, monkeypatch) -> None:
    """Kept under their names, approximate rows are served to who asks for exact ones."""
    from tierloom.adapters.transformers.cache import TierloomCache

    monkeypatch.setattr(TierloomCache, "_exactness", lambda self: {})
    monkeypatch.setattr("tierloom.stages.passages.fresh.OPENING", 0)
    kept = blending(policy="none")
    kept.generate(ASKED, max_new_tokens=4, do_sample=False, blend=True)
    kept.flush()
    assert kept.pipe.lookup(ASKED[0].numpy()) > 64
    out = kept.generate(ASKED, max_new_tokens=12, do_sample=False)
    assert not torch.equal(out, greedy(model, ASKED))


def test_an_exact_prefix_is_enough(blending, model) -> None:
    kept = blending()
    out = kept.generate(KEPT, max_new_tokens=12, do_sample=False, blend=True)
    assert (kept.last.blended_tokens, kept.last.computed_tokens) == (0, 0)
    assert torch.equal(out, greedy(model, KEPT))


def test_a_model_that_cannot_is_served_exactly(keep) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=1024)
    model = spread(GPT2LMHeadModel(config).eval())
    kept = keep(model, config="blend", overrides=SMALL)
    kept.generate(KEPT, max_new_tokens=1, do_sample=False)
    kept.flush()
    out = kept.generate(ASKED, max_new_tokens=12, do_sample=False, blend=True)
    assert kept.last.not_blended
    assert kept.last.blended_tokens == 0
    assert torch.equal(out, greedy(model, ASKED))


def test_a_pipeline_that_finds_nothing_anywhere(keep, model) -> None:
    kept = keep(model, overrides=SMALL)
    kept.generate(KEPT, max_new_tokens=1, do_sample=False)
    kept.flush()
    out = kept.generate(ASKED, max_new_tokens=12, do_sample=False, blend=True)
    assert (kept.last.hit_tokens, kept.last.blended_tokens) == (64, 0)
    assert torch.equal(out, greedy(model, ASKED))
