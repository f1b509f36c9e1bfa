"""Content ids of LoRA adapters, read by a separate thread: the scheduler's does no I/O."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tierloom.adapters.vllm.exchange.identity import adapter_id


class LoraAdapters:
    """Identifies adapters by their files: a name in vLLM may mean other weights tomorrow."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "tierloom-lora")
        self._known: dict[str, tuple[Any, str]] = {}

    def name(self, lora: Any) -> Future[str]:
        """The id of a LoRARequest's adapter, as a future. The files are checked each time, and
        read again if they have changed; InputError or OSError if there are none."""
        return self._thread.submit(self._name, os.path.expanduser(lora.lora_path))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _name(self, path: str) -> str:
        stamp = _stamp(path)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = (stamp, adapter_id(path))
        return known[1]


def _stamp(path: str) -> list[tuple[str, int, int]]:
    """Changes when a file of the folder does; empty if the path is not a folder here."""
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as files:
        stats = [(f.name, f.stat()) for f in files if f.is_file()]
    return sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats)
