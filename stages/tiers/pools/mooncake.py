"""mooncake: a pool of memory that many hosts lend, kept together by a Mooncake master.

    cold: {use: mooncake, url: "mooncakestore://10.0.0.1:50051/"}

Bytes go from and into the arena, which is registered with the client once. The client outlives a
master that restarts by itself. What blocks runs in the pool's threads, and ends by `deadline` (it
takes the client 4 s to see that a master is gone): one that never ended would never release a
lease.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tierloom.stages.errors import Lost, MissingPackage, TierDown
from tierloom.stages.kv.object import LINK
from tierloom.stages.memory.arena import Lease
from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.pools.manifest import Piece
from tierloom.stages.tiers.pools.tier import Pooled

_NO_ROOM, _TRANSFER, _ABSENT, _TOO_SMALL, _RPC = -200, -800, -704, -600, -900
_PIECE = 4 << 20  # twice as fast as 32 MiB, and as fast as 1 MiB
_KNOCK = 0.5  # seconds to wait for the master's port
_SMALL = 1 << 20  # what is longer is neither a manifest nor a header
_SURE = 30.0
"""The client gives a transfer up after 60 s and does not wait for it: one that failed later than
this may still be under way. Sooner, it has seen the end of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MooncakeOptions:
    """Options of a Mooncake pool."""

    url: str
    """The master, as in `mooncakestore://host:port/`."""
    metadata: str = "P2PHANDSHAKE"
    """Where peers find each other: `P2PHANDSHAKE`, or a server as in `http://host:port/metadata`."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Transport of payloads."""
    device: str = ""
    """RDMA devices, separated by commas; empty: all."""
    host: str = ""
    """Our address for other peers; empty: that of the interface to the master."""
    segment: Size = 0
    """Memory that this process lends to the pool; its objects are lost when the process ends."""
    buffer: Size = 16 << 20
    """Memory of the client's own buffer."""
    replicas: int = 1
    """Copies of each object, in segments of different processes if there are enough."""
    pin: Literal["none", "soft", "hard"] = "none"
    """`soft`: evicted only when nothing else is left; `hard`: never evicted."""
    pin_ttl: Seconds = 0.0
    """How long a soft pin holds after the last use; 0: the master's default."""
    deadline: Seconds = 2.0
    """Time without an answer after which the client cancels a transfer or a call."""
    threads: int = 2
    """Most concurrent calls of the client; that many threads are blocked while it hangs."""

    def __post_init__(self) -> None:
        Address.parse(self.url, "mooncakestore")
        if self.replicas < 1 or self.threads < 1 or self.deadline <= 0:
            raise ValueError("replicas, threads and deadline must be positive")
        if self.pin_ttl and self.pin != "soft":
            raise ValueError(f"pin_ttl is for pin: soft, not for pin: {self.pin}")


