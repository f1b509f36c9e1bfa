"""serve: what a pipeline gives to other engines out of its own tiers, and what that costs it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from conftest import Engine, config, settle, tokens, with_disk
from trips import get, until

import tierloom
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.pipeline.serve import terms
from tierloom.pipeline.serve.terms import RateLimit
from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.options import parse_rate
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Open

IDS = tokens(192)


def serving(**options: Any) -> dict[str, Any]:
    return config(serve={"tiers": ["hot"]} | options)


def reader(pipe: Any, **options: Any) -> dict[str, Any]:
    """Another engine's pipeline, whose only tier is what `pipe` serves."""
    made = config(tiers__cold={"use": "server", "url": pipe.serves_at} | options)
    del made["tiers"]["hot"]
    made["graphs"]["store"]["stages"]["hot"] = {"use": "put", "tier": "cold", "when_full": "block"}
    return made


def stored(pipe: Any, engine: Engine, at: np.ndarray) -> list[bytes]:
    """Keys of what the pipeline keeps of IDS, each of which went to every tier."""
    receipt = pipe.store(IDS, engine.caches, at).wait()
    assert receipt.lost == {}
    settle(pipe)
    kept: list[bytes] = [e.key for e in pipe.tiers["hot"].tier._index]
    return kept


class Client:
    """Bare words of the protocol, in the pipeline's own namespace."""

    def __init__(self, pipe: Any, *, space: bytes = b"") -> None:
        host, port = pipe.serves_at.removeprefix("tierloom://").split(":")
        self.sock = socket.create_connection((host, int(port)), 10)
        greeting = wire.unpack(wire.Greeting, self.message().body)
        space, nonce = space or pipe.names.digest, bytes(wire.NONCE)
        proof = wire.proof(b"", b"client", greeting.epoch, greeting.nonce, nonce, space)
        self.ask(Kind.HELLO, wire.pack(wire.Hello(wire.VERSION, 0, space, nonce, proof)))
        self.welcome = self.message()

    def ask(self, kind: Kind, body: bytes = b"") -> None:
        self.sock.sendall(wire.message(kind, 1, body))

    def answer(self, kind: Kind, body: bytes = b"") -> wire.Message:
        self.ask(kind, body)
        return self.message()

    def message(self) -> wire.Message:
        kind, number, length = wire.head(self._exactly(wire.HEAD.size))
        return wire.Message(kind, number, self._exactly(length))

    def _exactly(self, nbytes: int) -> bytes:
        got = b""
        while len(got) < nbytes:
            piece = self.sock.recv(nbytes - len(got))
            assert piece, "hung up"
            got += piece
        return got

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@pytest.mark.parametrize("where", ["memory", "disk", "both"])
def test_what_is_kept_is_read_by_another(opened: Open, tmp_path: Path, where: str) -> None:
    engine = Engine()
    at = engine.slots(192)
    tiers = {"memory": ["hot"], "disk": ["warm"], "both": ["hot", "warm"]}[where]
    pipe = opened(with_disk(tmp_path, serve={"tiers": tiers}), engine)
    stored(pipe, engine, at)
    if where == "both":  # the disk alone has it now
        pipe._portal.call(pipe.tiers["hot"].clear)
    other = opened(reader(pipe), engine)
    for _ in range(2):
        got = get(other, engine, at)
        assert (got.tokens, got.tiers, got.lost) == (192, {"cold": 3}, {})
    assert pipe.stats()["serve"]["given"] == 6
    until(lambda: pipe.stats()["serve"]["held"] == 0)
    settle(pipe)
    stranger = opened(reader(pipe), engine, model="another")
    assert get(stranger, engine, at).tokens == 0


