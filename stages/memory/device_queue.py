"""DeviceQueue: work of ours on a CUDA device, in order, on a stream that nobody else has.

torch hands out 32 streams in turn, and the engine's own for its answers is one of them: work of
ours on that one would keep them waiting. So these streams are the driver's. Nobody spins: the
thread of a queue sleeps until the device has come so far, and no other thread waits for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from tierloom.stages.memory.cuda_driver import cuda_context, driver_call

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: it does not wait for the default stream, nor that for it."""
Done = Callable[[BaseException | None], None]
_queues: dict[tuple[str, str], DeviceQueue] = {}
_making = threading.Lock()


class Mark:
    """A point in a queue's work, passed when all that was launched before it is done."""

    __slots__ = ("_event", "_kept", "_queue")

    def __init__(self, queue: DeviceQueue, event: Any, kept: Any) -> None:
        """`kept`: what the work needs until then."""
        self._queue, self._event, self._kept = queue, event, kept

    def wait(self) -> None:
        """Until it is passed. Raises RuntimeError where the device has failed."""
        self._event.synchronize()

    async def passed(self) -> None:
        """As `wait`, for a task of asyncio's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(error: BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(_end, future, error)

        self._queue.when_passed(self, done)
        await future

    def hold_back(self, device: str) -> None:
        """What is launched on the current stream of `device` from now on waits until then; the
        caller does not."""
        import torch

        torch.cuda.current_stream(device).wait_event(self._event)


class DeviceQueue:
    """One stream and its thread, as long as the process lives. Thread-safe."""

    def __init__(self, device: str, name: str) -> None:
        """Raises LayoutError where the driver refuses."""
        import torch

        self._device = device
        self._stream = torch.cuda.ExternalStream(_new_stream(device), device=device)
        self._waiting: SimpleQueue[tuple[Mark, Done]] = SimpleQueue()
        thread = threading.Thread(target=self._wait, name=f"tierloom-{name}-{device}", daemon=True)
        thread.start()

    def launch(self, after: Any, work: Callable[[], Any]) -> Mark:
        """Launch what `work` does, behind the event `after`; what it returns is kept alive until
        that is done. Any thread, whatever device is current there. Raises what `work` raises, and
        nothing of it is under way then."""
        import torch

        # To enter the stream alone would do, but leaving it would make a context on the device that
        # was current before: half a GiB of another worker's.
        with torch.cuda.device(self._device):
            try:
                if after is not None:
                    self._stream.wait_event(after)
                with torch.cuda.stream(self._stream):
                    kept = work()
                event = torch.cuda.Event(blocking=True)
                event.record(self._stream)
            except BaseException:
                self._stream.synchronize()
                raise
        return Mark(self, event, kept)

    def when_passed(self, mark: Mark, call: Done) -> None:
        """Have the queue's thread call `call` then, with what went wrong."""
        self._waiting.put((mark, call))

    def _wait(self) -> None:
        """In order, as the stream works. The device is each event's own."""
        while True:
            mark, call = self._waiting.get()
            try:
                mark.wait()
            except BaseException as error:
                call(error)
            else:
                call(None)


def queue_of(device: str, name: str) -> DeviceQueue:
    """The queue of this name on a device, made when it is first asked for. Raises LayoutError."""
    with _making:
        if (device, name) not in _queues:
            _queues[device, name] = DeviceQueue(device, name)
        return _queues[device, name]


def _new_stream(device: str) -> int:
    stream = ctypes.c_void_p()
    with cuda_context(device, what := "making a stream") as driver:
        flags = ctypes.c_uint(_NON_BLOCKING)
        driver_call(driver, what, "cuStreamCreate", ctypes.byref(stream), flags)
    return int(stream.value or 0)


def _end(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
