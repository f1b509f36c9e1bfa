"""An engine that is killed and started again, over and over, while another asks it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, settle, tokens
from processes import die_with_parent, free_port

if TYPE_CHECKING:
    from conftest import Open

RESTARTS = int(os.environ.get("TIERLOOM_RESTARTS", "200"))
IDS = tokens(192, seed=1)


def taken() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


class Asking(threading.Thread):
    """Retrieves one prompt again and again, and compares whatever comes."""

    def __init__(self, pipe: Any, rig: Engine) -> None:
        super().__init__(daemon=True)
        self._pipe, self._rig, self._at = pipe, rig, rig.slots(len(IDS))
        self._right = rig.rows(self._at)
        self.ends, self.wrong, self.found, self.asked = False, 0, 0.0, 0
        """`found`: when all of the prompt came last."""

    def run(self) -> None:
        target = self._rig.blank()
        while not self.ends:
            time.sleep(0.002)
            self.asked += 1
            n = self._pipe.retrieve(IDS, target.caches, self._at).wait(30).tokens
            came = target.rows(self._at)[:, :, :n]
            self.wrong += not torch.equal(came, self._right[:, :, :n])
            if n == len(IDS):
                self.found = time.monotonic()


class Forked:
    """The holder, of which each life is a process of its own at the same port."""

    def __init__(self, folder: Path) -> None:
        listen = f"127.0.0.1:{free_port()}"
        source = config(serve={"tiers": ["hot"], "listen": listen})
        with (folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("forked_holder.py"))], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=os.environ | {"PYTHONSAFEPATH": "1"}, preexec_fn=die_with_parent,
            )  # fmt: skip
        self._say(source)
        self.url = f"tierloom://{listen}"
        self.start()

    def start(self) -> None:
        assert self._ask(start=1) == [self.url, len(IDS)]

    def kill(self) -> None:
        assert self._ask(kill=True)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def _ask(self, **what: Any) -> Any:
        assert self._process.stdout is not None
        self._say(what)
        return json.loads(self._process.stdout.readline())

    def _say(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_holder_that_is_restarted_again_and_again(opened: Open, tmp_path: Path) -> None:
    with contextlib.closing(Forked(tmp_path)) as holder:
        source = config(
            tiers__near={"use": "peer", "directory": [holder.url], "timeout": "200 ms"},
            graphs__retrieve__stages__plan={"use": "lookup", "tiers": ["near"]},
        )
        rig = Engine()
        pipe = opened(source, rig)
        asking = Asking(pipe, rig)
        asking.start()
        seconds, counts = [], []
        for _ in range(RESTARTS):
            seconds.append(back_after(holder, asking))
            counts.append(taken())
        asking.ends = True
        asking.join(60)
    seconds.sort()
    p50, p99 = statistics.median(seconds), seconds[int(0.99 * RESTARTS)]
    print(f"\n{RESTARTS} restarts, {asking.asked} retrieves: all of the prompt found again after")
    print(f"{p50:.3f} s (p50), {p99:.3f} s (p99), {seconds[-1]:.3f} s at most; descriptors and")
    print(f"threads {counts[0]} after the first, {counts[-1]} at the end")
    assert asking.wrong == 0
    assert pipe.stats()["tiers"]["near"]["restarts"] == RESTARTS
    for left in zip(*counts, strict=True):  # a probe may be under way
        assert min(left[-8:]) <= min(left[:8]), counts
    settle(pipe)


def back_after(holder: Forked, asking: Asking) -> float:
    """Kill and start it; seconds from when it serves and has the prompt until all of that comes."""
    time.sleep(random.Random().uniform(0, 0.02))
    holder.kill()
    holder.start()
    served = time.monotonic()
    while asking.found < served:
        assert time.monotonic() < served + 60
        time.sleep(0.001)
    return asking.found - served