class Mooncake(Pooled):
    """One client per tier. Its calls are counted, so that none runs when it is closed."""

    Options = MooncakeOptions
    memory_options = ("segment", "buffer")

    def __init__(self, options: MooncakeOptions, ctx: TierContext) -> None:
        super().__init__(ctx, threads=options.threads, piece=_PIECE)
        self.options = options
        self._master = Address.parse(options.url, "mooncakestore")
        self._base = f"tierloom/{ctx.namespace.hex()[:32] or 'any'}/"
        self._using = threading.Lock()
        self._connecting = threading.Lock()
        self._client: Any = None
        self._users = 0
        self._closed = False
        self._lame = False  # the master did not answer the last time
        self._doubtful = False  # a transfer failed that may still be under way
        self._held: list[Lease] = []  # ... into or out of these

    async def open(self) -> None:
        try:
            await self._calls(_import, self.options.deadline, leases=())
        except ImportError as error:
            libraries = "libibverbs1 librdmacm1 libnuma1 libcurl4 libjsoncpp25"
            raise MissingPackage(
                f"mooncake's client ({error})", "mooncake", f", and apt-get install {libraries}"
            ) from error
        await self._calls(self._connect, leases=())

    async def close(self) -> None:
        with self._using:
            self._closed = True
        if await self._calls.idle(2 * self.options.deadline):
            await self.ctx.pool(self._disconnect, leases=())  # else a thread is in it: it must stay

    # What follows runs in the pool's threads.

    def _exists(self, names: Sequence[str]) -> list[bool]:
        with self._in_use() as client:
            codes = client.batch_is_exist(self._full(names))
            self._check(codes)
            return [code == 1 for code in codes]

    def _peek(self, names: Sequence[str]) -> list[bytes | None]:
        for _ in range(2):
            with self._in_use() as client:
                found = client.batch_get_buffer(self._full(names))
                values = [_value(handle) for handle in found]
            missing = [name for name, value in zip(names, values, strict=True) if value is None]
            # Missing because the master is down (that raises), because the owner of the memory is,
            # or only because it was put since? That a second look tells.
            if not missing or not any(self._exists(missing)) or len(missing) < len(names):
                return values
        raise TierDown("mooncake: the process that owns the memory does not answer")

    def _fetch(self, pieces: Sequence[Piece]) -> list[Lost | None]:
        if not pieces:
            return []
        names, addresses, sizes = zip(*pieces, strict=True)
        begun = time.monotonic()
        with self._in_use() as client:
            codes = client.batch_get_into(self._full(names), list(addresses), list(sizes))
            self._doubt(codes, begun)
            self._check(codes)
        found: list[Lost | None] = []
        for code, size in zip(codes, sizes, strict=True):
            if code == _TRANSFER:
                found.append(Lost.TIER_DOWN)
            elif code == _ABSENT:
                found.append(Lost.ABSENT)
            elif code >= 0 or code == _TOO_SMALL:
                found.append(None if code == size else Lost.CORRUPT)
            else:
                found.append(Lost.LATE)  # its lease ran out under way, or a writer is not through
        return found

    def _store(self, pieces: Sequence[Piece]) -> list[Lost | None]:
        names, addresses, sizes = zip(*pieces, strict=True)
        begun = time.monotonic()
        with self._in_use() as client:
            codes = client.batch_put_from(
                self._full(names), list(addresses), list(sizes), self._how()
            )
            self._doubt(codes, begun)
            return self._outcome(codes)

    def _commit(self, manifests: dict[str, bytes]) -> list[Lost | None]:
        with self._in_use() as client:
            names = self._full(list(manifests))
            return self._outcome(
                [
                    client.put(n, v, self._how())
                    for n, v in zip(names, manifests.values(), strict=True)
                ]
            )

    def _remove(self, names: Sequence[str]) -> list[bool]:
        with self._in_use() as client:
            codes = client.batch_remove(self._full(names), True)
            self._check(codes)
            return [code == 0 for code in codes]

    def _wipe(self) -> int:
        with self._in_use() as client:
            gone = int(client.remove_by_regex(f"^{self._base}[0-9a-f]{{{2 * LINK}}}$", True))
            self._check([gone, client.remove_by_regex(f"^{self._base}", True)])
            return gone

    def _uncertain(self, leases: Sequence[Lease]) -> None:
        with self._using:
            if self._doubtful:
                self._held += [lease.retain() for lease in leases]

    @contextmanager
    def _in_use(self) -> Iterator[Any]:
        """The client, which is not closed meanwhile. Raises TierDown, OSError."""
        client = self._enter()
        try:
            yield client
        finally:
            self._leave()

    def _enter(self) -> Any:
        if not self._doubtful:
            self._connect()
        with self._using:
            if self._client is None or self._doubtful or self._closed:
                raise TierDown("mooncake: the client is closed")
            self._users += 1
            return self._client

    def _leave(self) -> None:
        with self._using:
            self._users -= 1
            renew = self._doubtful and not self._users
        if renew:  # takes a second, for which nobody should wait
            threading.Thread(target=self._disconnect, daemon=True).start()

    def _connect(self) -> None:
        """See to it that there is a client. Raises TierDown or OSError where there can be none."""
        with self._connecting:
            if self._client is not None and not self._lame:
                return
            with socket.create_connection(self._master[:2], _KNOCK) as line:
                ours = self.options.host or line.getsockname()[0]
            self._lame = False  # its port answers; the client does the rest
            if self._client is None and not (self._doubtful or self._closed):
                self._client = self._made(ours)

    def _made(self, host: str) -> Any:
        from mooncake.store import MooncakeDistributedStore

        o, arena = self.options, self.ctx.arena
        os.environ.setdefault("MC_TCP_BIND_ADDRESS", host)  # else it listens on every address
        client = MooncakeDistributedStore()
        if client.setup(
            host, o.metadata, o.segment, o.buffer, o.protocol, o.device, str(self._master)
        ):
            raise TierDown(f"mooncake: the client cannot connect to {o.url}; its own log says why")
        if client.register_buffer(arena.address, arena.total):
            client.close()
            raise TierDown(f"mooncake: {arena.total} bytes of arena could not be registered")
        return client

    def _disconnect(self) -> None:
        """Close the client, which waits for its threads: then nothing is at `_held`."""
        with self._connecting:
            client, self._client = self._client, None
            if client is not None:
                client.close()
            with self._using:
                self._doubtful = False
                held, self._held = self._held, []
        for lease in held:
            lease.release()

    def _full(self, names: Sequence[str]) -> list[str]:
        return [self._base + name for name in names]

    def _how(self) -> Any:
        from mooncake.store import ReplicateConfig, SoftPinAction

        how = ReplicateConfig()
        how.replica_num = self.options.replicas
        how.with_hard_pin = self.options.pin == "hard"
        if self.options.pin == "soft":
            how.soft_pin_action = SoftPinAction.ENABLE
            if self.options.pin_ttl:
                how.soft_pin_ttl_ms = int(1000 * self.options.pin_ttl)
        return how

    def _doubt(self, codes: Sequence[int], begun: float) -> None:
        """Note whether one that failed may still be under way."""
        if _TRANSFER in codes and time.monotonic() - begun >= _SURE:
            self._doubtful = True

    def _check(self, codes: Sequence[int]) -> None:
        """Raise TierDown when the master did not answer. It is asked for its port first, then."""
        if min(codes, default=0) <= _RPC:
            self._lame = True
            raise TierDown(f"mooncake: no answer from the master at {self.options.url}")

    def _outcome(self, codes: Sequence[int]) -> list[Lost | None]:
        self._check(codes)
        if codes and set(codes) == {_TRANSFER}:
            raise TierDown("mooncake: the process that owns the memory does not answer")
        return [
            None if c == 0 else Lost.NO_ROOM if c == _NO_ROOM else Lost.TIER_DOWN for c in codes
        ]


def _import(deadline: float) -> None:
    """Load the client, which reads its limits out of the environment; variables that are set
    keep their values. Raises ImportError."""
    seconds, millis = str(max(1, round(deadline))), str(max(1, round(1000 * deadline)))
    limits = {
        "MC_RPC_TIMEOUT_MS": millis,
        "MC_RPC_CONNECT_TIMEOUT_MS": millis,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
        "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
        "MC_TRANSFER_TIMEOUT": seconds,
        "MC_LOG_LEVEL": "ERROR",
    }
    for name, value in limits.items():
        os.environ.setdefault(name, value)
    import mooncake.store  # noqa: F401


def _value(handle: Any) -> bytes | None:
    """A copy of what the client lends; empty where it is too long to be of use."""
    if handle is None:
        return None
    return bytes(memoryview(handle)) if handle.size() <= _SMALL else b""
