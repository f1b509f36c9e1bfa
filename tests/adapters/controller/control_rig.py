"""Engines that tell a directory what they have, and a controller over it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import store_server
import torch
from door_rig import CHUNK, HOT, config
from servers import redis

import tierloom
from tierloom.adapters.controller.run_control import ControlDoor, ControlOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class FleetRig:
    """One controller; engines are opened as they are needed."""

    def __init__(self, directory: str, stack: contextlib.ExitStack, **options: Any) -> None:
        self.directory, self._stack = directory, stack
        said = ControlOptions(directory=directory, port=0, timeout=5.0, **options)
        self.door = stack.enter_context(ControlDoor(said).start())
        self.caches = [torch.randn(2, 40, 16, 2, 8).to(torch.bfloat16) for _ in range(4)]

    def engine(
        self, name: str, *, model: str = "m", door: bool = False, tiers: Any = None,
        layout: Any = None, reads: bool = False, **identity: Any,
    ) -> tierloom.Pipeline:  # fmt: skip
        """`reads`: what others keep, too."""
        source = config(**(tiers or {"hot": HOT}))
        if reads:
            near = {"use": "peer", "directory": [self.directory], "timeout": "5 s"}
            source["tiers"] = source["tiers"] | {"near": near}
            source["graphs"]["store"]["stages"]["fresh"]["tiers"] = ["hot"]
        serve = {"tiers": list(tiers or {"hot": HOT}), "directory": self.directory}
        source["serve"] = serve | {"instance": name}
        layout = layout or tierloom.KVLayout.from_tensors(self.caches, order="2BNHD")
        pipe = tierloom.open(source, layout=layout, model=model, **identity)
        self._stack.callback(pipe.close)
        if door:
            self._stack.enter_context(tierloom.serve_http(pipe))
        return pipe

    def store(self, pipe: tierloom.Pipeline, ids: Any, **names: Any) -> None:
        assert pipe.store(ids, self.caches, np.arange(len(ids)), **names).wait().tokens == len(ids)

    def ask(self, path: str, body: Any = None) -> Any:
        said = self.raw(path, body)
        assert said.status_code == 200, said.text
        return said.json()

    def raw(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        method = "GET" if body is None else "POST"
        return httpx.request(
            method, self.door.url + path, json=body, timeout=20, trust_env=False, **more
        )

    def tokens(self, **body: Any) -> dict[str, int]:
        said = self.ask("/v1/lookup", body)["instances"]
        return {name: hit["tokens"] for name, hit in said.items()}


def ids_of(seed: int, chunks: int = 3) -> list[int]:
    made: list[int] = np.random.default_rng(seed).integers(0, 50_000, chunks * CHUNK).tolist()
    return made


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Fails where it does not become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def fleet(kind: str, folder: Path, **options: Any) -> Iterator[FleetRig]:
    with contextlib.ExitStack() as stack:
        if kind == "redis":
            at = f"redis://127.0.0.1:{stack.enter_context(redis()).port}/0"
        else:
            made = store_server.process(folder / "host", "--directory", "embedded")
            at = stack.enter_context(made).url.replace("tierloom://", "directory://")
        yield FleetRig(at, stack, **options)
