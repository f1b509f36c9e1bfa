"""Processes with a real vLLM in them, and what tests say to them.

Nothing here imports vLLM: it lives in `.venv-vllm`, behind `engine.py`.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import IO, Any

import driver_process
from driver_process import DriverProcess, EngineError
from launch import VENV, environment, start

DRIVER = Path(__file__).with_name("engine.py")

BLOCK = 32


def why_not() -> str | None:
    """Why there is no vLLM to test with, or None."""
    return driver_process.why_not(VENV)


def prompt(length: int, seed: int = 1, vocab: int = 512) -> list[int]:
    """Random token ids, the same for the same `seed`; a longer one begins with a shorter one."""
    random_ = random.Random(seed)
    return [random_.randrange(3, vocab) for _ in range(length)]


SIZES = {"budget.arena": "32 MiB", "tiers.hot.capacity": "64 MiB"}
PATIENT = {
    "graphs.store.deadline": "30 s",
    "graphs.retrieve.deadline": "30 s",
    "graphs.retrieve.stages.plan.worth": "always",  # a model this small is quicker than any cache
}
"""A hit must not depend on how quick the machine is."""


def transfer(config: Any = "minimal", **options: Any) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` with our connector; `options` are keys of its extra config.

    Sizes are a test's: the presets would take gigabytes.
    """
    extra: dict[str, Any] = {"tierloom.wait": "20 s", "tierloom.hold": "20 s"}
    if isinstance(config, str):  # an inline mapping says by itself what it wants
        extra |= SIZES | PATIENT
    if config == "tiered":
        extra |= {"tiers.warm.capacity": "256 MiB", "tiers.warm.segment": "32 MiB"}
    extra["tierloom.config"] = config
    return {
        "kv_connector": "TierloomConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra | options,
    }


def disk(folder: Path) -> dict[str, Any]:
    """A disk tier for `pipeline`; small segments, for these are preallocated."""
    return {"use": "disk", "path": str(folder), "capacity": "256 MiB", "segment": "32 MiB"}


def pipeline(**tiers: dict[str, Any]) -> dict[str, Any]:
    """A configuration of `tiers`: stored to all of them, looked up in that order."""
    store = ["hash", "lookup", "gather", "to_host"]
    retrieve = ["hash", "lookup", "get", "decode", "scatter"]
    steps: dict[str, Any] = {
        "store": {use: {"use": use} for use in store},
        "retrieve": {use: {"use": use} for use in retrieve},
    }
    steps["store"]["lookup"]["want"] = "absent"
    steps["retrieve"]["lookup"]["worth"] = "always"
    for name in tiers:
        steps["store"][f"to_{name}"] = {"use": "put", "tier": name, "when_full": "block"}
    return {
        "version": 1,
        "name": "test",
        "budget": {"arena": "32 MiB"},
        "tiers": tiers,
        "graphs": {
            "store": {"deadline": "30 s", "stages": steps["store"]},
            "retrieve": {"deadline": "30 s", "stages": steps["retrieve"]},
        },
    }


class Process(DriverProcess):
    """One process of `engine.py`."""

    def __init__(self, log: Path, **env: str) -> None:
        def begin(folder: str, out: IO[Any], fds: tuple[int, int]) -> Any:
            surroundings = environment(TMPDIR=folder, **env)
            return start(DRIVER, env=surroundings, out=out, err=out, cwd=log.parent, fds=fds)

        super().__init__(log, begin)


