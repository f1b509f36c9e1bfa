"""A real SGLang engine at the other end of two pipes. Run by the python that has SGLang.

    .venv-sglang/bin/python tests/adapters/sglang/engine.py READ_FD WRITE_FD

One JSON object a line, as `tests/adapters/vllm/driver_process.py` describes. Pipes of their own,
since SGLang writes to stdout as it likes. What can be done are the methods of `Driver` without an
underscore. An engine is started once in a process: its end takes all child processes with it.
"""

from __future__ import annotations

import json
import os
import sys
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

    def start(self, **options: Any) -> dict[str, float]:
        """Start an engine; `options` are SGLang's server arguments, over `DEFAULTS`."""
        assert self._engine is None, "this process has had its engine"
        begun = time.perf_counter()
        from sglang.srt.entrypoints.engine import Engine

        imported = time.perf_counter()
        self._engine = Engine(**{**DEFAULTS, **options})
        return {"import_s": imported - begun, "start_s": time.perf_counter() - imported}

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


def main(read: int, write: int) -> None:
    for fd in (read, write):
        os.set_inheritable(fd, False)  # SGLang's own processes would keep the pipe open
    driver = Driver()
    with os.fdopen(read) as commands, os.fdopen(write, "w") as answers:
        for line in commands:
            command = json.loads(line)
            try:
                answer = {"ok": getattr(driver, command.pop("do"))(**command)}
            except Exception:  # whatever it is, the test is told
                answer = {"error": traceback.format_exc()}
                print(answer["error"], file=sys.stderr, flush=True)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    driver.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
