"""A real SGLang engine at the other end of two pipes. Run by the python that has SGLang.

    .venv-sglang/bin/python tests/adapters/sglang/engine.py READ_FD WRITE_FD

One JSON object a line, as `tests/adapters/driver_process.py` describes. Pipes of their own,
since SGLang writes to stdout as it likes. What can be done are the methods of `Driver` without an
underscore.

SGLang is imported once, which takes ten seconds of CPU. Each engine has a process that is forked
from that one, and lives until `shutdown` or until it is killed; one that ended otherwise is
answered for by its parent. SGLang's own processes are forked from the engine's: SGLang spawns them,
for CUDA's sake, and each would import all of it again. That is the only difference.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "page_size": 32,
    "max_total_tokens": 8192,
    "mem_fraction_static": 0.2,
    "skip_tokenizer_init": True,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "enable_cache_report": True,
    "random_seed": 1,
    "log_level": "warning",
}


class Driver:
    """At most one engine, and what is asked of it."""

    def __init__(self) -> None:
        self._engine: Any = None

    def start(self, **options: Any) -> dict[str, Any]:
        """Start an engine; `options` are SGLang's server arguments, over `DEFAULTS`."""
        assert self._engine is None, "this process has had its engine"
        from sglang.srt.entrypoints.engine import Engine

        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.set_start_method = lambda *_, **__: None
        begun = time.perf_counter()
        self._engine = Engine(**{**DEFAULTS, **options})
        return {"pid": os.getpid(), "seconds": time.perf_counter() - begun}

    def generate(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All of `requests` at once; what came out of each, in order.

        A request: `tokens`, `max_tokens`, and what else SGLang's `GenerateReqInput` takes.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        common: dict[str, list[Any]] = {}
        for name in {name for request in requests for name in request}:
            common[name] = [request.get(name) for request in requests]
        greedy = [
            {"temperature": 0, "max_new_tokens": count or 8, "ignore_eos": True}
            for count in common.pop("max_tokens", [None] * len(requests))
        ]
        asked = GenerateReqInput(
            input_ids=common.pop("tokens"), sampling_params=greedy, return_logprob=True, **common
        )
        begun = time.perf_counter()
        answers = self._await(self._engine.tokenizer_manager.generate_request(asked).__anext__())
        seconds = time.perf_counter() - begun
        return [_result(answer) | {"seconds": seconds} for answer in answers]

    def flush(self, patience: float = 30.0) -> float:
        """Empty SGLang's own caches of device and host; the seconds until it was idle enough to."""
        begun = time.perf_counter()
        while not self._await(self._engine.tokenizer_manager.flush_cache()).success:
            assert time.perf_counter() - begun < patience, "SGLang does not become idle"
            time.sleep(0.1)
        return time.perf_counter() - begun

    def attach(
        self, extra: dict[str, Any], policy: str = "wait_complete", backend: str = "dynamic"
    ) -> dict[str, Any]:
        """What the HTTP route does that attaches a HiCache storage backend."""
        return self._said(
            self._engine.tokenizer_manager.attach_hicache_storage(
                backend, json.dumps(extra), hicache_storage_prefetch_policy=policy
            )
        )

    def detach(self) -> dict[str, Any]:
        return self._said(self._engine.tokenizer_manager.detach_hicache_storage())

    def clear(self) -> dict[str, Any]:
        """Empty the storage backend."""
        return self._said(self._engine.tokenizer_manager.clear_hicache_storage())

    def shutdown(self) -> None:
        """End the engine as SGLang's own users do."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _said(self, call: Any) -> dict[str, Any]:
        out = self._await(call)
        return {"success": bool(out.success), "message": str(getattr(out, "message", ""))}

    def _await(self, call: Any) -> Any:
        return self._engine.loop.run_until_complete(call)


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    return {
        "ids": list(answer["output_ids"]),
        "cached": meta["cached_tokens"],
        "details": meta.get("cached_tokens_details"),
        "logprobs": [float(one[0]) for one in meta["output_token_logprobs"]],
        "reason": (meta.get("finish_reason") or {}).get("type"),
    }


class Pipes:
    """Commands that come in, and answers that go out."""

    def __init__(self, read: int, write: int) -> None:
        self._in, self._out = os.fdopen(read), os.fdopen(write, "w")

    def next(self) -> dict[str, Any] | None:
        line = self._in.readline()
        return json.loads(line) if line else None

    def answer(self, **what: Any) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def serve(pipes: Pipes, command: dict[str, Any] | None) -> None:
    """Run a `Driver` from its `start` to its `shutdown`, or to the end of all commands."""
    driver = Driver()
    while command is not None:
        do = command.pop("do")
        try:
            pipes.answer(ok=getattr(driver, do)(**command))
        except Exception:  # whatever it is, the test is told
            error = traceback.format_exc()
            print(error, file=sys.stderr, flush=True)
            pipes.answer(error=error)
        if do == "shutdown":
            return
        command = pipes.next()
    driver.shutdown()


def become(log: str, env: dict[str, str]) -> None:
    """Take the log and the environment of an engine; be killed when the parent is."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setpgid(0, 0)  # so that it can be killed with what it starts, and without the parent
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.environ |= env
    tempfile.tempdir = None  # TMPDIR is another


def main(read: int, write: int) -> None:
    for fd in (read, write):
        os.set_inheritable(fd, False)
    pipes = Pipes(read, write)
    while (command := pipes.next()) is not None:
        if command["do"] != "start":
            pipes.answer(error="no engine is running")
            continue
        import sglang.srt.entrypoints.engine
        import sglang.srt.models.llama  # noqa: F401

        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"SGLang's import has left {threads} threads: it cannot be forked"
        child = os.fork()
        if not child:
            become(command.pop("log"), command.pop("env"))
            status = 1
            try:
                serve(pipes, command)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            pipes.answer(error=f"the engine's process has ended: {status}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
