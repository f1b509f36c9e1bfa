"""What a router hears of pages that lie below SGLang's host memory, by SGLang's own decoder."""

from __future__ import annotations

import socket
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq
from backend import BASE, PER_CHUNK, backend, on_disk, prompt
from sglang.srt.disaggregation.kv_events import (
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)
from sglang.srt.mem_cache.utils import hash_str_to_int64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pools = Callable[..., tuple[Any, Any]]

decode = msgspec.msgpack.Decoder(KVEventBatch).decode


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Router:
    """Subscribed before anything is published, and able to ask for what was."""

    def __init__(self) -> None:
        self.port, self.replay = free_port(), free_port()
        self.context = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.SUBSCRIBE, b"kv")
        self.sub.bind(f"tcp://127.0.0.1:{self.port}")
        self.got: list[tuple[bytes, bytes]] = []
        self.held: Counter[tuple[int, str]] = Counter()

    @property
    def options(self) -> dict[str, Any]:
        """Of a publisher that connects to it."""
        return {
            "serve.tiers": ["hot", "warm"], "serve.events": f"tcp://127.0.0.1:{self.port}",
            "serve.events_replay": f"tcp://127.0.0.1:{self.replay}", "serve.events_topic": "kv",
        }  # fmt: skip

    def take(self, number: bytes, told: bytes) -> None:
        if int.from_bytes(number, "big") < len(self.got):
            return  # it was asked for already
        self.got.append((number, told))
        for event in decode(told).events:
            for page in event.block_hashes:
                self.held[page, event.medium] += 1 if isinstance(event, BlockStored) else -1
            assert isinstance(event, BlockRemoved) or event.token_ids == []
        assert set(self.held.values()) <= {0, 1}, "told twice, or taken away before it came"

    def until(self, right: set[tuple[int, str]]) -> None:
        """What it has heard comes to this."""
        end = time.monotonic() + 20
        while self.now != right and time.monotonic() < end:
            missed = True
            if self.sub.poll(1000):
                _, number, told = self.sub.recv_multipart()
                missed = int.from_bytes(number, "big") > len(self.got)
                if not missed:
                    self.take(number, told)
            for number, told in self.ask(len(self.got)) if missed else ():
                self.take(number, told)
        assert self.now == right

    @property
    def now(self) -> set[tuple[int, str]]:
        return {each for each, there in self.held.items() if there}

    def ask(self, first: int) -> list[tuple[bytes, bytes]]:
        """Messages from a number on, as vLLM's and SGLang's publishers are asked."""
        got: list[tuple[bytes, bytes]] = []
        with self.context.socket(zmq.DEALER) as asker:
            asker.connect(f"tcp://127.0.0.1:{self.replay}")
            asker.send_multipart([b"", first.to_bytes(8, "big")])
            while asker.poll(10_000):
                _, _, number, told = asker.recv_multipart()
                if number == ZmqEventPublisher.END_SEQ:
                    return got
                got.append((number, told))
        raise AssertionError("it has no end")


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router()
    yield made
    made.context.destroy(linger=0)


def named(keys: list[str], *media: str) -> set[tuple[int, str]]:
    return {(hash_str_to_int64(key), medium) for key in keys for medium in media}


def test_what_comes_and_goes(host_pool: Pools, router: Router, tmp_path: Path) -> None:
    """In memory and on the disk, and after a restart, on the disk."""
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host, on_disk(tmp_path, **router.options)), prompt(host, 22)
    text.save(storage)
    everything = named(text.keys, "CPU_PINNED", "DISK")
    router.until(everything)
    assert router.ask(0) == router.got
    assert router.ask(2) == router.got[2:]
    storage.close()
    router.got, router.held = [], Counter()
    storage = backend(host, on_disk(tmp_path, **router.options))
    router.until(named(text.keys, "DISK"))
    assert text.loaded(storage) == 22
    router.until(everything)
    storage.clear()
    router.until(set())
    storage.close()


def test_what_is_pushed_out(host_pool: Pools, router: Router, tmp_path: Path) -> None:
    host, _ = host_pool("mha", "layer_first", slots=1024)
    small = on_disk(tmp_path, **router.options) | {"tiers.hot.capacity": "256 KiB"}
    storage = backend(host, small)
    texts = [prompt(host, 16, seed=n) for n in range(1, 12)]
    for text in texts:
        text.save(storage)
    tiers = storage._store.pipeline.tiers

    def right() -> set[tuple[int, str]]:
        found: set[tuple[int, str]] = set()
        for text in texts:
            for i, key in enumerate(text.keys):
                links = bytes.fromhex("".join(text.keys[i - i % PER_CHUNK : i + 1]))
                for tier, medium in (("hot", "CPU_PINNED"), ("warm", "DISK")):
                    known = tiers[tier].find(links)
                    if known is not None and known.grains == i % PER_CHUNK + 1:
                        found |= named([key], medium)
        return found

    time.sleep(0.5)
    there = right()
    assert named([k for t in texts for k in t.keys], "DISK") < there
    assert len(there) < 2 * 16 * 11
    router.until(there)
    storage.close()


def test_that_nobody_listens_harms_nobody(host_pool: Pools, tmp_path: Path) -> None:
    """Nor that the port is another's."""
    host, _ = host_pool("mha", "layer_first", slots=256)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        more = {"serve.tiers": ["hot"], "serve.events_replay": f"tcp://127.0.0.1:{port}"}
        storage = backend(host, BASE | more | {"serve.events": f"tcp://127.0.0.1:{free_port()}"})
        text = prompt(host, 8)
        assert text.save(storage) == [True] * 8
        assert text.loaded(storage) == 8
        storage.close()
