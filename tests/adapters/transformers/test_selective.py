"""Selective recompute: proved on the model's own weights, and equal to computing everything where
nothing was wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tierloom.adapters.transformers.model import rope, shape_of, with_cache
from tierloom.adapters.transformers.selective import RowLayer, Selective
from tierloom.stages.errors import InputError, LayoutError
from tierloom.stages.kv.rope import Rotation, frequencies

from .architectures import build
from .conftest import VOCAB, spread, tiny_llama, tokens

N = 90


def rotation(model, shape, scale: float = 1.0, *, interleaved: bool = False) -> Rotation:
    freqs = frequencies(rope(model), shape.dim).astype(np.float64) * scale
    return Rotation(freqs[None], np.zeros(shape.layers, np.int32), interleaved=interleaved)


@pytest.fixture(scope="module")
def model():
    return spread(tiny_llama(max_position_embeddings=2048))


@pytest.fixture(scope="module")
def selective(model) -> Selective:
    shape = shape_of(model)
    return Selective(model, shape, rotation(model, shape))


def computed(model, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(input_ids=ids[None], **with_cache(model.base_model, cache))
    return [x.keys for x in cache.layers], [x.values for x in cache.layers]


def off(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_what_was_spoiled_is_computed_again(model, selective: Selective) -> None:
    """Rows in several stretches, NaN before, first row included; then the model reads on."""
    ids = tokens(N)[0]
    keys, values = computed(model, ids)
    mask = np.zeros(N, np.bool_)
    mask[[0, 1, 2, 17, 40, 41, 89]] = True
    spoiled_k, spoiled_v = [k.clone() for k in keys], [v.clone() for v in values]
    for plane in (*spoiled_k, *spoiled_v):
        plane[:, :, torch.from_numpy(np.flatnonzero(mask))] = 1e4
    cache = selective.recompute(ids, mask, spoiled_k, spoiled_v)
    assert off(spoiled_k, keys) < 1e-4
    assert off(spoiled_v, values) < 1e-4
    more = tokens(5, seed=9)
    with torch.no_grad():
        got = model(input_ids=more, **with_cache(model, cache)).logits
        want = model(input_ids=torch.cat([ids[None], more], 1)).logits[:, N:]
    assert torch.allclose(got, want, atol=1e-3)
    assert cache.get_seq_length() == N + 5


def test_chosen_tokens_see_what_was_loaded(model, selective: Selective) -> None:
    """Over other KV, a row is not what it is over its own; rows that are not chosen stay."""
    ids = tokens(N)[0]
    keys, values = computed(model, tokens(N, seed=5)[0])
    before = [k.clone() for k in keys]
    mask = np.zeros(N, np.bool_)
    mask[50:60] = True
    selective.recompute(ids, mask, keys, values)
    plain = computed(model, ids)[0]
    assert off([k[:, :, ~mask] for k in keys], [k[:, :, ~mask] for k in before]) == 0
    assert off([keys[0][:, :, mask]], [plain[0][:, :, mask]]) < 1e-4  # a first layer sees nothing
    assert off([keys[-1][:, :, mask]], [plain[-1][:, :, mask]]) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_many_stretches_are_each_over_all_before_them(model, attention: str) -> None:
    """Every third token over foreign KV, against one token after another, each of which a plain
    forward computes over all rows before it."""
    model.set_attn_implementation(attention)
    try:
        shape, ids = shape_of(model), tokens(240)[0]
        selective = Selective(model, shape, rotation(model, shape))
        keys, values = computed(model, tokens(240, seed=5)[0])
        want_k, want_v = [k.clone() for k in keys], [v.clone() for v in values]
        mask = np.arange(240) % 3 == 1
        mask[100:140] = True
        for at in np.flatnonzero(mask):
            cache = DynamicCache(config=model.config)
            for i, planes in enumerate(zip(want_k, want_v, strict=True)):
                cache.update(*(plane[:, :, :at].clone() for plane in planes), i)
            with torch.no_grad():
                model.base_model(
                    input_ids=ids[None, at : at + 1], **with_cache(model.base_model, cache)
                )
            for layer, k, v in zip(cache.layers, want_k, want_v, strict=True):
                k[:, :, at], v[:, :, at] = layer.keys[:, :, at], layer.values[:, :, at]
        selective.recompute(ids, mask, keys, values)
    finally:
        model.set_attn_implementation("sdpa")
    assert off(keys, want_k) < 1e-4
    assert off(values, want_v) < 1e-4


def test_scores_are_the_attention_of_what_follows(model, selective: Selective) -> None:
    ids, asked = tokens(N)[0], tokens(7, seed=3)[0]
    keys, values = computed(model, ids)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = model(input_ids=torch.cat([ids, asked])[None], output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    want = torch.zeros(N)
    for layer in seen.attentions:
        paid = layer[0, :, N:, :N].sum(1)
        want += (paid / paid.sum(-1, keepdim=True)).max(0).values / len(seen.attentions)
    got = selective.scores(asked, keys, values)
    assert np.allclose(got, want.numpy(), atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    assert keys[0].shape[2] == N
    longer = [[torch.cat([p, p[:, :, :7]], 2) for p in planes] for planes in (keys, values)]
    assert np.array_equal(selective.scores(asked, *longer, room=True), got)
    assert off([p[:, :, :N] for p in longer[0] + longer[1]], keys + values) == 0


@pytest.mark.parametrize("of", ["k", "v", "both"])
def test_deviations_are_where_kv_is_not_the_prompts_own(model, selective, of: str) -> None:
    ids = tokens(N)[0]
    keys, values = computed(model, ids)
    keys[2][:, :, 33] += 1.0
    values[2][:, :, 33] += 1.0
    found = selective.deviations(ids, keys, values, 2, of, first=10)
    assert found.argmax() == 33
    assert found[:10].max() == 0
    assert np.delete(found, 33).max() < 1e-3 * found[33]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "olmo", "stablelm", "gpt_neox",
                                  "llama, linear rope", "llama, llama3 rope"])  # fmt: skip
def test_models_that_prove_it(kind: str) -> None:
    model = build(kind)
    shape = shape_of(model)
    Selective(model, shape, rotation(model, shape))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "falcon, alibi", "mpt"])
def test_models_whose_k_does_not_turn_are_refused(kind: str) -> None:
    model = build(kind)
    shape = shape_of(model)
    freqs = frequencies(json.dumps({"rope_theta": 1e4}), shape.dim).astype(np.float64)
    with pytest.raises(LayoutError, match=r"cannot be blended|computes chosen tokens"):
        Selective(model, shape, Rotation(freqs[None], np.zeros(shape.layers, np.int32)))


def test_a_wrong_rotation_is_refused(model) -> None:
    shape = shape_of(model)
    for wrong in (rotation(model, shape, 1.01), rotation(model, shape, interleaved=True)):
        with pytest.raises(LayoutError, match="is not that at 0 turned"):
            Selective(model, shape, wrong)
    with pytest.raises(LayoutError, match="not known"):
        Selective(model, shape, Rotation(np.zeros((0, 0)), np.zeros(0, np.int32)))


def test_rows_in_a_wrong_place_are_refused(model, monkeypatch) -> None:
    real = RowLayer.update

    def update(self, key_states, value_states, *args, **kwargs):
        if self.rows is not None and len(self.rows) < 64:
            key_states = key_states.flip(2)
        return real(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(RowLayer, "update", update)
    shape = shape_of(model)
    with pytest.raises(LayoutError, match="rows computed over the others differ"):
        Selective(model, shape, rotation(model, shape))


def test_wrong_shapes_are_refused(model, selective: Selective) -> None:
    ids = tokens(N)[0]
    keys, values = computed(model, ids)
    with pytest.raises(InputError, match="one bool a token"):
        selective.recompute(ids, np.zeros(N - 1, np.bool_), keys, values)
    with pytest.raises(InputError, match="K and V must be"):
        selective.recompute(ids, np.zeros(N, np.bool_), keys[:-1], values)
    assert int(ids.max()) < VOCAB
