"""Engines that find each other through a directory: what one keeps, the others read."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk

sys.path.append(str(Path(__file__).parents[2] / "stages" / "tiers"))

from servers import cluster, redis

from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Open

IDS = tokens(192)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with redis() as made:
        yield made


def url(server: Any) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def engine_file(at: str, **serve: Any) -> dict[str, Any]:
    """An engine that serves its memory, tells so, and reads what others tell."""
    made = config(
        serve={"tiers": ["hot"], "directory": at} | serve,
        tiers__near={"use": "peer", "directory": [at], "timeout": "2 s"},
    )
    made["graphs"]["retrieve"]["stages"]["plan"] = {"use": "lookup", "tiers": ["hot", "near"]}
    return made


def found(
    pipe: Any, engine: Engine, at: Any, *, wanted: int, seconds: float = 20.0, ids: Any = IDS
) -> int:
    """Tokens that a retrieve brings, asked again until they are so many."""
    end = time.monotonic() + seconds
    while True:
        got = pipe.retrieve(ids, engine.caches, at).wait(10).tokens
        if got == wanted or time.monotonic() > end:
            return int(got)
        time.sleep(0.05)


def test_what_one_keeps_the_other_finds(opened: Open, server: Any) -> None:
    engine = Engine()
    target = engine.blank()
    at, to = engine.slots(192), target.slots(192)
    one, two = (opened(engine_file(url(server)), engine) for _ in range(2))
    one.store(IDS, engine.caches, at).wait()
    settle(one)
    assert found(two, target, to, wanted=192) == 192
    assert torch.equal(engine.rows(at), target.rows(to))
    assert two.stats()["tiers"]["near"]["hits"] == 3
    assert one.stats()["serve"]["given"] == 3
    # what is gone is a miss, and nobody is sent there again
    one.clear()
    two.clear()
    assert found(two, target, to, wanted=0) == 0
    one.store(IDS, engine.caches, at).wait()
    assert found(two, target, to, wanted=192) == 192
    # an engine that has ended is named no more
    two.clear()
    one.close()
    assert found(two, target, to, wanted=0) == 0


def test_ranks_of_one_engine_have_its_name_alike(opened: Open, server: Any) -> None:
    """Each has a share of its own, in a namespace of its own."""
    engine = Engine()
    target = engine.blank()
    at, to = engine.slots(192), target.slots(192)
    for part in ("first", "second"):
        rank = opened(engine_file(url(server), instance="one engine"), engine, model=part)
        rank.store(IDS, engine.caches, at).wait()
    for part in ("first", "second"):
        other = opened(engine_file(url(server)), engine, model=part)
        assert found(other, target, to, wanted=192) == 192


def test_what_was_kept_before_the_directory_came(opened: Open) -> None:
    """And what is kept when it comes back empty."""
    engine = Engine()
    target = engine.blank()
    at, to = engine.slots(192), target.slots(192)
    with redis() as server:
        one, two = (opened(engine_file(url(server)), engine) for _ in range(2))
        one.store(IDS, engine.caches, at).wait()
        assert found(two, target, to, wanted=192) == 192
        two.clear()
        server.stop()
        assert two.retrieve(IDS, target.caches, to).wait(10).tokens == 0
        assert two.store(tokens(64, 9), engine.caches, at[:64]).wait(10).tokens == 64
        server.start()
        assert found(two, target, to, wanted=192, seconds=40) == 192


def test_a_cluster_and_what_a_disk_kept(opened: Open, tmp_path: Path) -> None:
    """After a restart an engine knows no chain, and tells what it has all the same."""
    engine = Engine()
    target = engine.blank()
    at, to = engine.slots(192), target.slots(192)
    with cluster() as nodes:
        where = f"redis-cluster://127.0.0.1:{nodes[0].port}"
        keeper = with_disk(tmp_path, serve={"tiers": ["hot", "warm"], "directory": where})
        one, two = opened(keeper, engine), opened(engine_file(where), engine)
        one.store(IDS, engine.caches, at).wait()
        settle(one)
        assert found(two, target, to, wanted=192) == 192
        two.clear()
        one.close()
        assert found(two, target, to, wanted=0) == 0
        opened(keeper, engine)
        assert found(two, target, to, wanted=192) == 192
    assert torch.equal(engine.rows(at), target.rows(to))


def test_an_engine_hosts_the_directory(opened: Open, tmp_path: Path) -> None:
    """For others, and for itself; they tell all anew to the one that comes after it."""
    engine = Engine()
    target = engine.blank()
    at, to, more = engine.slots(192), target.slots(192), tokens(192, 9)
    token = tmp_path / "token"
    token.write_text("sesame")
    token.chmod(0o600)
    own = {"token_file": str(token)}

    def hosting(listen: str) -> Any:
        serve = {"tiers": ["hot"], "directory": "embedded", "listen": listen} | own
        return opened(config(serve=serve), engine)

    def joined() -> Any:
        file = engine_file(where, **own)
        file["tiers"]["near"] |= own
        return opened(file, engine)

    host = hosting("127.0.0.1:0")
    where = host.serves_at.replace("tierloom", "directory")
    one, two = joined(), joined()
    host.store(IDS, engine.caches, at).wait()
    assert found(two, target, to, wanted=192) == 192
    assert torch.equal(engine.rows(at), target.rows(to))
    one.store(more, engine.caches, at).wait()
    assert found(two, target, to, wanted=192, ids=more) == 192
    two.clear()
    host.close()
    assert two.retrieve(more, target.caches, to).wait(10).tokens == 0
    serve = {"directory": "embedded", "listen": where.rpartition("/")[2]} | own
    file = engine_file(where, **serve)
    file["tiers"]["near"] |= own
    host = opened(file, engine)
    assert found(two, target, to, wanted=192, ids=more) == 192
    assert found(host, target, to, wanted=192, ids=more) == 192, "it asks itself"


def test_who_cannot_listen_tells_nothing(opened: Open) -> None:
    engine = Engine()
    first = opened(config(serve={"tiers": ["hot"], "directory": "embedded"}), engine)
    listen = first.serves_at.rpartition("/")[2]
    serve = {"tiers": ["hot"], "directory": "embedded", "listen": listen}
    second = opened(config(serve=serve), engine)
    assert second.store(IDS, engine.caches, engine.slots(192)).wait(10).tokens == 192
    assert second._worker.announced is None


def test_a_wrong_password_costs_what_others_have(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the engine's own tiers serve on; that one is no failure of the tier."""
    engine = Engine()
    at = engine.slots(192)
    with redis("--requirepass", "sesame") as server:
        pipe = opened(engine_file(url(server)), engine)
        pipe.store(IDS, engine.caches, at).wait()
        assert pipe.retrieve(IDS, engine.caches, at).wait(10).tokens == 192
        for _ in range(5):
            assert pipe.retrieve(tokens(64, 9), engine.caches, at[:64]).wait(10).tokens == 0
        assert pipe.tiers["near"].available
    said = [r.getMessage() for r in caplog.records]
    assert sum("does not say what other engines keep" in line for line in said) == 1
    assert not any("unexpected error" in line for line in said)


