"""`tierloom serve` as a process: who may listen where, tokens, TLS, restarts, an orderly end."""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from store_server import Process, process

from tierloom.pipeline.serve.listener import Listen
from tierloom.stages.errors import ConfigError, Lost, TierDown
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind
from tierloom.stages.tiers.server.tier import Server, ServerOptions
from tierloom.testing import NAMESPACE, SIZE, TierBench, key_of

from .raw_client import exactly, receive, welcomed
from .test_server_hostile import eventually, fill

ROOT = Path(__file__).resolve().parents[4]
MAIN = "tierloom.adapters.cli"


def refused(*options: str, env: dict[str, str] | None = None) -> str:
    """What the command says when it will not start."""
    run = subprocess.run(
        [sys.executable, "-m", MAIN, "serve", "--config", "minimal", *options],
        capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONSAFEPATH": "1", "TIERLOOM_MEMORY": "1 MiB"} | (env or {}),
    )  # fmt: skip
    assert run.returncode == 2, (run.stdout, run.stderr)
    assert "Traceback" not in run.stderr
    return run.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "cache.example"])
def test_other_hosts_are_let_in_only_when_told(host: str) -> None:
    said = refused("--listen", f"tcp://{host}:0")
    assert "can be reached from other hosts" in said
    assert "--token-file" in said


@pytest.mark.parametrize("how", ["told", "token"])
def test_other_hosts_are_let_in_when_told(tmp_path: Path, how: str) -> None:
    options = ["--without-token"] if how == "told" else []
    env = {} if how == "told" else {"TIERLOOM_TOKEN": "t"}
    with process(tmp_path, *options, listen=("tcp://0.0.0.0:0",), env=env) as server:
        assert server.stop() == 0


