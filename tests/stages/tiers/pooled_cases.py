"""What the tiers that keep pieces in a pool must do, whichever pool it is.

`replaced(tier, name, value)` puts a value, or none, in the place of another behind the tier's back.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import anyio
import anyio.from_thread
import anyio.to_thread
import xxhash

from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.pools.manifest import Manifest
from tierloom.testing import ALL, FRAMES, SIZE, key_of, make_object


def manifest_of(tier, key):
    (raw,) = tier._peek([key.hex()])
    return Manifest.unpack(raw)


def names_of(tier, key):
    """Names of an object's pieces, in order."""
    manifest = manifest_of(tier, key)
    return [name for name, _, _ in manifest.names(key, tier.piece)]


def damaged(tier, key, change, replaced):
    """Let `change` loose on an object's bytes and put what becomes of them in its place."""
    names = names_of(tier, key)
    values = tier._peek(names)
    raw = bytearray(b"".join(values))
    change(raw)
    for name, value in zip(names, values, strict=True):
        replaced(tier, name, bytes(raw[: len(value)]))
        del raw[: len(value)]


async def give_up_a_read(tier, monkeypatch, freeze):
    """`freeze` the server under a read of object 1, then cancel the read. Its thread is through
    when the client has let go of it and the event that is returned is set, whichever is later."""
    begun, through, fetch = anyio.Event(), threading.Event(), tier._fetch

    def freezing(pieces):
        freeze()
        anyio.from_thread.run_sync(begun.set)
        found = fetch(pieces)
        assert through.wait(60)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tier, "_fetch", freezing)
        async with anyio.create_task_group() as group:
            group.start_soon(tier.read, [Read(key_of(1), ALL)])
            await begun.wait()
            await anyio.sleep(0.2)  # for its request to set out
            group.cancel_scope.cancel()
    return through


async def check_namespaces(bench, ctx, folder, clock, arena):
    """Two namespaces of one pool see nothing of one another, and each clears its own."""
    other = ctx._replace(namespace=b"o" * 32)
    async with (
        bench.opened(ctx, folder, clock) as one,
        bench.opened(other, folder, clock) as two,
        bench.opened(ctx, folder, clock) as again,
    ):
        await one.clear()
        await bench.put(one, 1, 2)
        assert await bench.get(again, 1) == bench.bytes_of(arena, 1)
        assert await two.exists([key_of(1)]) == [False]
        assert await bench.get(two, 1) is Lost.ABSENT
        assert await bench.put(two, 3) == [None]
        assert await two.clear() == 1
        assert await one.exists([key_of(1), key_of(2)]) == [True, True]
        assert await one.clear() == 2
        assert await again.exists([key_of(1), key_of(2)]) == [False, False]


async def check_a_piece_that_was_evicted(bench, tier, arena, replaced):
    """One missing piece is a miss; the object is forgotten, and can be stored again."""
    for n in range(FRAMES + 1):
        await bench.put(tier, 1, 2)
        replaced(tier, names_of(tier, key_of(1))[n], None)
        assert await tier.exists([key_of(1)]) == [True]
        reads = [Read(key_of(1), ALL), Read(key_of(2), ALL)]
        await tier.read(reads)
        assert reads[0].lost is Lost.ABSENT
        assert reads[1].lost is None
        reads[1].object.lease.release()
        assert await tier.exists([key_of(1), key_of(2)]) == [False, True]
        assert await bench.put(tier, 1) == [None]
        assert await bench.get(tier, 1) == bench.bytes_of(arena, 1)


async def check_that_a_record_makes_it(bench, tier, arena):
    """A writer who dies before the manifest leaves nothing that anybody sees."""

    class Died(Exception):
        pass

    def die(manifests):
        raise Died

    commit, tier._commit = tier._commit, die
    with suppress(Died):
        await bench.put(tier, 1)
    tier._commit = commit
    assert await tier.exists([key_of(1)]) == [False]
    assert await bench.get(tier, 1) is Lost.ABSENT
    assert await bench.put(tier, 1) == [None]
    assert await bench.get(tier, 1) == bench.bytes_of(arena, 1)


