"""Which object is evicted first when room is needed: six policies, exact by bytes, no I/O.

A policy sees keys and sizes only. For each new object the index calls `expect`, then `victim`
until there is room, then `add`. A victim is forgotten (perhaps remembered as a ghost) as it is
named. Pinned objects are not in a policy at all; those in use for the moment are passed over by
`skip`. Costs are constant per call, amortised, plus one step for each object passed over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal, get_args

Skip = Callable[[bytes], bool]


PolicyName = Literal["lru", "lfu", "fifo", "mru", "s3-fifo", "arc"]


class _Queue:
    """Keys and sizes from the coldest to the hottest, and the sum of the sizes."""

    __slots__ = ("nbytes", "sizes")

    def __init__(self) -> None:
        self.sizes: OrderedDict[bytes, int] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.sizes

    def push(self, key: bytes, nbytes: int) -> None:
        """Put a key that is not here at the hot end."""
        self.sizes[key] = nbytes
        self.nbytes += nbytes

    def pop(self, key: bytes) -> int:
        """Take a key out; its size, or 0 when it was not here."""
        nbytes = self.sizes.pop(key, 0)
        self.nbytes -= nbytes
        return nbytes

    def coldest(self, skip: Skip) -> bytes | None:
        return _first(self.sizes, skip)

    def shrink(self, nbytes: int) -> None:
        """Drop the coldest until at most `nbytes` are left."""
        while self.nbytes > nbytes and self.sizes:
            self.nbytes -= self.sizes.popitem(last=False)[1]


def _first(keys: Iterable[bytes], skip: Skip) -> bytes | None:
    return next((key for key in keys if not skip(key)), None)


class EvictionPolicy(ABC):
    """What every policy does. `capacity` is in bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def expect(self, key: bytes, nbytes: int) -> None:  # noqa: B027 (most policies do not mind)
        """A new object is about to come: its victims are asked for next."""

    @abstractmethod
    def add(self, key: bytes, nbytes: int) -> None:
        """A key that is not here came in."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """A key was wanted again. Unknown keys are passed over."""

    def order_for_eviction(self, key: bytes) -> None:  # noqa: B027 (a policy of uses alone does not mind)
        """A new key is evicted later than those ordered before it. Not a use."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """A key went for another reason than `victim`. Unknown keys are passed over."""

    @abstractmethod
    def victim(self, skip: Skip, incoming: bytes = b"") -> bytes | None:
        """The next key to go, already forgotten; None when all are skipped."""


class Fifo(EvictionPolicy):
    """First in, first out."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = _Queue()

    def add(self, key: bytes, nbytes: int) -> None:
        self._queue.push(key, nbytes)

    def touch(self, key: bytes) -> None:
        """A use changes nothing."""

    def order_for_eviction(self, key: bytes) -> None:
        if key in self._queue:
            self._queue.sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        self._queue.pop(key)

    def victim(self, skip: Skip, incoming: bytes = b"") -> bytes | None:
        key = self._choose(skip)
        if key is not None:
            self._queue.pop(key)
        return key

    def _choose(self, skip: Skip) -> bytes | None:
        return self._queue.coldest(skip)


class Lru(Fifo):
    """Least recently used."""

    def touch(self, key: bytes) -> None:
        self.order_for_eviction(key)


class Mru(Lru):
    """Most recently used: for endless scans, where the newest is needed last."""

    def touch(self, key: bytes) -> None:
        super().order_for_eviction(key)

    def order_for_eviction(self, key: bytes) -> None:
        """The newest goes first, whatever came beside it."""

    def _choose(self, skip: Skip) -> bytes | None:
        return _first(reversed(self._queue.sizes), skip)


