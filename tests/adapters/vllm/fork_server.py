"""Imports vLLM once and forks the processes that run it. Run by the python that has vLLM.

    .venv-vllm/bin/python tests/adapters/vllm/fork_server.py SOCKET_FD

An import takes eight seconds of CPU, a fork some milliseconds. Each message of the socket is one
JSON object: `{"run": ...}` comes with descriptors (stdout, stderr, what else it is handed) and is
answered by the id of the process and a pidfd; `{"reap": pid}` is answered by its exit status.
When the other end of the socket is closed, all that was forked is killed.

Nothing of tierloom is imported here, and no llvmlite: vLLM's CPU worker breaks on it. There must be
no second thread when it forks: it exits if vLLM's import has started one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
from typing import Any

IMPORTED = [
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.metrics.loggers",
    "vllm.v1.metrics.reader",
    "vllm.distributed.kv_transfer.kv_connector.factory",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.llama",
    "vllm.renderers.hf",
]
ORDER = 1 << 20


def serve(control: socket.socket, before: dict[str, str]) -> dict[str, Any] | None:
    """Fork what is asked for. The order, in a process that was forked for it; None at the end."""
    running: set[int] = set()
    while True:
        message, fds, _, _ = socket.recv_fds(control, ORDER, 16)
        if not message:
            break
        order = json.loads(message)
        if "reap" in order:
            running.discard(order["reap"])
            _, status = os.waitpid(order["reap"], 0)
            control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        sys.stdout.flush()
        sys.stderr.flush()
        session, leads = os.pipe()
        pid = os.fork()
        if not pid:
            control.close()
            os.setsid()
            os.close(session)
            os.close(leads)
            become(order, fds, before)
            return order
        running.add(pid)
        os.close(leads)
        os.read(session, 1)  # until it leads a session: then it can be killed with all it starts
        os.close(session)
        alive = os.pidfd_open(pid)
        socket.send_fds(control, [json.dumps(pid).encode()], [alive])
        for fd in (*fds, alive):
            os.close(fd)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def become(order: dict[str, Any], fds: list[int], before: dict[str, str]) -> None:
    """Take the environment, folder, log and arguments of a process that was started afresh.

    `before`: the environment before vLLM's import, which sets variables of its own.
    """
    out, err, *handed = fds
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(order["cwd"])
    for name in before.keys() - order["env"].keys():
        os.environ.pop(name, None)
    os.environ |= {k: v for k, v in order["env"].items() if before.get(k) != v}
    tempfile.tempdir = None  # TMPDIR is another
    sys.argv = [order["run"], *order["arguments"], *map(str, handed)]


def main(fd: int) -> None:
    before = dict(os.environ)
    for name in IMPORTED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1 or "llvmlite" in sys.modules:
        sys.exit(f"fork_server.py: {threads} threads, llvmlite: {'llvmlite' in sys.modules}")
    gc.freeze()  # a collection in a fork would copy all pages
    order = serve(socket.socket(fileno=fd), before)
    if order and order["module"]:
        runpy.run_module(order["run"], run_name="__main__", alter_sys=True)
    elif order:
        runpy.run_path(order["run"], run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]))
