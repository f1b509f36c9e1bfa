"""redis behind TLS and a password: who is let in, and that no password is ever shown."""

from __future__ import annotations

import logging
import traceback

import pytest
import yaml
from servers import Certificates, redis

from tierloom.pipeline.config.explain import explain
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.redis.tier import Redis, RedisOptions
from tierloom.stages.tiers.redis.url import parse_url

from .test_redis import RedisBench

PASSWORD = "s3cret/with:odd@letters"
QUOTED = "s3cret%2Fwith%3Aodd%40letters"
USER = ["--user", "default", "off", "--user", "kv", "on", f">{PASSWORD}", "~kv:*", "+@all",
        "-@dangerous"]  # fmt: skip


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(certificates):
    with redis(*certificates.options(), *USER) as server:
        yield server


class TestTls(RedisBench):
    @pytest.fixture(autouse=True)
    def empty(self, server, certificates):
        self.server, self.certificates = server, certificates

    def make(self, ctx, folder, clock, **options):
        url = f"rediss://kv:{QUOTED}@localhost:{self.server.port}/0"
        whole = {"url": url, "prefix": "kv:t", "ca_file": str(self.certificates.ca)}
        return Redis(RedisOptions(**whole | options), ctx)

    @pytest.mark.anyio
    async def test_there_and_back(self, tier, arena):
        object.__setattr__(tier.options, "piece", 10_000)
        assert await self.put(tier, *range(20)) == [None] * 20
        for seed in range(20):
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)
        assert await tier.delete([b"x" * 32]) == 0
        assert await tier.clear() == 20

    @pytest.mark.anyio
    async def test_given_up_in_the_middle(self, tier, arena):
        """A cancelled read over TLS, at many moments: what comes next is right."""
        import anyio

        await self.put(tier, *range(8))
        for n in range(20):
            with anyio.move_on_after(0.0004 * n):
                await self.get(tier, n % 8)
            assert arena.flight == 0
        for seed in range(8):
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)
        await tier.clear()

    @pytest.mark.anyio
    async def test_passwords_from_elsewhere(self, ctx, tmp_path, clock, monkeypatch):
        url = f"rediss://kv@localhost:{self.server.port}"
        file = tmp_path / "password"
        file.write_text(PASSWORD + "\n")
        monkeypatch.setenv("KV_PASSWORD", PASSWORD)
        for given in ({"password_file": str(file)}, {"password_env": "KV_PASSWORD"}):
            async with self.opened(ctx, tmp_path, clock, url=url, **given) as tier:
                assert await self.put(tier, 1) == [None]
                await tier.clear()
        monkeypatch.delenv("KV_PASSWORD")
        for given in ({"password_file": str(file) + "x"}, {"password_env": "KV_PASSWORD"}, {}):
            tier = self.make(ctx, tmp_path, clock, url=url, **given)
            with pytest.raises(ConfigError, match="password_"):
                await tier.open()
            await tier.close()

    @pytest.mark.anyio
    async def test_a_password_that_changes(self, ctx, tmp_path, clock):
        """The file is read again at each connect."""
        file = tmp_path / "password"
        file.write_text(PASSWORD)
        url = f"rediss://kv@localhost:{self.server.port}"
        async with self.opened(ctx, tmp_path, clock, url=url, password_file=str(file)) as tier:
            file.write_text("outdated")
            with pytest.raises(Exception, match="WRONGPASS"):
                await self.put(tier, 1)
            file.write_text(PASSWORD)
            assert await self.put(tier, 1) == [None]
            await tier.clear()

    @pytest.mark.anyio
    @pytest.mark.parametrize(
        ("url", "options", "says"),
        [
            ("rediss://kv:hunter2@localhost:{}", {}, "WRONGPASS; check user, password"),
            ("rediss://localhost:{}", {}, "NOAUTH"),
            (f"rediss://kv:{QUOTED}@localhost:{{}}/99", {}, "database 99: ERR"),
            (f"rediss://kv:{QUOTED}@localhost:{{}}", {"ca_file": "other"}, "give `ca_file`"),
            (f"rediss://kv:{QUOTED}@localhost:{{}}", {"ca_file": "/none.pem"}, "ca_file /none"),
            (f"rediss://kv:{QUOTED}@127.0.0.2:{{}}", {"ca_file": ""}, None),
        ],
    )
    async def test_not_let_in(self, ctx, tmp_path, clock, caplog, url, options, says):
        if options.get("ca_file") == "other":
            options = {"ca_file": str(self.certificates.other_ca)}
        url = url.format(self.server.port)
        tier = self.make(ctx, tmp_path, clock, url=url, **options)
        with caplog.at_level(logging.DEBUG), pytest.raises(Exception) as caught:
            await tier.open()
        await tier.close()
        if says is not None:
            assert isinstance(caught.value, ConfigError)
            assert says in str(caught.value)
        told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(tier.options)
        for word in (PASSWORD, QUOTED, "hunter2"):
            assert word not in told

    @pytest.mark.anyio
    async def test_a_prefix_that_is_not_ours(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, prefix="other") as tier:
            with pytest.raises(Exception, match="NOPERM; the user needs"):
                await self.put(tier, 1)

    @pytest.mark.anyio
    async def test_a_server_that_asks_who_we_are(self, ctx, tmp_path, clock):
        folder = self.certificates.folder
        with redis(*self.certificates.options(clients="yes"), *USER) as strict:
            self.server = strict
            mine = {"cert_file": str(folder / "client.crt"), "key_file": str(folder / "client.key")}
            async with self.opened(ctx, tmp_path, clock, **mine) as tier:
                assert await self.put(tier, 1) == [None]
            tier = self.make(ctx, tmp_path, clock)
            with pytest.raises((OSError, TierDown)):
                await tier.open()
            await tier.close()


