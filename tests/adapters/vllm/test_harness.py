"""The tests of this folder can fail: a wrong KV cache changes what the model says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Engine, prompt

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Reference


def test_a_wrong_block_is_noticed(engine: Engine, llama: Path, reference: Reference) -> None:
    """One block out of 31, in vLLM's own prefix cache."""
    noticed = 0
    for seed in range(8):
        tokens = prompt(1000, seed=seed)
        plain = engine.use(llama, enable_prefix_caching=True)
        plain.ask("reset", connector=False)
        assert plain.one(tokens).ids == reference(tokens)
        again = plain.one(tokens)
        assert again.ids == reference(tokens)
        assert again.cached == 31 * 32
        first, *_, last = plain.ask("blocks", tokens=tokens)
        plain.ask("spoil", one=first, other=last)
        wrong = plain.one(tokens)
        assert wrong.cached == 31 * 32
        noticed += wrong.ids != reference(tokens)
    assert noticed >= 6, noticed
