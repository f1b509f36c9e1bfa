"""What callers wait for: layers that have passed, memory that nobody uses any more, and copies that
a device will make."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from tierloom.stages.memory.device_queue import Mark


class InUseCounter:
    """Counts who is inside: several copies may be, and a caller can wait for the last to leave."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0

    def __enter__(self) -> None:
        with self._changed:
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Of who entered, perhaps in another thread."""
        with self._changed:
            self._inside -= 1
            if not self._inside:
                self._changed.notify_all()

    @property
    def empty(self) -> bool:
        return not self._inside

    def wait_until_empty(self) -> None:
        with self._changed:
            while self._inside:
                self._changed.wait()


class Launches:
    """A request's copies on a device, from where they are launched: the engine's own work can be
    made to wait for them there, while its thread goes on. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = -1
        """Batches, by layer group, that have yet to be launched; -1: not planned yet."""
        self.beginning = InUseCounter()
        """Entered by whoever launches; inside, `stop` must be looked at."""
        self._marks: list[Mark] = []

    def expect(self, batches: int) -> None:
        """So many will be launched, or given up."""
        with self._changed:
            self._left = batches
            self._changed.notify_all()

    def begun(self, batches: int) -> None:
        with self._changed:
            self._left -= batches
            self._changed.notify_all()

    def add(self, mark: Mark) -> None:
        """One was launched."""
        self._marks.append(mark)

    def wait(self, timeout: float) -> bool:
        """Whether all had begun within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left, timeout)

    def hold_back(self, device: str) -> None:
        """What is launched on the current stream of `device` from now on waits for them."""
        for mark in list(self._marks):
            mark.hold_back(device)


class LayerGates:
    """A gate for each layer group, which opens once every batch of the request has passed it.

    The loop opens gates; any thread waits for them.
    """

    def __init__(self, groups: int) -> None:
        self._changed = threading.Condition()
        self._is_open = [False] * groups
        self._batches_left = [0] * groups

    def expect(self, batches: int) -> None:
        """Every gate opens after `batches` have passed it; at once if there are none."""
        self._batches_left = [batches] * len(self._is_open)
        if not batches:
            self.open()

    def passed(self, groups: Iterable[int]) -> None:
        """One batch has passed the gates of these layer groups."""
        opened = False
        for group in groups:
            self._batches_left[group] -= 1
            if not self._batches_left[group]:
                self._is_open[group] = opened = True
        if opened:
            self._tell()

    def open(self) -> None:
        if not self.all_open:
            self._is_open = [True] * len(self._is_open)
            self._tell()

    @property
    def all_open(self) -> bool:
        return all(self._is_open)

    def wait(self, group: int, timeout: float) -> bool:
        """Whether the gate opened within `timeout` seconds."""
        return self._wait_for(lambda: self._is_open[group], timeout)

    def wait_all(self, timeout: float) -> bool:
        """Whether all gates opened within `timeout` seconds."""
        return self._wait_for(lambda: self.all_open, timeout)

    def _wait_for(self, opened: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(opened, timeout)

    def _tell(self) -> None:
        """After the change: who waits has looked before it, and is woken, or will see it."""
        with self._changed:
            self._changed.notify_all()