class TestSocket(RedisBench):
    @pytest.mark.anyio
    async def test_a_path(self, ctx, tmp_path, clock, arena):
        with redis("--unixsocket", "{folder}/s") as server:
            self.server = server
            url = f"unix://{server.log.parent}/s?db=3"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                assert await self.put(tier, 1) == [None]
                assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.fixture(autouse=True)
    def empty(self):
        """No server but the test's own."""

    def make(self, ctx, folder, clock, **options):
        return Redis(RedisOptions(**options), ctx)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("redis://h", ("single", False, (("h", 6379, ""),), "", 0, "", "")),
        ("redis://[::1]:7/2", ("single", False, (("::1", 7, ""),), "", 2, "", "")),
        ("rediss://u:p%40:q@h:1", ("single", True, (("h", 1, ""),), "", 0, "u", "p@:q")),
        ("redis://:pw@h", ("single", False, (("h", 6379, ""),), "", 0, "", "pw")),
        ("unix:///a/b?db=1", ("single", False, (("", 0, "/a/b"),), "", 1, "", "")),
        (
            "redis-sentinel://h1,h2:5/kv/3",
            ("sentinel", False, (("h1", 26379, ""), ("h2", 5, "")), "kv", 3, "", ""),
        ),
        (
            "rediss-cluster://u:p@h1:1,h2",
            ("cluster", True, (("h1", 1, ""), ("h2", 6379, "")), "", 0, "u", "p"),
        ),
    ],
)
def test_urls(text, says) -> None:
    found = parse_url(text)
    assert found._replace(hosts=tuple(host[:3] for host in found.hosts)) == says


@pytest.mark.parametrize(
    "url",
    [
        "", "h:6379", "http://h", "redis://", "redis://h:0", "redis://h:99999", "redis://h/x",
        "redis://h1,h2", "redis://h?x=1", "redis://a b", "unix://a", "redis-sentinel://h1,h2",
        "redis-cluster://h/2", "redis://h/-1",
    ],
)  # fmt: skip
def test_urls_that_are_none(url) -> None:
    with pytest.raises(ValueError, match="url"):
        RedisOptions(url=url)


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": -1.0}, {"connections": 0}, {"window": 0}, {"window": 65}, {"piece": 1000},
        {"stall": 0.0}, {"prefix": ""}, {"prefix": "a*"}, {"prefix": "{a}"},
        {"ca_file": "/x"}, {"key_file": "/x"}, {"password_env": "A", "password_file": "b"},
        {"url": "redis://:p@h", "password_env": "A"},
    ],
)  # fmt: skip
def test_bad_options(options) -> None:
    with pytest.raises(ValueError):
        RedisOptions(**{"url": "redis://h"} | options)


FILE = """
version: 1
tiers:
  cold: {{use: redis, url: "{url}", {more}}}
graphs:
  store: {{stages: {{k: {{use: hash}}, l: {{use: lookup, want: absent}}, g: {{use: gather}},
                   p: {{use: put, tier: cold}}}}}}
"""


@pytest.mark.parametrize("more", ["", "ttl: x", "windo: 3", "piece: 1 KiB", "password_env: A"])
def test_what_is_said_of_a_pipeline_says_no_password(tmp_path, more) -> None:
    """Nor does a problem, though it shows the line it is in."""
    url = "rediss://kv:s3cret@127.0.0.1:6379/0"
    file = tmp_path / "p.yaml"
    file.write_text(FILE.format(url=url, more=more))
    try:
        spec = load_config(file)
    except ConfigProblems as problems:
        assert more
        told = f"{problems} {problems!r} {problems.problems}"
        assert "p.yaml" in told
    else:
        assert not more
        told = f"{explain(spec)} {spec!r}"
        assert "url rediss://***@127.0.0.1:6379/0" in told
    assert "s3cret" not in told


def test_a_password_where_none_belongs_is_not_repeated() -> None:
    long = "redis://a:" + "s3cret" * 20 + "@b"  # cut before its end when it is shown
    source = yaml.safe_load(FILE.format(url="http://kv:s3cret@h", more=f"window: '{long}'"))
    with pytest.raises(ConfigProblems) as caught:
        load_config(source)
    assert "s3cret" not in f"{caught.value} {caught.value.problems}"