class Engine:
    """A process that runs one engine after another, and the engine that runs in it now.

    `use` is cheap when what is asked for is running already, so tests of one engine stand together.
    """

    def __init__(self, folder: Path, name: str = "engine") -> None:
        self._folder, self._name = folder, name
        self._process: Process | None = None
        self._using: Any = None
        self._count = 0
        self.log = folder / "none.log"

    def use(
        self,
        model: Path | str,
        kv: dict[str, Any] | None = None,
        *,
        env: dict[str, str] | None = None,
        fresh: bool = False,
        **options: Any,
    ) -> Engine:
        """Have an engine of `model` with the connector `kv` running.

        `fresh`: start it again, in a new process; so does a change of `env`.
        """
        options = {"model": str(model), "kv_transfer_config": kv, **options}
        wanted = json.dumps([options, env], sort_keys=True)
        if wanted == self._using and self._process and self._process.alive and not fresh:
            return self
        if self._process and (fresh or env or json.loads(self._using or "[0, 0]")[1]):
            self.close()
        self._using = None
        if self._process is None or not self._process.alive:
            self._count += 1
            self.log = self._folder / f"{self._name}-{self._count}.log"
            self._process = Process(self.log, **(env or {}))
        try:
            self._process.ask("stop")
            self._process.ask("start", **options)
        except EngineError:
            self.kill()
            raise
        self._using = wanted
        return self

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process is not None, "no engine is running"
        return self._process.ask(do, **arguments)

    def generate(self, *prompts: list[int] | dict[str, Any], **common: Any) -> list[Any]:
        """All at once; a prompt is a list of token ids or keyword arguments of `Driver.add`."""
        requests = [common | (p if isinstance(p, dict) else {"tokens": p}) for p in prompts]
        return [Answer(**answer) for answer in self.ask("generate", requests=requests)]

    def one(self, tokens: list[int], **common: Any) -> Answer:
        return self.generate(tokens, **common)[0]

    def add(self, tokens: list[int], **options: Any) -> str:
        return str(self.ask("add", tokens=tokens, **options))

    def finish(self, *names: str) -> list[Answer]:
        return [Answer(**a) for a in self.ask("finish", names=list(names) or None)]

    def forget(self, connector: bool = False) -> None:
        """Empty vLLM's own prefix cache, and with `connector` what tierloom keeps, too."""
        for _ in range(50):  # vLLM refuses while blocks of a finished request are still held
            if self.ask("reset", connector=connector):
                return
            time.sleep(0.1)
        raise AssertionError("vLLM does not empty its prefix cache: blocks are held")

    def log_text(self) -> str:
        """What the process has written so far."""
        return self.log.read_text(errors="replace")

    def settle(self) -> dict[str, Any]:
        """Wait until what is being stored is stored; fails when something is still held then."""
        state: dict[str, Any] = self.ask("settle")
        left = held(state)
        assert not left, f"still held when idle: {left}"
        return state

    def stop(self) -> None:
        """End the engine in good order (its disk folder is free then); the process stays."""
        self._using = None
        if self._process and self._process.alive:
            self._process.ask("stop")

    def close(self) -> None:
        self._using = None
        if self._process:
            self._process.close()
        self._process = None

    def kill(self) -> None:
        self._using = None
        if self._process:
            self._process.kill()
        self._process = None


class Answer:
    """What came out of one request."""

    def __init__(self, ids: list[int], cached: int, reason: str, **rest: Any) -> None:
        self.ids, self.cached, self.reason = ids, cached, reason
        self.kv: dict[str, Any] | None = rest.get("kv")
        self.ttft_s: float | None = rest.get("ttft_s")
        self.ttft_cpu_s: float | None = rest.get("ttft_cpu_s")

    def __repr__(self) -> str:
        return f"Answer({self.ids}, cached={self.cached}, {self.reason})"


HELD = {
    "workers": ("flight", "open", "loads", "stores", "held", "asked", "broken"),
    "scheduler": ("requests", "jobs", "broken"),
}
"""What a connector's report has of things under way; `broken`: hooks that have raised."""


def _some(value: Any) -> bool:
    """Names, or a number above 0. Tiers in memory share leases, so what is theirs counts double."""
    return value > 0 if isinstance(value, int) else bool(value)


def held(state: dict[str, Any]) -> dict[str, Any]:
    """What of `Driver.state()` is there although the engine is idle."""
    found = {}
    for side, what in HELD.items():
        reports = state.get(side, {})
        for i, report in enumerate(reports if isinstance(reports, list) else [reports]):
            for j, one in enumerate(report.get("children", [report])):
                found |= {f"{side}[{i}][{j}].{w}": one[w] for w in what if _some(one.get(w))}
    if state.get("unfinished"):
        found["unfinished"] = state["unfinished"]
    if state.get("free_blocks") != state.get("blocks"):
        found["blocks"] = state["blocks"] - state["free_blocks"]
    return found