def test_mistakes_are_told_in_words(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert "unix:///PATH" in refused("--listen", "http://127.0.0.1:1")
    assert "--cert" in refused("--listen", "tls://127.0.0.1:0")
    assert "go together" in refused("--cert", str(empty))
    assert "PEM" in refused("--cert", str(empty), "--key", str(empty))
    assert "is empty" in refused("--token-file", str(empty))
    assert "token file" in refused("--token-file", str(tmp_path / "nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refused("--listen", f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    file = tmp_path / "no-tiers.yaml"
    file.write_text("version: 1\ngraphs: {}")
    assert "has no tiers" in refused("--config", str(file))
    folder = tmp_path / "used"
    disk = {"warm": {"use": "disk", "path": str(folder), "capacity": "1 MiB", "segment": "1 MiB"}}
    with process(tmp_path, tiers=disk):
        file.write_text((tmp_path / "serve.yaml").read_text())
        assert "in use by another" in refused(
            "--config", str(file), "--listen", "tcp://127.0.0.1:0"
        )


@pytest.mark.parametrize(
    "url", ["tcp://", "tcp://h:99999", "unix://h/path", "unix:path", "tls://h/x", "x"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="write tcp://"):
        Listen.at(url)


def test_a_unix_socket_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with process(tmp_path / "a", listen=(f"unix://{path}",)) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "in use" in refused("--listen", f"unix://{path}")
        with welcomed(server.url):
            server.kill()
    assert path.exists(), "killed: it could not clean up"
    with process(tmp_path / "b", listen=(f"unix://{path}",)) as server:
        assert server.stop() == 0
    assert not path.exists()


def test_a_request_under_way_is_finished_at_the_end(tmp_path: Path) -> None:
    """SIGTERM while a client reads slowly: it gets every byte, nobody new is let in."""
    arena = Arena(2 * SIZE, huge_pages=False)
    with process(tmp_path, "--drain", "20 s") as server:
        fill(server.url, arena, *range(8))
        wanted = [wire.Wanted(key_of(seed % 8), 0, 3, 0) for seed in range(256)]
        with welcomed(server.url) as idle, welcomed(server.url) as sock:
            sock.sendall(wire.message(Kind.GET, 1, wire.pack(*wanted)))
            assert receive(sock).kind is Kind.ITEM
            server.child.send_signal(signal.SIGTERM)
            assert receive(idle).kind is Kind.ERROR
            with pytest.raises(OSError):
                welcomed(server.url)
            for i in range(256):
                if i:
                    assert receive(sock).kind is Kind.ITEM
                assert len(exactly(sock, SIZE)) == SIZE
                if i < 5:
                    time.sleep(0.05)
            assert wire.error_of(receive(sock).body)[0] == wire.ErrorCode.DRAINING
        assert server.stop() == 0
    arena.close()


def test_a_time_to_drain_has_a_unit() -> None:
    assert "'10' has no unit; write '10 ms' or '10 s'" in refused("--drain", "10")


def test_the_end_is_bounded(tmp_path: Path) -> None:
    """A client that never reads what it asked for does not hold up the end."""
    arena = Arena(2 * SIZE, huge_pages=False)
    with process(tmp_path, "--drain", "300 ms") as server:
        fill(server.url, arena, *range(8))
        wanted = [wire.Wanted(key_of(seed % 8), 0, 3, 0) for seed in range(256)]
        with welcomed(server.url) as sock:
            for _ in range(8):
                sock.sendall(wire.message(Kind.GET, 1, wire.pack(*wanted)))
            assert receive(sock).kind is Kind.ITEM
            assert server.stop(patience=8) == 0, server.log.read_text()
    arena.close()


def certificates(folder: Path, name: str) -> tuple[str, str, str]:
    """A certificate for 127.0.0.1 and localhost that vouches for itself: files of both halves."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [
        x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    return str(cert), str(private), name


class TestProcess(TierBench):
    def tier_of(self, ctx: TierContext, url: str, **options: Any) -> Server:
        return Server(ServerOptions(url=url, **options), ctx)

    @pytest.mark.anyio
    async def test_tls(self, ctx: TierContext, arena: Arena, tmp_path: Path) -> None:
        cert, key, _ = certificates(tmp_path, "right")
        wrong, _, _ = certificates(tmp_path, "wrong")
        listen = ("tls://127.0.0.1:0",)
        with process(tmp_path, "--cert", cert, "--key", key, listen=listen) as server:
            for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
                tier = self.tier_of(ctx, url, ca_file=cert)
                await tier.open()
                assert await self.put(tier, 1, 2) == [None, None]
                assert await self.get(tier, 1) == self.bytes_of(arena, 1)
                assert await tier.exists([key_of(2)]) == [True]
                await tier.close()
            for bad in ({}, {"ca_file": wrong}):
                tier = self.tier_of(ctx, server.url, **bad)
                with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                    await tier.open()
                await tier.close()
            plain = self.tier_of(ctx, server.url.replace("+tls", ""))
            with pytest.raises((TierDown, OSError, TimeoutError)):
                with anyio.fail_after(2):
                    await plain.open()
            await plain.close()
            missing = self.tier_of(ctx, server.url, ca_file=str(tmp_path / "nowhere"))
            with pytest.raises(ConfigError, match="ca_file"):
                await missing.open()
            await missing.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("where", ["file", "environment"])
    async def test_tokens(
        self, ctx: TierContext, tmp_path: Path, monkeypatch: Any, where: str
    ) -> None:
        token, wrong = tmp_path / "token", tmp_path / "wrong"
        token.write_text("a-secret-token\n")
        wrong.write_text("another")
        options = ["--token-file", str(token)] if where == "file" else []
        env = {} if where == "file" else {"TIERLOOM_TOKEN": "a-secret-token"}
        with process(tmp_path, *options, env=env) as server:
            good = self.tier_of(ctx, server.url, token_file=str(token))
            await good.open()
            assert await self.put(good, 1) == [None]
            await good.close()
            for bad, says in (
                ({"token_file": str(wrong)}, "wrong token"), ({}, "requires a token"),
            ):  # fmt: skip
                tier = self.tier_of(ctx, server.url, **bad)
                with pytest.raises(ConfigError, match=says):
                    await tier.open()
                await tier.close()
            monkeypatch.setenv("TIERLOOM_TOKEN", "a-secret-token")
            good = self.tier_of(ctx, server.url)
            await good.open()
            await good.close()
            assert "secret" not in server.log.read_text()
            assert "secret" not in " ".join(map(str, server.child.args))

    @pytest.mark.anyio
    async def test_a_server_that_knows_no_token_is_not_ours(
        self, ctx: TierContext, tmp_path: Path
    ) -> None:
        token = tmp_path / "token"
        token.write_text("t")
        with process(tmp_path) as server:
            tier = self.tier_of(ctx, server.url, token_file=str(token))
            with pytest.raises(ConfigError, match="may be another's"):
                await tier.open()
            await tier.close()

    @pytest.mark.anyio
    async def test_a_disk_behind_memory(
        self, ctx: TierContext, arena: Arena, tmp_path: Path
    ) -> None:
        """What memory evicts is on the disk, comes back from it, and survives a restart."""
        tiers = {
            "hot": {"use": "memory", "capacity": 4 * SIZE},
            "warm": {
                "use": "disk", "path": str(tmp_path / "kv"), "capacity": "4 MiB",
                "segment": "1 MiB", "keep_free": "1 MiB",
            },
        }  # fmt: skip
        other = TierContext(arena, b"o" * 32, ctx.pool)
        for restart in range(2):
            with process(tmp_path, tiers=tiers) as server:
                tier, stranger = self.tier_of(ctx, server.url), self.tier_of(other, server.url)
                await tier.open()
                await stranger.open()
                keys = [key_of(seed) for seed in range(12)]
                for _ in range(0 if restart else 200):  # a disk that is slow is left out
                    missing = [
                        seed for seed, there in enumerate(await tier.exists(keys)) if not there
                    ]
                    if not missing:
                        break
                    assert await self.put(tier, missing[0]) == [None]
                    await anyio.sleep(0.02)
                assert tier.stat()[:2] == (12, 12 * SIZE)
                assert stranger.stat()[:2] == (0, 0)
                for seed in range(12):
                    assert await self.get(tier, seed) == self.bytes_of(arena, seed)
                    assert await self.get(stranger, seed) is Lost.ABSENT
                if restart:
                    assert await tier.delete([key_of(3)]) == 1
                    assert await stranger.clear() == 0
                    assert await tier.clear() == 11
                    assert tier.stat()[:2] == (0, 0)
                await tier.close()
                await stranger.close()
                assert server.stop() == 0, server.log.read_text()

    @pytest.mark.anyio
    async def test_damage_on_the_servers_disk_is_a_miss(
        self, ctx: TierContext, arena: Arena, tmp_path: Path
    ) -> None:
        from tierloom.stages.errors import BadObject

        tiers = {"cold": {"use": "files", "path": str(tmp_path / "kv")}}
        right = self.bytes_of(arena, 1)
        with process(tmp_path, tiers=tiers) as server:
            tier = self.tier_of(ctx, server.url)
            await tier.open()
            for at in (0, 4, 40, 300, 4095, 4096, 20000, SIZE - 1, -1):
                assert await self.put(tier, 1) == [None]
                (file,) = (tmp_path / "kv").glob("**/*.tlm")
                raw = bytearray(file.read_bytes())
                if at < 0:
                    del raw[SIZE // 2 :]
                else:
                    raw[at] ^= 16
                file.write_bytes(raw)
                try:
                    assert await self.get(tier, 1) in (Lost.CORRUPT, Lost.ABSENT)
                except BadObject:
                    await tier.delete([key_of(1)])
                assert await self.get(tier, 1) in (Lost.ABSENT, right)
            await tier.close()

    @pytest.mark.anyio
    async def test_a_restart_is_noticed_and_costs_no_failure(
        self, ctx: TierContext, arena: Arena, tmp_path: Path
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = (f"tcp://127.0.0.1:{free.getsockname()[1]}",)
        tier: Server | None = None
        for count in range(3):
            with process(tmp_path, listen=listen) as server:
                if tier is None:
                    tier = self.tier_of(ctx, server.url)
                    await tier.open()
                assert await tier.exists([key_of(1)]) == [False]
                assert tier.counts.extra.get("restarts", 0) == count
                assert await self.put(tier, 1) == [None]
                assert await self.get(tier, 1) == self.bytes_of(arena, 1)
                server.kill()
            with pytest.raises(OSError):
                await tier.exists([key_of(1)])
        assert tier is not None
        await tier.close()


def test_clients_beyond_the_limit_are_turned_away(tmp_path: Path) -> None:
    with process(tmp_path, "--clients", "3") as server:
        inside = [welcomed(server.url) for _ in range(3)]
        with pytest.raises((ConnectionError, OSError)):
            welcomed(server.url)
        inside.pop().close()
        eventually(lambda: _gets_in(server))
        for sock in inside:
            sock.close()


def _gets_in(server: Process) -> bool:
    try:
        welcomed(server.url).close()
    except OSError:
        return False
    return True


def test_pings_and_an_empty_log(tmp_path: Path) -> None:
    with process(tmp_path) as server:
        with welcomed(server.url, namespace=NAMESPACE) as sock:
            sock.sendall(wire.message(Kind.PING, 9))
            assert receive(sock) == (Kind.PONG, 9, b"")
        assert server.stop() == 0
        assert not re.search("Traceback|rror", server.log.read_text())