class Lfu(EvictionPolicy):
    """Least frequently used; among equals the least recently used."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[bytes, int] = {}
        self._buckets: dict[int, OrderedDict[bytes, None]] = {}
        self._counts: list[int] = []  # the buckets' use counts, sorted: there are few

    def add(self, key: bytes, nbytes: int) -> None:
        self._insert(key, 1)

    def touch(self, key: bytes) -> None:
        if key in self._uses:
            self._insert(key, self._take(key) + 1)

    def remove(self, key: bytes) -> None:
        if key in self._uses:
            self._take(key)

    def victim(self, skip: Skip, incoming: bytes = b"") -> bytes | None:
        for uses in self._counts:
            key = _first(self._buckets[uses], skip)
            if key is not None:
                self._take(key)
                return key
        return None

    def _insert(self, key: bytes, uses: int) -> None:
        if uses not in self._buckets:
            self._buckets[uses] = OrderedDict()
            insort(self._counts, uses)
        self._buckets[uses][key] = None
        self._uses[key] = uses

    def _take(self, key: bytes) -> int:
        uses = self._uses.pop(key)
        bucket = self._buckets[uses]
        del bucket[key]
        if not bucket:
            del self._buckets[uses]
            del self._counts[bisect_left(self._counts, uses)]
        return uses


class S3Fifo(EvictionPolicy):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue filters what is wanted once only.

    The small queue takes a tenth of the bytes; what leaves it unwanted becomes a ghost (as many
    bytes of them as the capacity), and a ghost that comes again enters the main queue at once. One
    use is enough to be moved to the main queue, where up to three uses buy another round each.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small, self._main, self._ghosts = _Queue(), _Queue(), _Queue()
        self._uses: dict[bytes, int] = {}

    def add(self, key: bytes, nbytes: int) -> None:
        again = self._ghosts.pop(key)
        (self._main if again else self._small).push(key, nbytes)
        self._uses[key] = 0

    def touch(self, key: bytes) -> None:
        uses = self._uses.get(key)
        if uses is not None and uses < 3:
            self._uses[key] = uses + 1

    def order_for_eviction(self, key: bytes) -> None:
        if key in self._small:
            self._small.sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        if self._uses.pop(key, None) is not None:
            (self._small if key in self._small else self._main).pop(key)

    def victim(self, skip: Skip, incoming: bytes = b"") -> bytes | None:
        while True:
            small_first = self._small.nbytes > self.capacity // 10 or not self._main.sizes
            queues = (self._small, self._main) if small_first else (self._main, self._small)
            for queue in queues:
                key = queue.coldest(skip)
                if key is not None:
                    break
            else:
                return None
            nbytes = queue.pop(key)
            if not self._uses[key]:
                del self._uses[key]
                if queue is self._small:
                    self._ghosts.push(key, nbytes)
                    self._ghosts.shrink(self.capacity)
                return key
            self._uses[key] = 0 if queue is self._small else self._uses[key] - 1
            self._main.push(key, nbytes)


class Arc(EvictionPolicy):
    """ARC (Megiddo and Modha, FAST 2003): recency and frequency, balanced by their ghosts' hits.

    T1 holds what was wanted once, T2 what was wanted again; B1 and B2 are their ghosts. All lengths
    are in bytes, and the target of T1 moves by multiples of the incoming object's size.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._t1, self._t2, self._b1, self._b2 = _Queue(), _Queue(), _Queue(), _Queue()
        self._target = 0.0  # of T1

    def expect(self, key: bytes, nbytes: int) -> None:
        b1, b2 = self._b1.nbytes, self._b2.nbytes
        if key in self._b1:
            self._target = min(float(self.capacity), self._target + nbytes * max(1.0, b2 / b1))
        elif key in self._b2:
            self._target = max(0.0, self._target - nbytes * max(1.0, b1 / b2))

    def add(self, key: bytes, nbytes: int) -> None:
        again = self._b1.pop(key) or self._b2.pop(key)
        (self._t2 if again else self._t1).push(key, nbytes)
        self._b1.shrink(max(0, self.capacity - self._t1.nbytes))
        held = self._t1.nbytes + self._t2.nbytes + self._b1.nbytes
        self._b2.shrink(max(0, 2 * self.capacity - held))

    def touch(self, key: bytes) -> None:
        if key in self._t2:
            self._t2.sizes.move_to_end(key)
        elif key in self._t1:
            self._t2.push(key, self._t1.pop(key))

    def order_for_eviction(self, key: bytes) -> None:
        if key in self._t1:
            self._t1.sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        (self._t1 if key in self._t1 else self._t2).pop(key)

    def victim(self, skip: Skip, incoming: bytes = b"") -> bytes | None:
        size = self._t1.nbytes
        from_t1 = size > self._target or (incoming in self._b2 and size >= self._target)
        pairs = [(self._t1, self._b1), (self._t2, self._b2)]
        for queue, ghosts in pairs if from_t1 else reversed(pairs):
            key = queue.coldest(skip)
            if key is not None:
                ghosts.push(key, queue.pop(key))
                return key
        return None


POLICIES: dict[PolicyName, type[EvictionPolicy]] = {
    "lru": Lru, "lfu": Lfu, "fifo": Fifo, "mru": Mru, "s3-fifo": S3Fifo, "arc": Arc,
}  # fmt: skip
assert set(POLICIES) == set(get_args(PolicyName))
