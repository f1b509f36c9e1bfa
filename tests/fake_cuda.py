"""Enough of CUDA, on a CPU, to see what a real device would refuse.

Devices have memory of their own, streams are queues that run when somebody waits for them, events
are places in a queue, the current device belongs to the thread, and host memory must be
page-locked before a kernel may touch it. What CUDA answers with an illegal address, or does on
another device than was meant, is an `Illegal` here.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tierloom.triton_kernels.blend.probe_cpu import probe_scores
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.memory.tables import FrameTable, PlaneTable

REFUSED, OUT_OF_MEMORY = 1, 2


class Illegal(RuntimeError):
    """What costs a process its device."""


class Event:
    """Of `record_event` of a stream, or made and then recorded."""

    def __init__(self, stream: Stream | None = None, *, blocking: bool = False) -> None:
        self.stream, self.done, self.blocking = stream, False, blocking

    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.work.append(self.reach)

    def reach(self) -> None:
        self.done = True

    def synchronize(self) -> None:
        """Sleeps where it was made to; others spin, which nothing of ours may."""
        if not self.blocking:
            raise Illegal("a thread spins")
        assert self.stream is not None
        if self.stream.cuda.error_of_device:
            raise RuntimeError("CUDA error: unspecified launch failure")
        self.stream.run_to(self)


class Stream:
    """Work in order, done as late as CUDA may do it: when somebody waits."""

    def __init__(self, cuda: Cuda, index: int) -> None:
        self.cuda, self.index = cuda, index
        self.work: deque[Callable[[], None]] = deque()
        self._runs: int | None = None
        """The thread that does its work now."""

    def record_event(self) -> Event:
        event = Event(self)
        self.work.append(event.reach)
        return event

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None
        self.work.append(partial(event.stream.run_to, event))

    def run_to(self, event: Event) -> None:
        self._run(lambda: not event.done)

    def synchronize(self) -> None:
        self._run(lambda: bool(self.work))

    def _run(self, wanted: Callable[[], bool]) -> None:
        """Do its work in order while that is `wanted`. One thread at a time does; others wait for
        what it does, and hold nothing: the work of one stream may be to wait for another."""
        me, changed = threading.get_ident(), self.cuda.changed
        while wanted():
            with changed:
                if self._runs not in (None, me):
                    changed.wait(0.05)
                    continue
                before, self._runs = self._runs, me
            try:
                if wanted():
                    self.work.popleft()()
            finally:
                with changed:
                    self._runs = before
                    changed.notify_all()


class Cuda:
    """Two devices. `install` puts it in the place of torch.cuda, the driver and the launch."""

    devices = 2

    def __init__(self) -> None:
        self._thread = threading.local()
        self.changed = threading.Condition()
        self.locked: dict[int, int] = {}
        self.contexts: set[int] = set()
        """Devices that were made current: each has then cost half a GiB."""
        self.error = 0
        """What cudaGetLastError would answer: the engine's next launch fails with it."""
        self.registered: list[int] = []
        """Bytes of each call that locked memory."""
        self.refuse: int | None = None
        """Which of those calls fails, counted from 0."""
        self.error_of_device = False
        """The device has failed: whatever waits for it raises."""
        self.streams: list[Stream] = []
        """Made by the driver; from 1 on they are known by their places here."""
        self.under_way: Callable[[], None] = lambda: None
        """Runs while a kernel runs."""
        self._default = [Stream(self, i) for i in range(self.devices)]
        self._memory: list[tuple[int, int, int, Any]] = []
        self._types = [self._type(i) for i in range(self.devices)]

    def install(self, patch: pytest.MonkeyPatch) -> Cuda:
        for name in ("current_device", "current_stream", "device", "stream", "cudart"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", self.shared_stream)
        patch.setattr(torch.cuda, "ExternalStream", self.external_stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr("tierloom.stages.memory.device_queue._queues", {})
        to = torch.Tensor.to
        patch.setattr(torch.Tensor, "to", lambda t, *a, **k: self._to(to, t, *a, **k))
        patch.setattr(torch.Tensor, "pin_memory", lambda t: t)
        patch.setattr("tierloom.triton_kernels.paged_copy.triton.launch_paged_copy", self.launch)
        patch.setattr("tierloom.triton_kernels.blend.triton.launch_scatter_turned", self.turn)
        probe = "tierloom.triton_kernels.blend.probe_triton.launch_probe_scores"
        patch.setattr(probe, self.probe)
        patch.setattr("tierloom.stages.memory.cuda_driver.cuda_driver", lambda _: self)
        patch.setattr("tierloom.stages.memory.page_lock.available", lambda: 1 << 40)
        return self

    # -- torch.cuda ------------------------------------------------------------------------------

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self._thread.device = self._index(device)
        self.contexts.add(self._thread.device)
        try:
            yield
        finally:
            self._thread.device = before

    def shared_stream(self, device: Any = None) -> Stream:
        raise Illegal("torch's 32 streams are the engine's as well")

    def external_stream(self, pointer: int, device: Any = None) -> Stream:
        stream = self.streams[pointer - 1]
        if stream.index != self._index(device):
            raise Illegal(f"a stream of device {stream.index} is taken for one of {device}")
        return stream

    def current_stream(self, device: Any = None) -> Stream:
        index = self._index(device)
        mine: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        return mine.get(index, self._default[index])

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Brings its device along, as torch's does, and on its way back makes the one before
        current in a way that costs a context there."""
        mine: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        before, device = mine.get(stream.index, self._default[stream.index]), self.current_device()
        mine[stream.index] = stream
        try:
            with self.device(stream.index):
                yield
        finally:
            mine[stream.index] = before
            self.contexts.add(device)

    def tensor(self, data: torch.Tensor, index: int) -> torch.Tensor:
        """`data` in the memory of a device."""
        made = data.clone().as_subclass(self._types[index])
        storage = made.untyped_storage()
        at = storage.data_ptr()
        self._memory.append((at, at + storage.nbytes(), index, made))  # never used again
        return made

    def _type(self, index: int) -> Any:
        where = torch.device("cuda", index)

        def cpu(t: torch.Tensor) -> torch.Tensor:
            return t.as_subclass(torch.Tensor).clone()

        members = {"device": property(lambda _: where), "cpu": cpu}
        return type(f"On{index}", (torch.Tensor,), members)

    def _to(self, real: Any, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        place = args[0] if args else kwargs.get("device")
        if isinstance(place, (str, torch.device)) and torch.device(place).type == "cuda":
            return self.tensor(t, self._index(place))
        return real(t, *args, **kwargs)  # type: ignore[no-any-return]

    def _index(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index if device is not None else None
        return self.current_device() if index is None else index

    # -- kernels ---------------------------------------------------------------------------------

    def turn(self, planes: Any, frames: Any, slots: torch.Tensor, turns: Any) -> None:
        """`launch_scatter_turned`, likewise."""
        self.launch(planes, frames, slots, gather=False, turns=turns)

    def probe(
        self, planes: Any, layer: int, slots: torch.Tensor, queries: torch.Tensor,
        positions: torch.Tensor, context: int, *, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """`launch_probe_scores`; the engine's stream has come so far when it reads."""
        here = torch.device("cuda", self.current_device())
        for name, t in (("planes", planes.table), ("slots", slots), ("queries", queries),
                        ("positions", positions)):  # fmt: skip
            if t.device != here:
                raise Illegal(f"{name} lie on {t.device}, the kernel runs on {here}")
        self.current_stream().synchronize()
        found = probe_scores(
            self._planes(planes, planes.table.cpu().numpy(), queries.shape[2]), layer,
            slots.cpu().numpy(), queries.cpu(), positions.cpu(), context, scale=scale,
        )  # fmt: skip
        return self.tensor(found, here.index)

    def launch(
        self, planes: Any, frames: Any, slots: torch.Tensor, *, gather: bool, turns: Any = None
    ) -> None:
        """`launch_paged_copy`, on the current stream of the current device."""
        here = self.current_device()
        given = [("planes", planes.table), ("frames", frames.table), ("slots", slots)]
        turned = None
        if turns is not None:
            given += [("turns", turns.at), ("cosines", turns.cos), ("sines", turns.sin)]
            at = turns.at.cpu().numpy()
            still = np.append(turns.cos.cpu().numpy(), np.ones((1, turns.cos.shape[1])), 0)
            sines = np.append(turns.sin.cpu().numpy(), np.zeros((1, turns.cos.shape[1])), 0)
            turned = TurnTable(
                np.arange(len(at), dtype=np.int32), np.arange(at.shape[1], dtype=np.int32),
                still[at].astype(np.float32), sines[at].astype(np.float32), turns.first,
                turns.interleaved, turns.kind,
            )  # fmt: skip
        for name, t in given:
            if t.device != torch.device("cuda", here):
                raise Illegal(f"{name} lie on {t.device}, the kernel runs on {here}")
        tables = [t.cpu().numpy() for t in (planes.table, frames.table, slots)]
        self.current_stream().work.append(
            partial(self._copy, planes, *tables, here, gather, turned and (turned, turns.dim))
        )

    def _copy(
        self, planes: Any, table: Any, frames: Any, slots: Any, here: int, gather: bool,
        turns: Any,
    ) -> None:  # fmt: skip
        from tierloom.triton_kernels.blend.cpu import scatter_turned_frames
        from tierloom.triton_kernels.paged_copy.cpu import gather_frames, scatter_frames

        turns, dim = turns or (None, planes.dim)
        cache = self._planes(planes, table, dim)
        address, first, last, rows, take, slot0 = (np.ascontiguousarray(c) for c in frames.T)
        nbytes = (last - first) * planes.kv * rows * cache.row_bytes
        for at in cache.base:
            if not any(lo <= at < hi and index == here for lo, hi, index, _ in self._memory):
                raise Illegal(f"{at:#x} is no memory of device {here}")
        for at, n in zip(address, nbytes, strict=True):
            if not any(lo <= at and at + n <= hi for lo, hi in self._runs()):
                raise Illegal(f"{at:#x} is not page-locked")
        layers = np.stack([first, last], 1).astype(np.int32)
        made = FrameTable(
            address, nbytes, layers, rows.astype(np.int32), take.astype(np.int32), slot0,
            np.zeros(len(address), np.uint64), np.zeros(len(address), np.uint8),
        )  # fmt: skip
        stop = np.zeros(1, np.uint8)  # which no kernel of a device looks at
        if gather:
            gather_frames(cache, made, slots, stop)
        elif turns is not None:
            scatter_turned_frames(cache, made, slots, stop, turns, verify=False)
        else:
            scatter_frames(cache, made, slots, stop, verify=False)
        self.under_way()

    def _planes(self, planes: Any, table: Any, dim: int) -> PlaneTable:
        """The host's table again, of heads of `dim` channels."""
        stride = table[:, 1:5].copy()
        if dim != planes.dim:  # heads side by side became one
            stride[:, 2] = dim * planes.itemsize
        return PlaneTable(
            table[:, 0].copy(), stride, planes.kv, planes.block_tokens,
            planes.heads * planes.dim // dim, dim, planes.itemsize,
        )  # fmt: skip

    def _runs(self) -> list[tuple[int, int]]:
        """Locked memory; what lies side by side is one."""
        runs: list[tuple[int, int]] = []
        for at, n in sorted(self.locked.items()):
            if runs and runs[-1][1] == at:
                runs[-1] = (runs[-1][0], at + n)
            else:
                runs.append((at, at + n))
        return runs

    # -- page-locking: the driver's calls, and the runtime's, which leave an error behind ---------

    def _lock(self, at: int, nbytes: int) -> int:
        self.registered.append(nbytes)
        if self.refuse == len(self.registered) - 1:
            return OUT_OF_MEMORY
        if any(at < lo + n and lo < at + nbytes for lo, n in self.locked.items()):
            return REFUSED
        self.locked[at] = nbytes
        return 0

    def cudart(self) -> Any:
        return self

    def cudaHostRegister(self, at: int, nbytes: int, flags: int) -> int:
        code = self._lock(at, nbytes)
        self.error = code or self.error
        return code

    def cudaHostUnregister(self, at: int) -> int:
        return 0 if self.locked.pop(at, None) else REFUSED

    def cuInit(self, flags: Any) -> int:
        return 0

    def cuDeviceGet(self, number: Any, index: Any) -> int:
        number._obj.value = index.value
        return 0 if index.value < self.devices else REFUSED

    def cuDevicePrimaryCtxRetain(self, context: Any, number: Any) -> int:
        self.contexts.add(number.value)
        context._obj.value = number.value + 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, number: Any) -> int:
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self._thread.__dict__.setdefault("pushed", []).append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self._thread.pushed.pop()
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        if not getattr(self._thread, "pushed", None) or flags.value != 1:
            return REFUSED
        self.streams.append(Stream(self, self._thread.pushed[-1] - 1))
        stream._obj.value = len(self.streams)
        return 0

    def cuMemHostRegister_v2(self, at: Any, nbytes: Any, flags: Any) -> int:
        if not getattr(self._thread, "pushed", None) or flags.value != 3:
            return REFUSED
        return self._lock(at.value, nbytes.value)

    def cuMemHostUnregister(self, at: Any) -> int:
        assert isinstance(at, ctypes.c_void_p)
        return 0 if self.locked.pop(at.value, None) else REFUSED
