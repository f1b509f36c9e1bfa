"""Nothing touches a lease that has gone home: what was given up, what stands beside, what is late.

All of this folder runs over memory that tells of late writes; here are those that once were made.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk
from test_every_codec import key_file

from tierloom.pipeline.run.threads import Pool
from tierloom.stages.codecs.encryption.aesgcm import AesGcm
from tierloom.stages.ops import put as put_stage
from tierloom.testing import PoisonArena

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Open

IDS = tokens(256)


class Barrier:
    """Holds a function back in the thread that calls it, once it has got there."""

    def __init__(self, fn: Any) -> None:
        self._fn = fn
        self.reached, self.go, self.done = (threading.Event() for _ in range(3))

    def __call__(self, *args: Any) -> Any:
        self.reached.set()
        assert self.go.wait(30)
        try:
            return self._fn(*args)
        finally:
            self.done.set()


@contextmanager
def arena_of(nbytes: int) -> Iterator[PoisonArena]:
    arena = PoisonArena(nbytes, huge_pages=False)
    yield arena
    arena.close()


def test_a_store_given_up_while_its_frames_are_put_together(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that copies them goes on: into memory that is still its own."""
    filling = Barrier(put_stage._fill)
    monkeypatch.setattr(put_stage, "_fill", filling)
    source = config(tiers__cold={"use": "blackhole"})
    stages = source["graphs"]["store"]["stages"]
    del stages["hot"]
    stages |= {
        "host": {"use": "to_host", "from": "pack"},
        "small": {"use": "zstd"},
        "cold": {"use": "put", "tier": "cold", "when_full": "block"},
    }
    engine = Engine(dim=32)
    pipe = opened(source, engine)
    ticket = pipe.store(IDS[:64], engine.caches, engine.slots(64))
    assert filling.reached.wait(10)
    ticket.cancel()
    ticket.future.result(10)
    assert pipe.arena.leases, "the memory went home under the thread"
    filling.go.set()
    assert filling.done.wait(10)
    settle(pipe)
    pipe.arena.check()  # type: ignore[attr-defined]


