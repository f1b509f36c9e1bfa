"""The engine's HTTP door, beside the scheduler. Each worker is asked for its figures by its socket,
so that an idle engine answers as well, and no step carries anything for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from tierloom.adapters.door.engine_door import open_engine_door
from tierloom.adapters.door.http_door import HttpDoor
from tierloom.adapters.vllm.exchange.reset_socket import address, ask
from tierloom.adapters.vllm.exchange.settings import Configured
from tierloom.pipeline.admin.admin_bodies import body_of

_WAIT = 1.0
"""Seconds that a worker may take to answer."""
_ORDER = 600.0
"""The same for what it is to do."""


def open_workers_door(vllm_config: Any, conf: Configured) -> HttpDoor | None:
    """Where `tierloom.http` says. None: its port is another's. Raises ConfigError."""
    workers = range(vllm_config.parallel_config.world_size)
    sockets = [address(vllm_config, worker) for worker in workers]

    async def read() -> dict[str, Any]:
        asked = (_asked(i, at, {"figures": True}, _WAIT) for i, at in enumerate(sockets))
        said = await asyncio.gather(*asked)
        return {name: part for parts in said for name, part in parts.items()}

    async def act(order: str, said: Mapping[str, Any], id: str) -> dict[str, Any]:
        body_of(order, said)  # so that what is wrong is told as that
        question = {"order": order, "said": dict(said), "id": id}
        seconds = _ORDER if order != "progress" else _WAIT
        told = [_asked(i, at, question, seconds) for i, at in enumerate(sockets)]
        return {name: part for parts in await asyncio.gather(*told) for name, part in parts.items()}

    return open_engine_door(conf.settings.http, conf.pipeline(), read, act)


async def _asked(worker: int, at: str, question: dict[str, Any], seconds: float) -> dict[str, Any]:
    """By pipeline: `0`, and where a model has several groups, `0.1` and so on."""
    loop = asyncio.get_running_loop()
    try:
        said = await loop.run_in_executor(None, partial(ask, at, question, seconds))
    except (OSError, ValueError):
        return {str(worker): {"error": f"worker {worker} does not answer"}}
    if "error" in said or not said:
        why = "failed to answer; its log says how" if said else "keeps nothing; its log says why"
        return {str(worker): {"error": f"worker {worker} {why}"}}
    return {str(worker) if not i else f"{worker}.{g}": said[g] for i, g in enumerate(said)}