def test_a_directory_is_named_alone(opened: Open) -> None:
    engine = Engine()
    for wrong, words in (
        (["redis://h:1", "10.0.0.2:1"], "one directory, or engines"),
        (["redis-what://h:1"], "redis-sentinel"),
        (["embedded"], "name who hosts it, as in directory://127.0.0.1:7655"),
    ):
        source = config(tiers__near={"use": "peer", "directory": wrong})
        with pytest.raises((ConfigError, ConfigProblems), match=words):
            opened(source, engine)
    with pytest.raises(ConfigError, match="no such worker's instance 'ab"):
        opened(
            config(serve={"tiers": ["hot"], "directory": "embedded", "instance": "ab\n"}), engine
        )
    with pytest.raises(ConfigError, match="redis://, redis-sentinel://"):
        opened(config(serve={"tiers": ["hot"], "directory": "h:1"}), engine)


def test_routers_are_told_of_pages_they_know(opened: Open) -> None:
    """By SGLang's hashes; what is told then is tested with SGLang's own classes."""
    serve = {"tiers": ["hot"], "events": "tcp://*:5558"}
    with pytest.raises(ConfigError, match="only SGLang's page hashes"):
        opened(config(serve=serve), Engine())
    for wrong in ({"events": "h:1"}, {"events_topic": "kv"}):
        with pytest.raises(ConfigProblems, match=r"tcp://HOST:PORT|need events"):
            opened(config(serve={"tiers": ["hot"]} | wrong), Engine())
