"""A forked process of vLLM is what one from a new interpreter would be, and ends with the tests."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import driver_process
import launch
import pytest

SAYS = """
import json, os, sys, tempfile
print(json.dumps({
    "vllm": "vllm" in sys.modules, "arguments": sys.argv[1:], "name": __name__, "file": __file__,
    "mark": os.environ.get("TIERLOOM_MARK"), "home": os.environ["HOME"],
    "temp": tempfile.gettempdir(), "leads": os.getsid(0) == os.getpid(),
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""
SLEEPS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.write(int(sys.argv[1]), b"%d" % child.pid)
time.sleep(600)
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def said(path: Path, **env: str) -> dict[str, Any]:
    run = launch.finish(written(path, SAYS), "a", "b c", timeout=300, **env)
    assert (run.returncode, run.stderr.strip().splitlines()[-1]) == (7, "to stderr")
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize("forked", [True, False])
def test_a_script_finds_what_it_was_started_with(tmp_path: Path, forked: bool) -> None:
    """What vLLM's import may have read, as HF_HOME, is another's: then it is imported again."""
    script, home = tmp_path / "says.py", str(tmp_path)
    early = {} if forked else {"HF_HOME": home}
    answer = said(script, TIERLOOM_MARK="here", TMPDIR=home, HOME=home, **early)
    assert answer == {
        "vllm": forked, "arguments": ["a", "b c"], "name": "__main__", "file": str(script),
        "mark": "here", "home": home, "temp": home, "leads": True,
    }  # fmt: skip
    again = said(script, **early)
    assert (again["mark"], again["home"]) == (None, os.environ["HOME"])


def started(tmp_path: Path, server: launch.ForkServer) -> tuple[launch.Forked, int]:
    """A process that sleeps, and the id of another that it has started."""
    script = written(tmp_path / "sleeps.py", SLEEPS)
    read, write = os.pipe()
    order = {"run": str(script), "module": False, "arguments": [], "cwd": str(tmp_path)}
    try:
        child = server.fork(
            order | {"env": launch.environment()}, [sys.stderr.fileno(), sys.stderr.fileno(), write]
        )
        return child, int(os.read(read, 100))
    finally:
        os.close(read)
        os.close(write)


def test_all_of_it_ends(tmp_path: Path) -> None:
    """When it is killed, and when whoever runs the tests is gone."""
    server = launch.ForkServer()
    first, second = started(tmp_path, server), started(tmp_path, server)
    watched = [os.pidfd_open(pid) for _, pid in (first, second)]
    with pytest.raises(subprocess.TimeoutExpired):
        first[0].wait(0)
    assert first[0].poll() is None
    driver_process.end_group(first[0])
    assert first[0].poll() == -9
    assert select.select([watched[0]], [], [], 10)[0]
    server.close()
    for gone in (second[0]._alive, watched[1]):
        assert select.select([gone], [], [], 10)[0]
        os.close(gone)
    os.close(watched[0])
