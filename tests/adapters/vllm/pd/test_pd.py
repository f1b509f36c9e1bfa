"""Two real engines: one computes prompts, the other answers them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Expect

ASKS = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
        "remote_block_ids": None, "remote_host": None, "remote_port": None}  # fmt: skip
LENGTHS = (1, 31, 33, 64, 65, 500, 1024, 1100)


def kv(preset: str, role: str, folder: Path, **options: Any) -> dict[str, Any]:
    disk = {
        "tiers.warm.path": str(folder / preset), "tiers.warm.capacity": "256 MiB",
        "tiers.warm.segment": "32 MiB",
    }  # fmt: skip
    return transfer(preset, **disk, **options) | {"kv_role": role}


@contextlib.contextmanager
def prefiller(model: Path, folder: Path, **options: Any) -> Iterator[Engine]:
    with contextlib.closing(Engine(folder, "prefiller")) as made:
        made.use(model, kv("prefiller", "kv_producer", folder, **options))
        yield made


def told(p: Engine, tokens: list[int]) -> dict[str, Any]:
    """What the prefiller says of a prompt, which it has computed."""
    said = p.one(tokens, kv=ASKS, max_tokens=1).kv
    assert said is not None
    assert said["remote_block_ids"] == []
    # By this vLLM reports the prefiller's own cache as the decoder's, not what it has loaded.
    assert said.pop("remote_prefill_cached_tokens") == 0
    return said


def test_one_computes_and_the_other_answers(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path
) -> None:
    """Also where their block sizes differ, and when the first is gone."""
    with prefiller(llama, tmp_path) as p:
        patient = kv("decoder", "kv_both", tmp_path, **{"handoff.wait": "20 s"})
        engine.use(llama, patient, block_size=64)
        for n in LENGTHS:
            tokens = prompt(n, seed=100 + n)
            said = told(p, tokens)
            cached = (n - 1) // 32 * 32
            expect(engine, tokens, kv=said, cached=cached if cached >= 64 else 0)
        p.settle()
        engine.settle()
        late = prompt(700, seed=7)
        said = told(p, late)
        expect(engine, prompt(700, seed=8), kv=said, cached=0)  # another prompt's ticket
        expect(engine, prompt(700, seed=9), kv=said | {"remote_port": "x"}, cached=0)
        expect(engine, prompt(700, seed=10), kv=said | {"remote_host": "192.0.2.1"}, cached=0)
        p.kill()
        expect(engine, late, kv=said, cached=0)
        engine.settle()
        engine.forget()
        expect(engine, prompt(1100, seed=1200), kv=said, cached=1088)  # it stayed
        engine.settle()