async def check_hostile_manifests(bench, tier, replaced):
    """A manifest that is not one, or that lies, is a miss and is taken away."""
    await bench.put(tier, 1)
    right = manifest_of(tier, key_of(1))
    cuts = right.boundaries
    manifests = [
        b"x", b"TLR1" * 20, bytes(4096), right.pack()[:-1] + b"?",
        Manifest(right.writer, (4096,)).pack(), Manifest(right.writer, (4096, 4096)).pack(),
        Manifest(right.writer, (4096, 4097)).pack(), Manifest(right.writer, (4096, 1 << 60)).pack(),
        Manifest(b"somebody", cuts).pack(), Manifest(right.writer, cuts[:-1]).pack(),
        Manifest(right.writer, (*cuts, cuts[-1] + 4096)).pack(),
        Manifest(right.writer, (4096, cuts[-1])).pack(),
    ]  # fmt: skip
    for manifest in manifests:
        replaced(tier, key_of(2).hex(), manifest)
        assert await bench.get(tier, 2) in (Lost.CORRUPT, Lost.ABSENT), manifest
        assert await tier.exists([key_of(2)]) == [False]
        await bench.put(tier, 1)
        replaced(tier, key_of(1).hex(), manifest)
        assert await bench.get(tier, 1) in (Lost.CORRUPT, Lost.ABSENT), manifest
        assert await bench.put(tier, 1) == [None]
        assert isinstance(await bench.get(tier, 1), bytes)
    replaced(tier, key_of(3).hex(), Manifest(right.writer, (4096, 1 << 39)).pack())
    assert await bench.get(tier, 3) is Lost.NO_ROOM


async def check_replaced_between_two_layers(bench, tier, arena):
    """Another writer's object took the place: what was begun is not gone on with."""
    await bench.put(tier, 1)
    read = Read(key_of(1), 1)
    await tier.read([read])
    await tier.delete([key_of(1)])
    other = make_object(arena, 1)
    frames = other.header.frames
    other.seal([frame.checksum ^ 1 for frame in frames])
    assert await tier.put([other]) == [None]
    other.lease.release()
    again = Read(key_of(1), ALL, read.object)
    await tier.read([again])
    assert again.lost is Lost.ABSENT
    assert read.object.loaded == 1
    assert await tier.exists([key_of(1)]) == [True]
    read.object.lease.release()
    assert tier.stat()[:2] == (1, SIZE)


async def check_a_record_that_differs_between_two_layers(bench, tier, replaced):
    """It was made by the same writer and has the same header, and says of frames that they lie
    elsewhere: nothing is read by it, beside its place or beyond the lease."""
    await bench.put(tier, 1)
    read = Read(key_of(1), 1)
    await tier.read([read])
    right, held = manifest_of(tier, key_of(1)), read.object
    fetched, fetch = [], tier._fetch
    tier._fetch = lambda pieces: fetched.extend(pieces) or fetch(pieces)
    far = right.boundaries[-1] + (1 << 20)
    for cuts in (
        (*right.boundaries[:-1], far),
        (*right.boundaries, far),
        (*right.boundaries[:2], far),
    ):
        replaced(tier, key_of(1).hex(), Manifest(right.writer, cuts).pack())
        again = Read(key_of(1), ALL, held)
        await tier.read([again])
        assert (again.lost, held.loaded, fetched) == (Lost.ABSENT, 1, [])
    replaced(tier, key_of(1).hex(), right.pack())
    again = Read(key_of(1), ALL, held)
    await tier.read([again])
    assert (again.lost, held.loaded) == (None, FRAMES)
    assert fetched
    held.lease.release()


async def check_a_record_of_a_later_format(bench, tier, replaced):
    """It stays, for those who know it."""
    await bench.put(tier, 1)
    right = manifest_of(tier, key_of(1)).pack()
    later = b"TLR2" + right[4:-8]
    replaced(tier, key_of(1).hex(), later + xxhash.xxh3_64_digest(later))
    for _ in range(2):
        assert await bench.get(tier, 1) is Lost.NEWER
        assert await tier.exists([key_of(1)]) == [True]
        assert await bench.put(tier, 1) == [None]
    assert tier.counts.corrupt == 0
    replaced(tier, key_of(1).hex(), right)
    assert isinstance(await bench.get(tier, 1), bytes)


async def check_two_writers_of_one_key(bench, tier, arena):
    """Both have kept it; it is there once, and nothing is left of the other's pieces."""
    removed = []
    remove = tier._remove
    tier._remove = lambda names: removed.extend(names) or remove(names)
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(bench.put, tier, 1)
    assert tier.stat()[:2] == (1, SIZE)
    assert tier.counts.puts == 1
    assert await bench.get(tier, 1) == bench.bytes_of(arena, 1)
    assert not set(removed) & set(names_of(tier, key_of(1)))
    assert not any(await anyio.to_thread.run_sync(tier._exists, removed or ["none"]))
