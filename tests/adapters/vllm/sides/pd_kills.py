"""A decoder without a model, and prefillers that are killed or stopped at any moment. Run by vLLM's
Python.

    .venv-vllm/bin/python tests/adapters/vllm/sides/pd_kills.py MODEL KILLS [SEED]

vLLM's scheduler, the connector's sides and the wire are real; each prefiller is a process of its
own. Prints one line of JSON: what was run, and what was wrong.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
PROMPT = 1000
WAIT = 0.5
"""Seconds that the decoder waits after the last bytes."""


def serve_prefills(model: str, pipe: Any, seed: int) -> None:
    """A prefiller: computes what comes, until it is killed."""
    import pd_run
    import sim
    import sim_run
    from sim_stage import Case

    logging.disable(logging.WARNING)
    case = Case(save="layer", order="canonical", blocks=200, decode=False)
    world = sim.World(case, sim_run.config(model, ""), dict(pd_run.PREFILLER), seed)
    pipe.send(world.stages[0].connector.worker.pipelines[0].pipeline.serves_at)
    count = 0
    while True:
        while pipe.poll(0 if world.scheduler.has_requests() else None):
            prompt, kv = pipe.recv()
            world.add(f"k{count}", prompt, 1, kv=pd_run.ASKS | kv)
            count += 1
        world.step()


class Kills:
    """`run` kills one prefiller after another, each with prompts in its hands."""

    def __init__(self, model: str, seed: int) -> None:
        self.model, self.rng, self.count = model, random.Random(seed), 0
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pd_run"])
        self.longest = 0.0
        self.child, self.pipe, self.port = self._start()
        import pd_run
        import sim
        import sim_run
        from sim_stage import Case

        case = Case(order="canonical", blocks=200, decode=False)
        options = pd_run.DECODER | {"handoff.wait": f"{WAIT} s"}
        self.world = sim.World(case, sim_run.config(model, ""), options, seed)
        self.check, self.sim = pd_run.Pair.check, sim

    def _start(self) -> tuple[Any, Any, int]:
        mine, theirs = self.context.Pipe()
        target = (self.model, theirs, self.rng.randrange(1 << 30))
        child = self.context.Process(target=serve_prefills, args=target, daemon=True)
        child.start()
        theirs.close()
        at: str = mine.recv()
        return child, mine, int(at.rpartition(":")[2])

    @property
    def d(self) -> Any:
        return self.world

    def run(self, kills: int) -> None:
        """Raises AssertionError."""
        for _ in range(kills):
            self._round()
        self.settle()

    def _round(self) -> None:
        """Some prompts to a prefiller that ends before they do, or just after."""
        prompts: dict[str, list[int]] = {}
        began = time.monotonic()
        for _ in range(self.rng.randint(1, 4)):
            name = f"t-{self.count}"
            self.count += 1
            length = self.rng.randint(1, PROMPT)
            prompts[name] = [self.rng.randrange(self.sim.VOCAB) for _ in range(length)]
            to = {
                "do_remote_prefill": True, "transfer_id": name, "remote_host": "127.0.0.1",
                "remote_port": self.port,
            }  # fmt: skip
            self.world.add(name, prompts[name], 3, kv=to)
            self.pipe.send((prompts[name], {"transfer_id": name}))
        dies = time.monotonic() + self.rng.choice([0.0, 0.02, 0.1, 0.4]) * self.rng.random()
        how = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        pid = self.child.pid
        while self.world.scheduler.has_requests():
            if pid and time.monotonic() >= dies:
                os.kill(pid, how)
                pid = None
            self.world.step()
            assert time.monotonic() - began < 30, f"still busy: {self.world.report()}"
        self.world.until_idle()
        self.longest = max(self.longest, time.monotonic() - began)
        for name, prompt in prompts.items():
            self.check(self, name, prompt, 3)  # type: ignore[arg-type]
        self.child.kill()
        self.child.join()
        self.pipe.close()
        self.child, self.pipe, self.port = self._start()

    def settle(self) -> None:
        """Within 2 s nothing is held for anybody, but what memory keeps. Raises AssertionError."""
        pipe = self.world.stages[0].connector.worker.pipelines[0].pipeline
        end = time.monotonic() + 2
        while (held := self._held(pipe)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not held, held
        assert not self.world.leaks(), self.world.leaks()

    def _held(self, pipe: Any) -> dict[str, Any]:
        said = pipe.stats()
        spare = pipe.arena.working - pipe.arena.promises.spare
        held = {"landing": said["handoff"]["landing"], "flight": said["arena"]["flight"]}
        return {k: v for k, v in (held | {"promised": spare}).items() if v}

    def files(self) -> int:
        return len(os.listdir("/proc/self/fd"))


def main(model: str, kills: str, seed: str = "0") -> None:
    logging.disable(logging.WARNING)
    began, made, wrong = time.monotonic(), Kills(model, int(seed)), []
    try:
        made.run(2)
        files = made.files()
        made.run(int(kills) - 2)
        end = time.monotonic() + 2
        while made.files() > files and time.monotonic() < end:
            time.sleep(0.1)
        if (more := made.files() - files) > 2:
            wrong.append(f"{more} files more are open than after two kills")
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}"[:1000])
    pipe = made.world.stages[0].connector.worker.pipelines[0].pipeline
    landed = pipe.stats()["handoff"]["landed"]
    made.child.kill()
    print("\nRESULT " + json.dumps({
        "kills": int(kills), "prompts": made.count, "landed": landed, "wrong": wrong,
        "longest": round(made.longest, 2), "seconds": round(time.monotonic() - began, 1),
    }))  # fmt: skip
    made.world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