def test_nothing_is_put_or_deleted_by_others(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    pipe = opened(serving(), engine)
    keys = stored(pipe, engine, at)
    other = opened(reader(pipe), engine)
    fresh = tokens(64, seed=5)
    late = other.store(fresh, engine.caches, at[:64]).wait()
    assert (late.tiers, set(late.lost)) == ({}, {Lost.NO_ROOM})
    assert other.clear() == 0
    with Client(pipe) as client:
        gone = wire.unpack(wire.Holdings, client.answer(Kind.DROP, b"".join(keys)).body)
        assert (gone.done, gone.objects) == (0, 3)
        offer = wire.pack(wire.Offer(bytes(32), 1 << 14))
        assert client.answer(Kind.PUT, offer)[::2] == (Kind.GRANT, bytes([Lost.NO_ROOM]))
        assert client.message().kind is Kind.KEPT
        client.ask(Kind.SETTLE, b"".join(keys))
        assert client.answer(Kind.HAS, b"".join(keys)).body == bytes(3)
        assert client.answer(Kind.BORROW, keys[0]).kind is Kind.ERROR
    assert get(pipe, engine, at).tokens == 192


def test_a_namespace_of_its_own_alone(opened: Open) -> None:
    engine = Engine()
    pipe = opened(serving(), engine)
    keys = stored(pipe, engine, engine.slots(192))
    with Client(pipe, space=b"o" * 32) as client:
        assert set(client.answer(Kind.HAS, b"".join(keys)).body) == {Lost.ABSENT}
        said = client.answer(Kind.GET, wire.pack(wire.Wanted(keys[0], 0, 99, 0)))
        assert wire.unpack(wire.Item, said.body).code == Lost.ABSENT


def test_disks_are_read_into_memory_that_nobody_was_promised(opened: Open, tmp_path: Path) -> None:
    engine = Engine()
    at = engine.slots(192)
    pipe = opened(with_disk(tmp_path, serve={"tiers": ["warm"]}), engine)
    keys = stored(pipe, engine, at)
    wanted = wire.pack(*(wire.Wanted(key, 0, 99, 0) for key in keys))
    with Client(pipe) as client:
        pipe._portal.call(pipe.arena.promises.reserve, pipe.arena.working)
        client.ask(Kind.GET, wanted)
        codes = [wire.unpack(wire.Item, client.message().body).code for _ in keys]
        assert codes == [Lost.NO_ROOM] * 3
        pipe._portal.post(pipe.arena.promises.unreserve, pipe.arena.working)
    until(lambda: pipe.arena.promises.spare == pipe.arena.working)
    assert get(opened(reader(pipe), engine), engine, at).tokens == 192


def test_one_who_does_not_read_holds_little_and_not_for_ever(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierloom.pipeline.serve.listener._STALL", 0.3)
    engine = Engine(heads=8, dim=64, layers=24)
    at = engine.slots(192)
    pipe = opened(serving(), engine)
    keys = stored(pipe, engine, at)
    clients = [Client(pipe) for _ in range(4)]
    for client in clients:
        client.ask(Kind.GET, wire.pack(*(wire.Wanted(k, 0, 99, 0) for k in keys * 80)))
    most = 0
    for _ in range(30):
        most = max(most, pipe.stats()["serve"]["held"])
        time.sleep(0.01)
    quarter = (pipe.arena.total - pipe.arena.working) // 4
    assert 0 < most <= quarter
    until(lambda: pipe.stats()["serve"]["held"] == 0)
    for client in clients:
        client.sock.close()
    assert get(pipe, engine, at).tokens == 192


def test_a_client_that_goes_while_a_disk_is_read(opened: Open, tmp_path: Path) -> None:
    engine = Engine()
    pipe = opened(with_disk(tmp_path, serve={"tiers": ["warm"]}), engine)
    keys = stored(pipe, engine, engine.slots(192))
    for _ in range(20):
        client = Client(pipe)
        client.ask(Kind.GET, wire.pack(*(wire.Wanted(k, 0, 99, 0) for k in keys)))
        client.sock.close()
    until(lambda: pipe.stats()["serve"]["clients"] == 0)
    settle(pipe)


def test_a_port_that_is_taken_is_a_message(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    at = engine.slots(192)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        pipe = opened(serving(listen=f"127.0.0.1:{taken.getsockname()[1]}"), engine)
    assert "in use" in caplog.text
    assert pipe.serves_at == ""
    stored(pipe, engine, at)
    assert get(pipe, engine, at).tokens == 192


@pytest.mark.parametrize(
    ("advertise", "why"), [("127.0.0.1:1", "refused"), ("127.0.0.1:{}", "somebody else")]
)
def test_an_address_that_does_not_lead_here_is_a_message(
    opened: Open, caplog: pytest.LogCaptureFixture, advertise: str, why: str
) -> None:
    engine = Engine()
    first = opened(serving(), engine)
    port = first.serves_at.rpartition(":")[2]
    pipe = opened(serving(advertise=advertise.format(port)), engine)
    assert pipe.serves_at == f"tierloom://{advertise.format(port)}"
    until(lambda: "set serve.advertise" in caplog.text)
    assert why in caplog.text
    assert sum(r.levelno >= logging.WARNING for r in caplog.records) == 1, "the first has none"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"], ids=["IPv4", "IPv6"])
def test_other_hosts_are_let_in_with_a_token(
    opened: Open, tmp_path: Path, listen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    monkeypatch.delenv("TIERLOOM_TOKEN", raising=False)
    before = threading.active_count()
    with pytest.raises(ConfigError, match="name a token_file"):
        opened(serving(listen=listen), engine)
    with pytest.raises(ConfigError, match="token file"):
        opened(serving(listen=listen, token_file=str(tmp_path / "nowhere")), engine)
    until(lambda: threading.active_count() == before)
    own = "[::1]" if "::" in listen else "127.0.0.1"
    token = tmp_path / "token"
    token.write_text("secret\n")
    pipe = opened(serving(listen=listen, advertise=own, token_file=str(token)), engine)
    at = engine.slots(192)
    stored(pipe, engine, at)
    other = opened(reader(pipe, token_file=str(token)), engine)
    assert get(other, engine, at).tokens == 192
    with pytest.raises(ConfigError, match="requires a token"):
        opened(reader(pipe), engine)


def test_an_address_of_this_host_is_told_where_it_listens_at_all(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERLOOM_TOKEN", "t")
    pipe = opened(serving(listen="0.0.0.0:0"), Engine())
    host = pipe.serves_at.removeprefix("tierloom://").rpartition(":")[0]
    assert host not in ("0.0.0.0", "")


def test_a_closed_pipeline_leaves_nothing(tmp_path: Path) -> None:
    engine = Engine()

    def left() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    counts = []
    for _ in range(6):
        with tierloom.open(serving(), layout=engine.layout, model="m") as pipe:
            client = Client(pipe)
            address = ("127.0.0.1", int(pipe.serves_at.rpartition(":")[2]))
        assert client.message().kind is Kind.ERROR, "it is told that the server goes"
        client.sock.close()
        with pytest.raises(OSError):
            socket.create_connection(address, 1)
        counts.append(left())
    assert counts[-1] == counts[1]


@pytest.mark.parametrize(("text", "rate"), [("2 GiB/s", 2 << 30), ("500 MB/s", 5 * 10**8), (0, 0)])
def test_rates(text: str | int, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["2 GiB", 5, "fast", "/s", "2 GiB/m", True])
def test_what_is_no_rate(text: Any) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_rate(text)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_at_most_so_many_bytes_a_second(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(terms.anyio, "sleep", sleep)
    pace = RateLimit(1 << 20)
    assert await pace.wait(1 << 16)
    assert await pace.wait(1 << 16)
    assert slept == [0, 0], "a tenth of a second's bytes go at once"
    assert await pace.wait(1 << 20)
    assert 0 < slept[2] <= 1 / 8 - 0.1
    assert not await pace.wait(1), "a second behind: somebody else is to be asked"
    assert all([await RateLimit(0).wait(1 << 40) for _ in range(3)])
    assert anyio.current_time() > 0


def test_what_is_beyond_the_limit_is_a_miss_elsewhere(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    pipe = opened(serving(limit="1 KiB/s"), engine)
    stored(pipe, engine, at)
    other = opened(reader(pipe), engine)
    got = get(other, engine, at)
    assert got.tokens == 64, "the first went at once"
    assert Lost.NO_ROOM in got.lost
    assert get(other, engine, at).tokens == 0
    assert pipe.stats()["serve"]["given"] == 3, "nothing is read in vain any more"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tiers": ["cold"]}, "there is no tier 'cold'"),
        ({"tiers": ["far"]}, "tier 'far' is not this process's own"),
        ({"tiers": []}, "name at least one"),
        ({"limit": "2 GiB"}, "is not a rate"),
        ({"listen": "nowhere"}, "write tcp://HOST:PORT"),
        ({"listen": "tls://127.0.0.1:0"}, "tls:// needs cert_file and key_file"),
        ({"cert_file": "x", "key_file": "y"}, "which are for it alone"),
        ({"clients": 0}, "clients must be at least 1"),
        ({"advertise": "a b:c"}, "advertise"),
    ],
)  # fmt: skip
def test_what_cannot_be_served(options: dict[str, Any], says: str) -> None:
    far = {"use": "server", "url": "tierloom://127.0.0.1:1"}
    with pytest.raises(ConfigProblems, match=says):
        load_config(config(serve={"tiers": ["hot"]} | options, tiers__far=far))
