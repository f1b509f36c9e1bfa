"""Two real engines: one computes prompts, the other answers them."""

from __future__ import annotations

import contextlib
import threading
import time
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from driver_process import EngineError
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Expect, Reference

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
    # By this vLLM would report the prefiller's cache as the decoder's, not what it has loaded.
    assert "remote_prefill_cached_tokens" not in said
    return said


def asked_at_once(said: dict[str, Any], ticket: str) -> dict[str, Any]:
    """What a proxy that asks both tells the decoder."""
    return said | {"transfer_id": ticket, "remote_request_id": ticket}


def test_one_computes_and_the_other_answers(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path
) -> None:
    """Also where their block sizes differ, and when the first is gone."""
    with prefiller(llama, tmp_path) as p:
        patient = kv("decoder", "kv_consumer", tmp_path, **{"handoff.wait": "20 s"})
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


def test_both_are_asked_at_once(
    engine: Engine, llama: Path, reference: Reference, tmp_path: Path
) -> None:
    """The decoder asks before the prefiller has the request, and gets layers as they are done."""
    with prefiller(llama, tmp_path) as p:
        engine.use(llama, kv("decoder", "kv_both", tmp_path, **{"handoff.wait": "60 s"}))
        said = told(p, prompt(64, seed=30))
        for n in (33, 1000, 2500):
            tokens, ticket = prompt(n, seed=40 + n), f"ticket-{n}"
            name = engine.add(tokens, kv=asked_at_once(said, ticket))
            engine.ask("step", times=3)
            p.one(tokens, kv=ASKS | {"transfer_id": ticket}, max_tokens=1)
            (answer,) = engine.finish(name)
            assert answer.ids == reference(tokens, max_tokens=8)
            assert answer.cached == (n - 1) // 32 * 32
        p.settle()
        engine.settle()
        waits = engine.add(prompt(900, seed=60), kv=asked_at_once(said, "never"))
        engine.ask("step", times=3)
        p.kill()
        (answer,) = engine.finish(waits)
        assert (answer.ids, answer.cached) == (reference(prompt(900, seed=60), max_tokens=8), 0)
        engine.settle()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["after", "together"])
def test_two_hundred_prompts(
    engine: Engine, llama: Path, reference: Reference, tmp_path: Path, way: str
) -> None:
    random = Random(5)
    with prefiller(llama, tmp_path) as p:
        patient = kv("decoder", "kv_both", tmp_path, **{"handoff.wait": "120 s"})
        engine.use(llama, patient, block_size=128)
        said = told(p, prompt(64, seed=31))
        for i in range(200):
            n = random.choice([random.randint(1, 300), random.randint(1, 4080)])
            tokens = prompt(n, seed=5000 + i)
            if way == "after":
                (answer,) = engine.generate(tokens, kv=told(p, tokens))
            else:
                name = engine.add(tokens, kv=asked_at_once(said, f"t-{i}"))
                engine.ask("step", times=random.choice([0, 3]))
                p.one(tokens, kv=ASKS | {"transfer_id": f"t-{i}"}, max_tokens=1)
                (answer,) = engine.finish(name)
            assert answer.ids == reference(tokens, max_tokens=8), (n, i)
            assert answer.cached >= (n - 1) // 32 * 32 - 96, (n, i)
        p.settle()
        engine.settle()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("theirs", "ours"), [(2, 2), (2, 1), (1, 2)])
def test_engines_that_divide_the_model_otherwise(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path, theirs: int, ours: int
) -> None:
    """Each worker of the decoder gets its share of the heads from whichever worker has them."""
    many = {"tensor_parallel_size": theirs} if theirs > 1 else {}
    with contextlib.closing(Engine(tmp_path, "prefiller")) as p:
        p.use(llama, kv("prefiller", "kv_producer", tmp_path), **many)
        patient = kv("decoder", "kv_both", tmp_path, **{"handoff.wait": "20 s"})
        many = {"tensor_parallel_size": ours} if ours > 1 else {}
        engine.use(llama, patient, block_size=64, **many)
        told(p, prompt(64, seed=29))  # from now on each of its workers knows of all
        for n in (33, 500, 1024, 2500):
            tokens = prompt(n, seed=200 + n)
            cached = (n - 1) // 32 * 32
            expect(engine, tokens, kv=told(p, tokens), cached=cached if cached >= 64 else 0)
        p.settle()
        engine.settle()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_prefiller_that_is_killed_at_any_moment(
    engine: Engine, llama: Path, reference: Reference, tmp_path: Path
) -> None:
    """While it computes, while it sends, and after it; the decoder says what one engine says."""
    random = Random(6)
    patient = kv("decoder", "kv_both", tmp_path, **{"handoff.wait": "1 s"})
    for i in range(12):
        tokens = prompt(3000, seed=7000 + i)
        with prefiller(llama, tmp_path) as p:
            engine.use(llama, patient)
            said = told(p, prompt(64, seed=31))
            if i % 2:
                said = told(p, tokens)
                name = engine.add(tokens, kv=said)
                engine.ask("step", times=random.choice([1, 2, 3]))
                time.sleep(random.random() * 0.02)
                p.kill()
            else:
                name = engine.add(tokens, kv=asked_at_once(said, f"k-{i}"))
                engine.ask("step", times=3)
                p.add(tokens, kv=ASKS | {"transfer_id": f"k-{i}"}, max_tokens=1)
                killer = threading.Timer(random.random() * 0.8, p.kill)
                killer.start()
                with contextlib.suppress(EngineError, OSError, ValueError, AssertionError):
                    p.ask("step", times=4)
                killer.join()
            (answer,) = engine.finish(name)
            assert answer.ids == reference(tokens, max_tokens=8), i
            engine.settle()
