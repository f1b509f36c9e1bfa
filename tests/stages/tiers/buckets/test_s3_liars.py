"""s3 on servers that lie: a miss each time, no wrong byte, and nobody waits past the deadline."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from processes import need

from tierloom.stages.errors import BadObject, ConfigError, Lost
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.buckets.bucket import S3Options
from tierloom.stages.tiers.buckets.s3 import S3
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.testing import NAMESPACE, SIZE, Pool, TierBench, key_of

TOKENS = 1024
"""Of an object that is read in several ranges."""


class Limits:
    timeout, fails, probe = 0.5, 3, 0.1


class Handler(BaseHTTPRequestHandler):
    """A bucket in memory, which lies as its server is told."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", *, head=False, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if not head and self.command != "HEAD":
            self.wfile.write(body)

    def kept(self):
        return self.server.objects.get(self.path.partition("?")[0])

    def plain(self, body, **lies):
        """As a bucket should."""
        server = self.server
        server.version += server.lie == "another ETag"
        headers = {
            "ETag": f'"{server.version}"', "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            "Accept_Ranges": "bytes",
        }  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or server.lie == "the whole object":
            return self.answer(200, body, **headers, **lies)
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(body))
        if start >= len(body):
            return self.answer(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return self.answer(206, body[start:stop], **headers, **lies)

    def do_HEAD(self):
        body = self.kept()
        if body is None and self.server.lie != "HEAD says yes":
            return self.answer(404)
        return self.answer(200, length=len(body or bytes(SIZE)), ETag='"1"',
                           Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT")  # fmt: skip

    def do_GET(self):
        server, body = self.server, self.kept()
        server.asked += 1
        if body is None:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if server.lie == "GET says no":
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if server.lie == "GET is refused":
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if server.lie == "503, then right" and server.asked % 2:
            return self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if server.lie == "503":
            return self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if server.lie == "longer than it is":
            self.close_connection = True
            return self.plain(body, length=len(body) + 10)
        if server.lie == "shorter than it is":
            self.close_connection = True
            return self.plain(body, length=1000)
        if server.lie == "a byte a second":
            self.plain(body, head=True)
            with_patience = iter(body)
            while server.lie == "a byte a second":
                self.wfile.write(bytes([next(with_patience)]))
                self.wfile.flush()
                time.sleep(1.0)
            self.close_connection = True
            return None
        if server.lie == "another object in between" and "bytes=0-" not in self.headers["Range"]:
            return self.plain(server.other)
        return self.plain(body)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects.setdefault(self.path.partition("?")[0], body)
        self.answer(200, ETag='"1"')

    def do_DELETE(self):
        self.server.objects.pop(self.path.partition("?")[0], None)
        self.answer(204)


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.objects, server.lie, server.version, server.asked = {}, "", 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.lie = ""
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ctx(monkeypatch):
    need("s3", "obstore")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    arena = Arena(64 * SIZE, huge_pages=False)
    yield TierContext(arena, NAMESPACE, Pool())
    end = time.monotonic() + 5
    while arena.leases and time.monotonic() < end:
        time.sleep(0.01)
    assert not arena.leases
    arena.close()


@pytest.fixture
def anyio_backend():
    return "asyncio"


def tier_at(server, ctx, **options):
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    given = {
        "url": "s3://bucket/kv",
        "endpoint": endpoint,
        "region": "us-east-1",
        "part": 256 << 10,
    }
    return CircuitBreaker(S3(S3Options(**(given | options)), ctx), "cold", Limits())


bench = TierBench()

MISSES = {
    "GET says no": Lost.ABSENT,
    "GET is refused": Lost.TIER_DOWN,
    "503": Lost.TIER_DOWN,
    "longer than it is": Lost.TIER_DOWN,
    "shorter than it is": Lost.TIER_DOWN,
    "a byte a second": Lost.LATE,
    "the whole object": Lost.TIER_DOWN,
}


@pytest.mark.anyio
class TestLiars:
    @pytest.mark.parametrize("lie", MISSES)
    async def test_a_miss_and_no_more(self, server, ctx, lie):
        tier = tier_at(server, ctx)
        await tier.open()
        assert await bench.put(tier, 1, tokens=TOKENS) == [None]
        right = bench.bytes_of(ctx.arena, 1, TOKENS)
        assert await bench.get(tier, 1, TOKENS) == right
        server.lie = lie
        began = time.monotonic()
        got = await bench.get(tier, 1, TOKENS)
        assert got in (MISSES[lie], Lost.LATE)
        assert time.monotonic() - began < Limits.timeout + 5, "generous: it is busy"
        server.lie = ""
        assert len(server.objects) == 1, "nothing is deleted for it"
        assert await bench.get(tier, 1, TOKENS) == right
        await tier.close()

    @pytest.mark.parametrize("lie", ["another ETag", "503, then right"])
    async def test_what_does_no_harm(self, server, ctx, lie):
        tier = tier_at(server, ctx)
        await tier.open()
        await bench.put(tier, 1, tokens=TOKENS)
        server.lie, server.asked = lie, 0
        assert await bench.get(tier, 1, TOKENS) == bench.bytes_of(ctx.arena, 1, TOKENS)
        assert server.asked > 2, "several ranges, or tries"
        await tier.close()

    async def test_another_object_comes_between_two_ranges(self, server, ctx):
        """Of the same length, as it is when it is encrypted again: it is not mixed with the first,
        and neither is deleted."""
        tier = tier_at(server, ctx)
        await tier.open()
        await bench.put(tier, 1, tokens=TOKENS)
        (raw,) = server.objects.values()
        server.other, server.lie = raw[:4096] + bytes(len(raw) - 4096), "another object in between"
        with pytest.raises(BadObject, match="frame checksum"):  # which every reader checks
            await bench.get(tier, 1, TOKENS)
        assert len(server.objects) == 1
        server.lie = ""
        assert await bench.get(tier, 1, TOKENS) == bench.bytes_of(ctx.arena, 1, TOKENS)
        await tier.close()

    async def test_head_says_yes_of_what_is_not_there(self, server, ctx):
        tier = tier_at(server, ctx)
        await tier.open()
        server.lie = "HEAD says yes"
        assert await tier.exists([key_of(1)]) == [True]
        for _ in range(5):
            assert await bench.get(tier, 1) is Lost.ABSENT
        assert tier.available
        server.lie = ""
        await tier.close()

    async def test_a_server_that_knows_no_ranges_is_named(self, server, ctx, caplog):
        tier = tier_at(server, ctx)
        await tier.open()
        await bench.put(tier, 1)
        server.lie = "the whole object"
        for _ in range(Limits.fails):
            assert await bench.get(tier, 1) is Lost.TIER_DOWN
        (said,) = [r.getMessage() for r in caplog.records]
        assert "it answers a range with the whole object" in said
        await tier.close()

    @pytest.mark.parametrize("status", [301, 307, 400])
    async def test_a_bucket_of_another_region(self, server, ctx, monkeypatch, status):
        code = "PermanentRedirect" if status != 400 else "AuthorizationHeaderMalformed"
        body = f"<Error><Code>{code}</Code><Region>eu-west-1</Region></Error>".encode()
        monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer(status, body))
        tier = tier_at(server, ctx)
        with pytest.raises(ConfigError, match=r"s3://bucket/kv: .*another region: set `region`"):
            await tier.open()
        await tier.close()


@pytest.mark.anyio
class TestSearch:
    @pytest.mark.parametrize(("chunks", "requests"), [(64, 11), (782, 20)])
    async def test_a_long_prompt_takes_few_requests(
        self, server, ctx, monkeypatch, chunks, requests
    ):
        tier = tier_at(server, ctx)
        await tier.open()
        keys = [key_of(seed) for seed in range(chunks)]
        await bench.put(tier, 0)
        ((first, body),) = server.objects.items()
        asked = []
        kept = Handler.kept

        def noted(handler):
            asked.append(handler.command)
            return kept(handler)

        monkeypatch.setattr(Handler, "kept", noted)
        for length in (0, 1, chunks // 3, chunks - 1, chunks):
            names = (first.replace(keys[0].hex(), key.hex()) for key in keys[:length])
            server.objects = dict.fromkeys(names, body)
            asked.clear()
            assert await tier.prefix_length(keys) == length
            assert set(asked) == {"HEAD"}
            assert len(asked) <= requests
        await tier.close()

    async def test_head_says_yes_and_get_says_no(self, server, ctx):
        tier = tier_at(server, ctx)
        await tier.open()
        await bench.put(tier, 1)
        server.lie = "GET says no"
        for _ in range(2):
            assert key_of(1) not in tier.unread
            assert await tier.prefix_length([key_of(1)]) == 1
            assert await bench.get(tier, 1) is Lost.ABSENT
        assert key_of(1) in tier.unread, "no plan has it"
        assert await tier.exists([key_of(1)]) == [True], "and nobody puts it again"
        await tier.close()
