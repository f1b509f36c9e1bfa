"""Memory that a client still reads when its caller has gone: held, and let go of by the loop."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import anyio
import pytest

from tierloom.stages.memory.held import Transfers, held
from tierloom.stages.tiers.buckets.bucket import Bucket, S3Options
from tierloom.testing import SIZE, PoisonArena

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def arena():
    arena = PoisonArena(8 * SIZE, huge_pages=False)
    yield arena
    arena.close()


class Client:
    """obstore, which sends what it was given for as long as it likes."""

    exceptions = SimpleNamespace(
        AlreadyExistsError=FileExistsError, PermissionDeniedError=PermissionError
    )

    def __init__(self) -> None:
        self.sending: list[memoryview] = []
        self.error: Exception | None = None

    def put_async(self, store, path, body, **how):
        self.sending.append(body)
        return self._answer()

    async def _answer(self) -> None:
        if self.error is not None:
            raise self.error
        await anyio.sleep_forever()


@pytest.fixture
def bucket():
    made = Bucket(S3Options(url="s3://b", unsigned=True, retries=0), "f")
    made._obs = Client()
    return made


async def given_up(bucket, lease):
    """A put that its caller leaves, and the client does not."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bucket.put, "name", lease, SIZE)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    lease.release()


async def test_what_a_client_still_sends_stays(arena, bucket):
    lease = arena.lease(SIZE)
    lease.view[:] = b"!" * SIZE
    await given_up(bucket, lease)
    assert not await bucket.transfers.idle(0.1)
    assert arena.leases == 1
    assert bytes(bucket._obs.sending[0]) == b"!" * SIZE
    bucket._obs.sending.clear()
    assert await bucket.transfers.idle(10)
    assert arena.leases == 0


async def test_nobody_asks_and_it_comes_home_all_the_same(arena, bucket):
    await given_up(bucket, arena.lease(SIZE))
    bucket._obs.sending.clear()
    with anyio.fail_after(10):
        while arena.leases:  # noqa: ASYNC110 (nothing tells)
            await anyio.sleep(0.01)
    assert not bucket.transfers


@pytest.mark.parametrize("error", [FileExistsError("there"), OSError("gone")])
async def test_a_client_that_fails_and_still_sends(arena, bucket, error):
    bucket._obs.error = error
    lease = arena.lease(SIZE)
    if isinstance(error, FileExistsError):
        assert not await bucket.put("name", lease, SIZE)
    else:
        with pytest.raises(Exception, match="PUT failed: OSError"):
            await bucket.put("name", lease, SIZE)
    lease.release()
    assert arena.leases == 1
    bucket._obs.sending.clear()
    bucket._obs.error = None
    assert await bucket.transfers.idle(10)
    assert arena.leases == 0


async def test_it_lets_go_under_the_lock_of_the_arena(arena, bucket):
    """The collector runs where it likes: also where the arena is locked."""
    await given_up(bucket, arena.lease(SIZE))

    def collect() -> None:
        with arena.lock:
            bucket._obs.sending.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for a lock that it holds"
    assert await bucket.transfers.idle(10)


async def test_what_is_through_already_is_not_kept(arena):
    transfers, lease = Transfers(), arena.lease(SIZE)
    transfers.keep(lease, lambda: True)
    assert not transfers
    lease.release()
    assert arena.leases == 0


async def test_held_is_given_back_however_it_ends(arena):
    lease, other = arena.lease(SIZE), arena.lease(SIZE)
    with pytest.raises(ZeroDivisionError), held(lease, other):
        raise ZeroDivisionError((lease.refs, other.refs) == (2, 2))
    assert (lease.refs, other.refs) == (1, 1)
    other.release()
    with pytest.raises(RuntimeError, match="after its last release"), held(lease, other):
        pass
    assert lease.refs == 1
    lease.release()
