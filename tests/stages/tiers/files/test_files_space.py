"""Capacity of a large folder: looked at piece by piece, the oldest of samples go."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tierloom.stages.tiers.contract.tier import TierCounts
from tierloom.stages.tiers.files import space
from tierloom.stages.tiers.files.space import FilesOptions, FolderSpace

NOW = time.time()


class Folder:
    """Files of a few bytes under random names, and the space they have."""

    def __init__(self, path, count=0, *, capacity=0, ttl=0.0, seed=1):
        self.path, self._random = path, random.Random(seed)
        self.counts, self.looks, self.now = TierCounts(), [], NOW
        path.mkdir(exist_ok=True)
        self.files = [self.write(age=count - i) for i in range(count)]
        options = FilesOptions(path=str(path), capacity=capacity, ttl=ttl)
        self.space = FolderSpace(path, options, self.counts, lambda: self.now)
        look = self.space._look

        def noted(name):
            self.looks.append(name)
            return look(name)

        self.space._look = noted

    def name(self):
        name = self._random.randbytes(8).hex()
        return self.path / name[:2] / f"{name}.tlm"

    def write(self, age=0.0, nbytes=10, path=None):
        path = path or self.name()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(nbytes))
        os.utime(path, (NOW - age,) * 2)
        return path

    def put(self, nbytes=10):
        path = self.name()
        assert self.space.reserve(path, nbytes)
        self.write(nbytes=nbytes, path=path)
        self.space.named(path, nbytes)
        return path

    @property
    def there(self):
        return list(self.path.glob("*/*.tlm"))

    @property
    def counted(self):
        return self.space.holdings.stat[:2]


def test_a_large_folder_is_not_walked_for_a_put(tmp_path):
    """The oldest go, by and large, and no put looks at more than a sample."""
    folder = Folder(tmp_path / "kv", 1600, capacity=16_000)
    folder.space.open()
    assert folder.counted == (1600, 16_000)
    most = 0
    for _ in range(160):
        folder.looks.clear()
        folder.put()
        most = max(most, len(folder.looks))
    assert most <= 2 * space._SAMPLE * 256 // 1600
    gone = [i for i, path in enumerate(folder.files) if not path.exists()]
    assert len(gone) == folder.counts.evicted == 160
    assert sum(i < 320 for i in gone) > 140
    assert max(gone) < 800, "none of the younger half"
    assert len(folder.there) == folder.counted[0] == 1600


def test_a_small_folder_keeps_the_exact_order(tmp_path):
    folder = Folder(tmp_path / "kv", 100, capacity=1000)
    folder.space.open()
    for count in range(1, 60):
        folder.put()
        assert [path.exists() for path in folder.files] == [False] * count + [True] * (100 - count)


def test_opening_a_huge_folder_looks_at_a_sample(tmp_path, monkeypatch):
    """The rest is assumed, and counted by those who put."""
    monkeypatch.setattr(space, "_OPENING", 0.0)
    folder = Folder(tmp_path / "kv", 1200, capacity=1 << 30)
    folder.space.open()
    assert len(folder.looks) < 80
    assert 900 < folder.counted[0] < 1500
    for _ in range(256):
        folder.put()
    assert folder.counted == (1456, 14_560)


def test_what_is_used_meanwhile_stays(tmp_path):
    folder = Folder(tmp_path / "kv", 320, capacity=3200)
    folder.space.open()
    folder.put()
    (oldest, *_) = (path for path in folder.files if path.exists())
    os.utime(oldest, (NOW, NOW))
    for _ in range(40):
        folder.put()
    assert oldest.exists()


def test_others_put_and_delete_there_too(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "_EVERY", 0.0)
    folder = Folder(tmp_path / "kv", 200, capacity=1 << 30)
    folder.space.open()
    for path in folder.files[:100]:
        path.unlink()
    for _ in range(100):
        folder.write(nbytes=20)
    for _ in range(256):
        folder.put()
    for _ in range(256):
        folder.space._look_on()
    assert folder.counted == (len(folder.there), sum(p.stat().st_size for p in folder.there))


def test_two_hosts_keep_one_capacity(tmp_path):
    one = Folder(tmp_path / "kv", 500, capacity=5_000)
    two = Folder(tmp_path / "kv", capacity=5_000, seed=2)
    one.space.open()
    two.space.open()
    for _ in range(100):
        one.put()
        two.put()
    for folder in (one, two):
        folder.space.open()
    assert len(one.there) == one.counted[0] == two.counted[0] <= 500
    assert len(one.there) > 425, "nor is much more deleted than is needed"


def test_what_is_too_old_goes_without_a_capacity(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "_EVERY", 0.0)
    folder = Folder(tmp_path / "kv", 200, ttl=1000.0)
    folder.space.open()
    assert len(folder.there) == 200
    folder.now += 900
    for _ in range(300):
        folder.put()
    assert not any(path.exists() for path in folder.files[:100])
    assert all(path.exists() for path in folder.files[101:])
    assert folder.counts.evicted == 0


def test_what_is_not_ours_to_delete(tmp_path, monkeypatch):
    """The next oldest goes; where there is none, that is tried once a minute, not by each put."""
    folder = Folder(tmp_path / "kv", 300, capacity=3000)
    folder.space.open()
    others, unlink = set(folder.files[:100]), Path.unlink

    def refused(path, **options):
        if path in others:
            raise PermissionError
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(10):
        folder.put()
    assert [i for i, path in enumerate(folder.files) if not path.exists()] == list(range(100, 110))
    others.update(folder.there)
    folder.put()
    folder.looks.clear()
    for _ in range(50):
        folder.put()
    assert len(folder.looks) <= 1


def test_nobody_waits_for_who_looks(tmp_path):
    """A look that hangs holds up neither sums nor puts that have room."""
    folder = Folder(tmp_path / "kv", 100, capacity=10_000)
    folder.space.open()
    files, reached, gate = folder.space._files, threading.Event(), threading.Event()

    def hangs(name):
        reached.set()
        assert gate.wait(30)
        yield from files(name)

    folder.space._files, folder.space._look_at = hangs, 0.0
    looking = threading.Thread(target=folder.put)
    looking.start()
    assert reached.wait(30)
    for _ in range(10):
        folder.put()
    gate.set()
    looking.join(30)
    assert folder.counted[0] == len(folder.there) == 111


def test_what_comes_during_a_look_is_counted(tmp_path):
    """It may have been seen or not: what was counted before stays."""
    folder = Folder(tmp_path / "kv", 50, capacity=10_000)
    folder.space.open()
    folder.space._look_at = float("inf")
    files, beside = folder.space._files, folder.files[0].with_name("late.tlm")

    def late(name):
        yield from files(name)
        assert folder.space.reserve(beside, 10)
        folder.write(path=beside)
        folder.space.named(beside, 10)

    folder.space._files = late
    folder.space._look(beside.parent.name)
    assert folder.counted == (51, 510)


@pytest.mark.parametrize("capacity", [3000, 300])
def test_sums_are_right_whatever_threads_do(tmp_path, monkeypatch, capacity):
    monkeypatch.setattr(space, "_EVERY", 0.0)
    folder = Folder(tmp_path / "kv", 50, capacity=capacity)
    folder.space.open()
    rng = random.Random(7)
    plans = [[(rng.random(), rng.randrange(1, 30)) for _ in range(150)] for _ in range(4)]

    def work(plan):
        for chance, nbytes in plan:
            if chance < 0.2:
                path = folder.name()
                folder.space.reserve(path, nbytes)
                folder.space.not_written(path, nbytes)
                continue
            path = folder.put(nbytes)
            if chance > 0.8:
                try:
                    path.unlink()
                except FileNotFoundError:
                    continue
                folder.space.deleted(path, nbytes)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder.space.open()
    assert folder.counted == (len(folder.there), sum(p.stat().st_size for p in folder.there))
    assert folder.counted[1] <= capacity
    assert all(each.writing == each.unnamed == 0 for each in folder.space._subfolders.values())
