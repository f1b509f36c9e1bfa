"""gds: kvikio has an environment of its own, and a driver without a device; its suite is there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
from processes import missing

from tierloom.stages.errors import BadObject, ConfigError, TierDown
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.files.gds import Gds, GdsOptions, KvikioFileIO

ROOT = Path(__file__).resolve().parents[4]
PYTHON = ROOT / ".venv-gds" / "bin" / "python"
DRIVER = ROOT / ".venv-gds" / "driver"


def run(*command: str, driver: bool = True) -> subprocess.CompletedProcess[str]:
    """Something in kvikio's environment; without a driver nothing of CUDA's is found."""
    if not (DRIVER / "libcuda.so.1").exists():
        missing("gds", "there is no kvikio with a driver")
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "KVIKIO_COMPAT_MODE": "ON"}
    env["LD_LIBRARY_PATH"] = str(DRIVER) if driver else ""
    return subprocess.run(
        [str(PYTHON), *command], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT
    )


PARTS = ("sharing", "damage", "given_up")  # it has no server that could fail
SUITES = {
    "contract": (["tests/stages/tiers/gds_contract.py"], 40),
    "pipelines": (
        [*(f"tests/pipeline/remote/test_remote_{part}.py" for part in PARTS), "-k", "gds"], 11,
    ),
}  # fmt: skip


@pytest.mark.server
@pytest.mark.timeout(300)
@pytest.mark.parametrize("suite", list(SUITES))
def test_its_suite(suite: str) -> None:
    files, least = SUITES[suite]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= least


def test_no_driver() -> None:
    code = (
        "from tierloom.stages.tiers.files.gds import GdsOptions, KvikioFileIO\n"
        "KvikioFileIO(GdsOptions(path='x')).start()"
    )
    done = run("-c", code, driver=False)
    assert "needs NVIDIA's driver, libcuda.so.1" in done.stderr


def test_no_client(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)

    async def pool(fn, *args, leases=()):
        return fn(*args)

    arena = Arena(4096, huge_pages=False)
    tier = Gds(GdsOptions(path=str(tmp_path)), TierContext(arena, b"n" * 32, pool))
    with pytest.raises(ConfigError, match=r"pip install 'tierloom\[gds\]'"):
        anyio.run(tier.open)
    arena.close()


@pytest.mark.parametrize("options", [{"threads": 0}, {"task": 100}, {"path": ""}, {"depth": 0}])
def test_bad_options(options) -> None:
    with pytest.raises(ValueError):
        GdsOptions(**({"path": "/x"} | options))


class File:
    """A CuFile whose requests end one by one, some of them badly."""

    def __init__(self, *ends) -> None:
        self.ends = list(ends)
        self.asked: list[tuple[int, int, int]] = []
        self.ended = 0

    def pread(self, buffer, size, offset, task_size):
        assert size == len(buffer) == task_size, "one task each"
        self.asked.append((buffer.ctypes.data, size, offset))
        end = self.ends[len(self.asked) - 1]
        if end == "not begun":
            raise RuntimeError("queue is gone")
        return SimpleNamespace(get=lambda: self._get(end, size))

    def _get(self, end, size):
        self.ended += 1
        if end == "fails":
            raise RuntimeError("I/O error")
        return size - (end == "short")


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ("comes comes comes", None),
        ("fails comes comes", TierDown),
        ("comes fails fails", TierDown),
        ("comes comes short", BadObject),
        ("comes comes not_begun", TierDown),
    ],
)
def test_no_request_is_left_at_the_memory(ends, error) -> None:
    """One that fails leaves others under way, which read into the same lease."""
    file_io = KvikioFileIO(GdsOptions(path="x", task=4096))
    file = file_io._files[7] = File(*[end.replace("_", " ") for end in ends.split()])
    into = memoryview(bytearray(10_000))
    with pytest.raises(error) if error else contextlib.nullcontext():
        file_io.read(7, into, 100)
    start = file.asked[0][0]
    assert file.asked == [(start + n, min(4096, 10_000 - n), 100 + n) for n in (0, 4096, 8192)]
    assert file.ended == len(file.asked) - ("not_begun" in ends)
