"""What figures stand beside: a memcpy and the disk itself, for as many bytes in the same run.

Each round measures the yardstick and then the subject, so that both see the same noise of a shared
machine. Seconds of CPU are `process_time`: every thread of this process, system calls included.
"""

from __future__ import annotations

import mmap
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

GB = 1e9
DISK_THREADS, DISK_PIECE = 4, 32 << 20


class Took(NamedTuple):
    """Seconds of one call."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Took:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def cpu_of(*pids: int) -> float:
    """Seconds of CPU that processes and their children have spent, to the microsecond; of threads
    that are gone, too."""
    spent = 0.0
    for pid in pids:
        spent += time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            spent += cpu_of(*map(int, children.read_text().split()))
    return spent


def idle() -> None:
    """Wait until no thread of this process works any more: what a pipeline still does behind the
    requests before belongs to none of those that are measured."""
    busy = 1.0
    while busy > 0.002:
        busy = timed(lambda: time.sleep(0.05)).cpu


class Memcpy:
    """A flat copy by one thread between pages that are there already."""

    def __init__(self) -> None:
        self._from = self._to = np.zeros(0, np.uint8)

    def __call__(self, nbytes: int) -> None:
        if len(self._from) < nbytes:
            self._from, self._to = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        np.copyto(self._to[:nbytes], self._from[:nbytes])


class RawDisk:
    """The disk's own O_DIRECT rate: 4 threads, a `pwritev` or `preadv` of 32 MiB each at a time.

    The file is preallocated and written before it is measured, as segments are at steady state.
    Calls go round `spans` parts of it, so that a host's cache has no easier time than with a tier.
    """

    def __init__(self, folder: Path, nbytes: int, spans: int = 3) -> None:
        self._nbytes = -(-nbytes // DISK_PIECE) * DISK_PIECE
        self._spans, self._turn = spans, 0
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        self._fd = os.open(folder / "yardstick", flags, 0o600)
        os.posix_fallocate(self._fd, 0, self._nbytes * spans)
        # Small pages would cost half the rate, and shared maps get no huge ones by default.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._buffers = [mmap.mmap(-1, DISK_PIECE, private) for _ in range(DISK_THREADS)]
        for buffer in self._buffers:
            buffer.madvise(mmap.MADV_HUGEPAGE)
            buffer.write(os.urandom(DISK_PIECE))
        self._pool = ThreadPoolExecutor(DISK_THREADS)
        for _ in range(spans):
            self.write(self._nbytes)

    def write(self, nbytes: int) -> None:
        self._go(os.pwritev, nbytes)

    def read(self, nbytes: int) -> None:
        self._go(os.preadv, nbytes)

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    def _go(self, call: Callable[[int, list[Any], int], int], nbytes: int) -> None:
        base = self._turn % self._spans * self._nbytes
        self._turn += 1
        starts = range(0, nbytes, DISK_PIECE)

        def worker(n: int) -> None:
            for start in starts[n::DISK_THREADS]:
                size = min(DISK_PIECE, nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
                view = memoryview(self._buffers[n])[:size]
                if call(self._fd, [view], base + start) != size:
                    raise OSError("the disk moved less than was asked")

        list(self._pool.map(worker, range(DISK_THREADS)))


def measure(
    benchmark: BenchmarkFixture,
    run: Callable[[Any], object],
    *,
    nbytes: int,
    rounds: int,
    memcpy: Memcpy,
    disk: Callable[[int], None] | None = None,
    prepare: Callable[[], Any] = lambda: None,
    check: Callable[[Any], None] = lambda _: None,
) -> None:
    """Time `run(prepare())` beside its yardsticks, and write the figures into `extra_info`.

    `check` gets what `run` returned, untimed, and raises where the data is wrong: then there is no
    figure. The caller has warmed up.
    """
    copies: list[Took] = []
    disks: list[Took] = []
    took: list[Took] = []
    results: list[object] = []
    memcpy(nbytes)

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        while results:
            check(results.pop())
        copies.append(timed(partial(memcpy, nbytes)))
        if disk is not None:
            disks.append(timed(partial(disk, nbytes)))
        return (prepare(),), {}

    def one(argument: Any) -> None:
        took.append(timed(lambda: results.append(run(argument))))

    benchmark.pedantic(one, setup=setup, rounds=rounds, iterations=1)
    check(results.pop())
    benchmark.extra_info.update(figures(nbytes, took, copies, disks))


def figures(
    nbytes: int, took: list[Took], copies: list[Took], disks: list[Took]
) -> dict[str, float]:
    """Medians over rounds, and the best round's as `..._best`. Shares: 1 is as fast as the
    yardstick."""
    size = nbytes / GB
    made: dict[str, float] = {"bytes": nbytes}
    for end, middle in (("", statistics.median), ("_best", min)):
        wall, cpu = middle(t.wall for t in took), middle(t.cpu for t in took)
        copy = middle(t.wall for t in copies)
        made["gb_per_s" + end] = round(size / wall, 3)
        made["cpu_s_per_gb" + end] = round(cpu / size, 4)
        made["share_of_memcpy" + end] = round(copy / wall, 3)
        made["memcpy_gb_per_s" + end] = round(size / copy, 2)
        if disks:
            raw = middle(t.wall for t in disks)
            made["wall_vs_disk" + end] = round(wall / raw, 3)
            made["disk_gb_per_s" + end] = round(size / raw, 3)
            made["disk_cpu_s_per_gb" + end] = round(middle(t.cpu for t in disks) / size, 4)
    return made


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