def test_what_was_acknowledged_is_not_written_by_one_that_was_given_up(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two stores, the second gets the memory of the first: and nobody else's bytes."""
    filling = Barrier(put_stage._fill)
    monkeypatch.setattr(put_stage, "_fill", filling)
    monkeypatch.setenv("TIERLOOM_COPYING", "2")
    source = config(tiers__cold={"use": "blackhole"}, verify="remote")
    source["graphs"]["store"]["stages"] |= {
        "host": {"use": "to_host", "from": "pack"},
        "small": {"use": "zstd"},
        "cold": {"use": "put", "tier": "cold", "when_full": "block"},
    }
    source["graphs"]["store"]["stages"]["hot"]["from"] = "pack"
    engine = Engine(dim=32)
    pipe, at = opened(source, engine), engine.slots(256)
    pipe.arena._most = 0  # type: ignore[attr-defined]  # memory is leased again at once
    first = pipe.store(tokens(64, seed=9), engine.caches, at[:64])
    assert filling.reached.wait(10)
    first.cancel()
    first.future.result(10)
    monkeypatch.setattr(put_stage, "_fill", filling._fn)
    pipe.store(IDS, engine.caches, at).wait()
    filling.go.set()
    assert filling.done.wait(10)
    settle(pipe)
    target = engine.blank()
    assert pipe.retrieve(IDS, target.caches, at).wait().tokens == 256
    assert torch.equal(engine.rows(at), target.rows(at))


@pytest.mark.parametrize("earlier", ["put", "encoder"])
def test_a_branch_puts_together_what_another_still_encodes(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    """zstd -> warm, and zstd -> aesgcm -> cold: whichever of the two comes first."""
    monkeypatch.setenv("TIERLOOM_COPYING", "2")
    ready, encode, fill = threading.Event(), AesGcm._encode, put_stage._fill
    ours: list[Any] = []

    def locked(self: Any, job: Any) -> Any:
        """Encrypts when the sibling has put its own together, or before."""
        if earlier == "put":
            assert ready.wait(10)
        result = encode(self, job)
        ready.set()
        return result

    def filled(made: Any, frames: Any) -> None:
        ours.append(made)
        if earlier == "encoder" and len(ours) == 1:
            assert ready.wait(10)
        fill(made, frames)

    assemble = put_stage.Put._assemble

    async def assembled(self: Any, *args: Any) -> Any:
        made = await assemble(self, *args)
        asyncio.get_running_loop().call_soon(ready.set)
        return made

    monkeypatch.setattr(AesGcm, "_encode", locked)
    monkeypatch.setattr(put_stage, "_fill", filled)
    monkeypatch.setattr(put_stage.Put, "_assemble", assembled)
    source = with_disk(tmp_path / "disk", tiers__cold={"use": "files", "path": str(tmp_path)})
    source["graphs"]["retrieve"]["stages"]["grow"]["keys"] = [key_file(tmp_path)]
    stages = source["graphs"]["store"]["stages"]
    del stages["warm"]
    stages |= {
        "host": {"use": "to_host", "from": "pack"},
        "small": {"use": "zstd", "from": "host"},
        "warm": {"use": "put", "tier": "warm", "from": "small", "when_full": "block"},
        "lock": {"use": "aesgcm", "keys": [key_file(tmp_path)], "from": "small"},
        "cold": {"use": "put", "tier": "cold", "from": "lock", "when_full": "block"},
    }
    engine = Engine(dim=32)
    pipe, at = opened(source, engine), engine.slots(64)
    receipt = pipe.store(IDS[:64], engine.caches, at).wait()
    assert (receipt.lost, receipt.tiers) == ({}, {"hot": 1, "warm": 1, "cold": 1})
    settle(pipe)
    for others in ("hot",), ("hot", "warm"):
        for name in others:
            pipe._portal.call(pipe.tiers[name].clear)
        target = engine.blank()
        got = pipe.retrieve(IDS[:64], target.caches, at).wait()
        assert got.tokens == 64, others
        assert torch.equal(engine.rows(at), target.rows(at))
        settle(pipe)


def test_a_call_holds_what_it_names_until_its_thread_is_through() -> None:
    pool = Pool(1, "test")
    with arena_of(1 << 20) as arena:
        lease, call = arena.lease(4096), Barrier(lambda: lease.refs)

        async def life() -> None:
            task = asyncio.create_task(pool(call, leases=[lease]))
            await asyncio.to_thread(call.reached.wait, 10)
            assert lease.refs == 2
            task.cancel()
            await asyncio.sleep(0)
            lease.release()
            assert arena.leases == 1, "its caller has gone, its thread has not"
            call.go.set()
            assert await pool(lambda: arena.leases) == 0

        asyncio.run(life())
    pool.close()


def test_a_call_that_no_thread_took_gives_back_at_once() -> None:
    """A thread that hangs must not keep what waits behind it."""
    pool, hangs, begun = Pool(1, "test"), Barrier(lambda: None), []
    with arena_of(1 << 20) as arena:
        lease = arena.lease(4096)

        async def life() -> None:
            first = asyncio.create_task(pool(hangs))
            await asyncio.to_thread(hangs.reached.wait, 10)
            second = asyncio.create_task(pool(begun.append, 1, leases=[lease]))
            await asyncio.sleep(0)
            assert lease.refs == 2
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert lease.refs == 1
            hangs.go.set()
            await first

        asyncio.run(life())
        lease.release()
    pool.close()
    assert not begun


def test_a_pool_that_is_closed_gives_back_what_waits_in_it() -> None:
    pool, hangs = Pool(1, "test"), Barrier(lambda: None)
    with arena_of(1 << 20) as arena:
        lease = arena.lease(4096)

        async def life() -> None:
            first = asyncio.create_task(pool(hangs))
            await asyncio.to_thread(hangs.reached.wait, 10)
            second = asyncio.create_task(pool(lambda: None, leases=[lease]))
            await asyncio.sleep(0)
            pool.close(timeout=0.01)
            assert lease.refs == 1
            with pytest.raises(RuntimeError, match="pool that is closed"):
                await pool(lambda: None, leases=[lease])
            assert lease.refs == 1
            second.cancel()
            hangs.go.set()
            await first

        asyncio.run(life())
        lease.release()
    for thread in pool._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_of_leases_that_are_not_all_there_none_is_kept() -> None:
    pool = Pool(1, "test")
    with arena_of(1 << 20) as arena:
        there, gone = arena.lease(4096), arena.lease(4096)
        gone.release()

        async def life() -> None:
            with pytest.raises(RuntimeError, match="after its last release"):
                await pool(lambda: None, leases=[there, gone])

        asyncio.run(life())
        assert there.refs == 1
        there.release()
    pool.close()
