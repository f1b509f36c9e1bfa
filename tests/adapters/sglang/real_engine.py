"""Processes with a real SGLang in them, and what tests say to them.

Nothing here imports SGLang: it lives in `.venv-sglang`, beyond `engine.py`. It runs on the CPU,
with `cpu_engine/` in place of what needs a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Any

import driver_process
from driver_process import DriverProcess, EngineError
from processes import die_with_parent, free_port

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-sglang"
PYTHON = VENV / "bin" / "python"
DRIVER = Path(__file__).with_name("engine.py")

PAGE = 32
START = 400.0
"""Seconds that an engine may take to start: three processes import SGLang, on busy cores."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "src"),  # this checkout's, whichever is installed
    "PYTHONSAFEPATH": "1",  # the checkout and this folder must not pass for packages
    "SGLANG_USE_CPU_ENGINE": "1",
}
MODELS = {"llama"}
"""The modules of SGLang with the models of the tests."""

_OURS = ("TIERLOOM_", "SGLANG_", "PYTHONDONTWRITEBYTECODE")
_SURROUNDINGS = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}


def why_not() -> str | None:
    """Why there is no SGLang to test with, or None."""
    return driver_process.why_not(VENV)


def environment(**more: str) -> dict[str, str]:
    """What a process with SGLang is to see of the environment."""
    return _SURROUNDINGS | ENVIRONMENT | {"SGLANG_DISABLED_MODEL_ARCHS": _not_wanted()} | more


def _not_wanted() -> str:
    """SGLang's modules of models that no test needs: it would import them all at its start."""
    files = VENV.glob("lib/python*/site-packages/sglang/srt/models/*.py")
    return ",".join(sorted({file.stem for file in files} - MODELS - {"__init__", "registry"}))


def prompt(length: int, seed: int = 1, vocab: int = 512) -> list[int]:
    """Random token ids, the same for the same `seed`; a longer one begins with a shorter one."""
    random_ = random.Random(seed)
    return [random_.randrange(3, vocab) for _ in range(length)]


def hicache(
    extra: dict[str, Any] | None, *, layout: str = "layer_first", policy: str = "wait_complete",
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Server arguments for HiCache with the dynamic backend of `extra`; None: host memory alone."""
    storage = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_prefetch_policy": policy,
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }
    return {
        "enable_hierarchical_cache": True,
        "hicache_size": 0,
        "hicache_ratio": 2.0,
        "hicache_write_policy": "write_through",
        "hicache_io_backend": "direct",
        "hicache_mem_layout": layout,
        **(storage if extra is not None else {}),
        **options,
    }


def linker(name: str, module: str, extra: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Server arguments for the cache linker `module.name`."""
    config = {"linker": name, "linker_module_path": module, "linker_extra_config": extra}
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": config,
        **options,
    }


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came out of one request; `cached` tokens of its prompt were not computed."""

    ids: list[int]
    cached: int
    details: dict[str, Any] | None
    logprobs: list[float]
    seconds: float
    reason: str | None


class Engine:
    """A process that runs one engine after another, and the engine that runs in it now.

    `use` is cheap when what is asked for is running already, so tests of one engine stand together.
    """

    def __init__(self, folder: Path, name: str = "engine") -> None:
        self._folder, self._name = folder, name
        self._process: DriverProcess | None = None
        self._surroundings: dict[str, str] = {}
        self._using = ""
        self._count = 0
        self._pid: int | None = None
        self.log = folder / "none.log"

    def use(
        self, model: Path | str, *, env: dict[str, str] | None = None, fresh: bool = False,
        **options: Any,
    ) -> Engine:  # fmt: skip
        """Have an engine of `model` running; `options` are SGLang's server arguments.

        `fresh`: start it again. Of `env` what is not tierloom's is read when SGLang is imported.
        """
        options = {"model_path": str(model), **options}
        wanted = json.dumps([options, env], sort_keys=True)
        if wanted == self._using and not fresh:
            return self
        self.stop()
        late = {k: v for k, v in (env or {}).items() if k.startswith("TIERLOOM_")}
        process = self._importing({k: v for k, v in (env or {}).items() if k not in late})
        self._count += 1
        self.log = process.log = self._folder / f"{self._name}-{self._count}.log"
        how = {"log": str(self.log), "env": late, "port": free_port(), **options}
        try:
            self._pid = process.ask("start", timeout=START, **how)["pid"]
        except EngineError:
            self.end()
            raise
        self._using = wanted
        return self

    def _importing(self, surroundings: dict[str, str]) -> DriverProcess:
        """The process that has imported SGLang in these surroundings, or will."""
        if self._process and self._process.alive and surroundings == self._surroundings:
            return self._process
        self.end()

        def begin(folder: str, out: IO[Any], fds: tuple[int, int]) -> Any:
            return subprocess.Popen(
                ["nice", str(PYTHON), str(DRIVER), *map(str, fds)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=fds,
                cwd=folder, env=environment(TMPDIR=folder, **surroundings),
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

        self._surroundings = surroundings
        self._process = DriverProcess(self._folder / f"{self._name}-import.log", begin)
        return self._process

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process is not None, "no engine is running"
        return self._process.ask(do, **arguments)

    def generate(self, *prompts: list[int] | dict[str, Any], **common: Any) -> list[Answer]:
        """All at once; a prompt is a list of token ids or a request of `Driver.generate`."""
        requests = [common | (p if isinstance(p, dict) else {"tokens": p}) for p in prompts]
        return [Answer(**answer) for answer in self.ask("generate", requests=requests)]

    def one(self, tokens: list[int], **common: Any) -> Answer:
        """`max_tokens=8`, `cache_salt`, `extra_key`; `max_tokens=1` times the first token."""
        return self.generate(tokens, **common)[0]

    def flush(self) -> None:
        """Empty SGLang's own caches of device and host; what a backend keeps stays."""
        self.ask("flush")

    def attach(self, extra: dict[str, Any]) -> None:
        self._when_idle("attach", extra=extra)

    def detach(self) -> None:
        self._when_idle("detach")

    def _when_idle(self, do: str, **arguments: Any) -> None:
        """SGLang refuses while anything of a request that was answered is still under way."""
        for _ in range(200):
            said = self.ask(do, **arguments)
            if said["success"] or "not idle" not in said["message"]:
                break
            time.sleep(0.05)
        assert said["success"], said["message"]

    def clear(self) -> None:
        """Empty the storage backend."""
        said = self.ask("clear")
        assert said["success"], said["message"]

    @property
    def pid(self) -> int:
        """The engine's process, which leads a group of its own."""
        assert self._pid is not None, "no engine is running"
        return self._pid

    def log_text(self) -> str:
        """What the engine and its processes have written so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """End the engine in good order, if there is one; what has imported SGLang stays."""
        if self._pid is not None:
            self._forget()
            try:
                self.ask("shutdown")
            except EngineError:
                self.end()

    def kill(self) -> None:
        """End it with all its processes, as a power cut would."""
        if self._pid is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._forget()
            try:
                self._process.answer("kill", 10)
            except EngineError:  # as it is to be: its parent says that it has ended
                return

    def close(self) -> None:
        """The session is over."""
        self.stop()
        self.end()

    def end(self) -> None:
        """Leave nothing of it, whatever state it is in."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
        self._forget()
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _forget(self) -> None:
        self._pid, self._using = None, ""
