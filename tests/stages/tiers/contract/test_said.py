"""What is said of a tier that is down: a line when it begins, every 5 minutes, and at its end."""

from __future__ import annotations

import ast
import asyncio
import errno
import re
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from tierloom.stages.errors import Lost, Refused, TierDown
from tierloom.stages.options import masked
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.direction import why_refused
from tierloom.stages.tiers.memory.tier import Memory, MemoryOptions
from tierloom.testing import SIZE, TierBench, key_of

ROOT = Path(__file__).resolve().parents[4]
STEP = 20.0


class Panic(BaseException):
    """No Exception."""


ERRORS = {
    "gone": TierDown("redis://me:hunter2@host: connection refused"),
    "broken disk": OSError(errno.EIO, "Input/output error"),
    "no right": PermissionError(errno.EACCES, "Permission denied"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "refused": Refused("READONLY You can't write against a read only replica"),
    "a bug": KeyError("x"),
    "a panic": Panic("index out of bounds"),
    "cancelled": asyncio.CancelledError(),
    "hangs": None,
}


class TestSaid(TierBench):
    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    def make(self, ctx, folder, clock, **_):
        limits = SimpleNamespace(timeout=0.005, fails=3, probe=5.0)
        tier = Memory(MemoryOptions(capacity=8 * SIZE), ctx)
        tier.options = SimpleNamespace(url="redis://me:hunter2@host", capacity=8 * SIZE)
        return CircuitBreaker(tier, "cold", limits, clock=clock)

    @pytest.mark.anyio
    @pytest.mark.parametrize("way", ["open", "reads", "puts", "all"])
    @pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
    async def test_each_way_to_be_down(self, ctx, clock, caplog, monkeypatch, way, error):
        if way == "all" and why_refused(error):
            pytest.skip("puts that are refused are another way to be down than reads that fail")
        tier = self.make(ctx, None, clock)

        async def broken(*_):
            if error is None:
                await anyio.sleep_forever()
            raise error

        calls = {"open": ["open"], "reads": ["read", "exists"], "puts": ["put"]}
        with monkeypatch.context() as patch:
            for name in calls.get(way, ["read", "exists", "put"]):
                patch.setattr(tier.tier, name, broken)
            await tier.open()
            for _ in range(33):  # 11 minutes
                await self.put(tier, 1)
                await tier.exists([key_of(1)])
                await self.get(tier, 1)
                clock.now += STEP
        said = [r.getMessage() for r in caplog.records]
        bugs = [text for text in said if "unexpected error" in text]
        down = [text for text in said if text not in bugs]
        assert len(bugs) <= 2, "once for reads and once for puts"
        assert len(down) == 3, down
        assert len(set(down)) == 1
        assert down[0].startswith("tier cold (redis://***@host) ")
        assert "hunter2" not in caplog.text
        if error is not None:
            assert str(error).partition("@host")[2] in down[0]
        caplog.clear()
        for _ in range(3):
            clock.now += 60
            await self.put(tier, 1)
            await self.get(tier, 1)
        (back,) = [r.getMessage() for r in caplog.records]
        assert re.search(r"^tier cold \(redis://\*\*\*@host\) (is|.* work|takes puts)", back)
        assert re.search(r"(back|again) after \d{3} s$", back)
        assert isinstance(await self.get(tier, 1), bytes)
        await tier.close()

    @pytest.mark.anyio
    async def test_a_tier_that_is_smaller_than_a_chunk(self, ctx, caplog):
        """As TIERLOOM_MEMORY=8 makes one, of eight bytes."""
        limits = SimpleNamespace(timeout=5.0, fails=3, probe=5.0)
        tier = CircuitBreaker(Memory(MemoryOptions(capacity=8), ctx), "hot", limits)
        await tier.open()
        for seed in range(3):
            assert await self.put(tier, seed, seed + 10) == [Lost.NO_ROOM] * 2
        (said,) = [r.getMessage() for r in caplog.records]
        assert said == (
            f"tier hot cannot keep an object of {SIZE} bytes: its capacity is 8 bytes; raise it, "
            "and write it with a unit, as 8 GiB"
        )
        await tier.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password_file /run/secrets/redis_password: No such file or directory", None),
        ("password_file redis_password: No such file or directory; write it", None),
        ("token: Permission denied", None),
        ("redis_password: hunter2", "redis_password: ***"),
        ("password=No", "password=***"),
    ],
)
def test_secrets_are_masked_and_causes_are_not(text, shown):
    assert masked(text) == (shown or text)


def test_what_we_raise_has_no_secret_where_one_is_looked_for():
    """Else its cause or its cure would be masked."""
    texts = []
    for floor in ("stages", "pipeline", "adapters"):
        for path in (ROOT / floor).rglob("*.py"):
            tree = ast.parse(path.read_text())
            raised = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc]
            for node in (n for exc in raised for n in ast.walk(exc)):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "x" for v in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    assert len(texts) > 400, "this test reads nothing"
    assert [text for text in texts if masked(text) != text] == []
