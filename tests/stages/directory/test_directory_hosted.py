"""The directory that a process of ours hosts: doors, lies, and what is asked that nobody asks."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
import servers
from hypothesis import given, settings, strategies as st

from tierloom.adapters.server import serve
from tierloom.pipeline.serve.listener import certificate
from tierloom.stages.directory.shared import hosted
from tierloom.stages.directory.shared.announcer import Announcer
from tierloom.stages.directory.shared.embedded import EmbeddedDirectory
from tierloom.stages.directory.shared.hosted import DirectoryHost, HostedDirectory
from tierloom.stages.directory.shared.named import named_directory
from tierloom.stages.directory.shared.records import ChunkHolder, number_of
from tierloom.stages.errors import ConfigError, InputError, TierDown
from tierloom.stages.tiers.server import protocol as wire
from tierloom.testing.directories import held, names_of, worker_of

from .standins import hosting
from .test_announcer import finds, until

sys.path.append(str(Path(__file__).parents[1] / "tiers"))

import store_server
from processes import free_port

pytestmark = pytest.mark.anyio
NAMES = names_of(1, 64)


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def asked(url, **options):
    directory = HostedDirectory(url, timeout=5.0, **options)
    try:
        return await directory.find(NAMES)
    finally:
        await directory.close()


async def filled():
    directory = EmbeddedDirectory()
    epoch = await directory.join(worker_of("a", heartbeat=60.0))
    assert await directory.announce(epoch, 1, held(NAMES))
    return directory, [(ChunkHolder(number_of(epoch), 1),)] * 64


async def test_over_tls_and_a_unix_socket(tmp_path) -> None:
    made = servers.Certificates(tmp_path)
    context = certificate(tmp_path / "server.crt", tmp_path / "server.key")
    directory, right = await filled()
    async with hosting(directory, at="tls://127.0.0.1:0", context=context) as (_, url):
        assert await asked(url.replace("127.0.0.1", "localhost"), ca_file=str(made.ca)) == right
        with pytest.raises(TierDown, match="CERTIFICATE_VERIFY_FAILED"):
            await asked(url)
    async with hosting(directory, at=f"unix://{tmp_path}/sock") as (_, url):
        assert await asked(url) == right


async def test_a_token_is_asked_for(tmp_path) -> None:
    directory, right = await filled()
    good, bad = tmp_path / "good", tmp_path / "bad"
    for file in (good, bad):
        file.write_text(file.name)
        file.chmod(0o600)
    async with hosting(directory, token=b"good") as (_, url):
        assert await asked(url, token_file=str(good)) == right
        with pytest.raises(TierDown, match="wrong token"):
            await asked(url, token_file=str(bad))
        with pytest.raises(TierDown, match="requires a token"):
            await asked(url)
    async with hosting(directory) as (_, url):
        with pytest.raises(TierDown, match="requires no token"):
            await asked(url, token_file=str(good))


async def test_who_hosts_none_says_so() -> None:
    """As servers of before there were directories do."""
    async with hosting(None) as (_, url):
        with pytest.raises(TierDown, match="hosts no directory: use `serve"):
            await asked(url)
    with pytest.raises(TierDown, match="cannot be reached"):
        await asked(f"directory://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="write --directory embedded"):
        serve._host("redis://h:1")
    for wrong in ("directory://", "directory://h:x", "directory+ssh://h:1"):
        with pytest.raises(ConfigError, match="directory"):
            named_directory(wrong)


async def test_very_many_workers_come_in_several_answers() -> None:
    directory = EmbeddedDirectory()
    fields = {"text": "x" * 7000}
    epochs = [
        await directory.join(worker_of(f"w{i}", heartbeat=60.0, fields=fields)) for i in range(90)
    ]
    async with hosting(directory) as (_, url):
        client = HostedDirectory(url, timeout=20.0)
        right = await directory.workers()
        assert len(right) == 90
        assert await client.workers() == right
        some = [number_of(epoch) for epoch in epochs[20:70]]
        assert await client.workers(some) == {n: right[n] for n in some}
        await client.close()


async def test_a_host_that_is_full(monkeypatch) -> None:
    monkeypatch.setattr("tierloom.stages.directory.shared.embedded._MOST_WORKERS", 2)
    directory = EmbeddedDirectory()
    async with hosting(directory) as (_, url):
        client = HostedDirectory(url, timeout=20.0)
        for name in "aba":
            await client.join(worker_of(name))
        with pytest.raises(TierDown, match="of 2 workers takes no more"):
            await client.join(worker_of("c"))
        with pytest.raises(InputError):
            await directory.join(worker_of("c"))
        await client.close()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(hosted.ANSWERS)), st.binary(max_size=60) | st.binary(min_size=37))
def test_questions_that_nobody_asks(kind, body) -> None:
    """Are answered, or refused by name; the directory goes on."""

    async def ask() -> None:
        directory, right = await filled()
        host = DirectoryHost(directory)
        with suppress(wire.BadMessage):
            assert await host.answer(wire.Message(kind, 7, body))
        assert await host.answer(wire.Message(wire.Kind.GET, 7, body)) is None
        assert await directory.find(NAMES) == right

    anyio.run(ask)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_answers_that_nobody_gives(body) -> None:
    with suppress(wire.BadMessage):
        assert len(hosted._found_in(body, 8)) <= 8
    with suppress(wire.BadMessage):
        hosted._members_in(body)
    with suppress(wire.BadMessage):
        hosted._unpacked(hosted._U64, body)


async def test_a_host_that_lies_about_workers(monkeypatch) -> None:
    """One that never comes to an end is left."""
    directory, _ = await filled()

    async def endless(directory, body):
        return hosted._U32.pack(5)

    monkeypatch.setattr(hosted, "_pack_members", endless)
    async with hosting(directory) as (_, url):
        client = HostedDirectory(url, timeout=5.0)
        with pytest.raises(TierDown, match="come twice"):
            await client.workers()
        await client.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_real_server_hangs_dies_and_comes_back_empty(tmp_path) -> None:
    """What is kept elsewhere is told anew, and nobody waits longer than the time limit."""
    with store_server.process(tmp_path, "--directory", "embedded") as server:
        directory = HostedDirectory(server.url.replace("tierloom", "directory"), timeout=0.5)
        announcer = Announcer(directory, worker_of("a", heartbeat=0.5))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(announcer.run)
            for name in NAMES:
                announcer.note(name, 0, True)
            await finds(directory, NAMES, 64)
            with server.paused(), anyio.fail_after(5), pytest.raises(TierDown, match="within"):
                await directory.find(NAMES)
            server.kill()
            with pytest.raises(TierDown, match="cannot be reached"):
                await directory.find(NAMES)
            server.start()
            await until(lambda: _is_back(directory))
            assert announcer.snapshots >= 2
            tasks.cancel_scope.cancel()
        await directory.close()


async def _is_back(directory):
    with suppress(TierDown):
        return len(await directory.find(NAMES)) == 64
