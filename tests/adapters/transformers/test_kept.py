"""`CachedModel.generate` says what the model says, whatever was stored, lost or damaged before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tierloom.adapters.transformers.model import with_cache
from tierloom.stages.kv import layout_check as selftest

from .conftest import greedy, tiny_llama, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierloom.adapters.transformers.cached_model import CachedModel

    Keep = Callable[..., CachedModel]


def say(kept: CachedModel, ids: torch.Tensor, **options: Any) -> int:
    """Generate, compare with the model alone, and return the tokens that were loaded."""
    out = kept.generate(ids, max_new_tokens=12, do_sample=False, **options)
    kept.flush()
    assert out.tolist() == greedy(kept.model, ids).tolist()
    assert kept.last.prompt_tokens == ids.shape[1]
    return kept.last.hit_tokens


def test_the_second_time_it_loads_all_but_the_last_grain(keep: Keep, model: Any) -> None:
    kept = keep(model)
    assert say(kept, tokens(600)) == 0
    assert say(kept, tokens(600)) == 576


def test_at_least_one_token_is_computed(keep: Keep, model: Any) -> None:
    kept = keep(model)
    assert say(kept, tokens(512)) == 0
    assert say(kept, tokens(512)) == 480


def test_a_prompt_that_diverges_in_the_middle_of_a_chunk(keep: Keep, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(600))
    other = torch.cat([tokens(600)[:, :350], tokens(250, seed=2)], 1)
    assert say(kept, other) == 320
    assert say(kept, other) == 576
    assert say(kept, tokens(600)) == 576


def test_a_longer_prompt_loads_what_it_shares(keep: Keep, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    longer = torch.cat([tokens(300), tokens(500, seed=2)], 1)
    assert say(kept, longer) == 288
    assert say(kept, longer) == 768


def test_a_shorter_prompt_loads_part_of_a_chunk(keep: Keep, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(600))
    assert say(kept, tokens(600)[:, :100]) == 96


@pytest.mark.parametrize("n", [1, 2, 31, 33])
def test_prompts_about_as_short_as_a_grain(keep: Keep, model: Any, n: int) -> None:
    kept = keep(model)
    assert say(kept, tokens(n)) == 0
    assert say(kept, tokens(n)) == (32 if n > 32 else 0)


def test_another_process_finds_it_on_disk(keep: Keep, model: Any) -> None:
    first = keep(model)
    say(first, tokens(600))
    first.close()
    assert say(keep(tiny_llama()), tokens(600)) == 576


def test_other_weights_find_nothing(keep: Keep, model: Any) -> None:
    first = keep(model)
    say(first, tokens(300))
    first.close()
    assert say(keep(tiny_llama(seed=5)), tokens(300)) == 0


def test_another_salt_finds_nothing(keep: Keep, model: Any) -> None:
    first = keep(model, salt="one")
    say(first, tokens(300))
    first.close()
    second = keep(model, salt="two")
    assert say(second, tokens(300)) == 0
    assert say(second, tokens(300)) == 288


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_comes_back_is_what_was_computed(keep: Keep, dtype: torch.dtype) -> None:
    one = tiny_llama().to(dtype)
    kept = keep(one)
    kept.generate(tokens(300), max_new_tokens=2, do_sample=False)
    kept.flush()
    cache, other = kept.cache(tokens(300)), kept.cache(tokens(300), retrieve=False, store=False)
    n = cache.get_seq_length()
    assert n == 288
    with torch.no_grad():
        one(tokens(300)[:, n:], **with_cache(one, cache))
        one(tokens(300), **with_cache(one, other))
    for a, b in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(a.keys[:, :, :n], b.keys[:, :, :n], rtol=0, atol=0)
        torch.testing.assert_close(a.values[:, :, :n], b.values[:, :, :n], rtol=0, atol=0)


def test_a_prefill_in_pieces(keep: Keep, model: Any) -> None:
    kept = keep(model)
    assert say(kept, tokens(600), prefill_chunk_size=128) == 0
    assert say(kept, tokens(600), prefill_chunk_size=128) == 576
    longer = torch.cat([tokens(600), tokens(500, seed=2)], 1)
    assert say(kept, longer, prefill_chunk_size=128) == 576
    assert say(kept, longer, prefill_chunk_size=128) == 1088


def test_the_answer_is_kept_for_the_next_turn(keep: Keep, model: Any) -> None:
    kept = keep(model, store_decode=True)
    out = kept.generate(tokens(300), max_new_tokens=40, do_sample=False)
    kept.flush()
    # 340 tokens, of which the last was never run through the model
    assert say(kept, torch.cat([out, tokens(60, seed=2)], 1)) == 320


def test_without_it_the_answer_is_not_kept(keep: Keep, model: Any) -> None:
    kept = keep(model)
    out = kept.generate(tokens(300), max_new_tokens=40, do_sample=False)
    kept.flush()
    assert say(kept, torch.cat([out, tokens(60, seed=2)], 1)) == 288


def test_more_is_generated_than_room_was_made_for(keep: Keep, model: Any) -> None:
    kept = keep(model, store_decode=True)
    kept._room = lambda prompt, options: 4  # type: ignore[method-assign]
    assert say(kept, tokens(300)) == 0
    assert say(kept, tokens(300)) == 288


def test_generate_returns_what_the_model_would(keep: Keep, model: Any) -> None:
    kept = keep(model, store_decode=True)
    out = kept.generate(
        tokens(100), max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    alone = greedy(model, tokens(100), 4, return_dict_in_generate=True, output_logits=True)
    assert out.sequences.tolist() == alone.sequences.tolist()
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(alone.logits))


def test_opening_tests_the_layout_for_every_prompt(
    keep: Keep, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory of its own, once: no request's cache is written to for it, or waits for it."""
    tested: list[Any] = []
    real = selftest.check_layout

    def watched(layout: Any, *, native: bool) -> None:
        tested.append(layout)
        real(layout, native=native)

    monkeypatch.setattr(selftest, "check_layout", watched)
    kept = keep(model)
    assert len(tested) == 1
    for length in (1, 2, 300, 600):
        say(kept, tokens(length))
    assert len(tested) == 1
    assert kept.pipe.off is None
