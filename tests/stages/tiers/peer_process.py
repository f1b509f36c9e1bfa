"""An engine in a process of its own, which serves its tiers and does what it is told: a line of
JSON in, a line of JSON out.

    with engine(folder, serve) as other: ...          # other.url, other.stores(0), other.kill()

It is a pipeline over the tests' tensors; with `bare` it is one in the namespace of the contract's
objects, into whose tiers whole objects are put.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    _TESTS = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_TESTS / "pipeline"), str(_TESTS / "stages" / "tiers")]
import processes

if TYPE_CHECKING:
    from collections.abc import Iterator


class EngineProcess(processes.Process):
    """Started again, it listens where it did, and has only what lies on its disk."""

    def __init__(
        self, folder: Path, config: dict[str, Any], *, model: str = "test", bare: bool = False,
        env: dict[str, str] | None = None, space: str = "", engine: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`space`: hex of the namespace of a bare one. `engine`: its shape, where that is not the
        tests'."""
        folder.mkdir(parents=True, exist_ok=True)
        self._first = {
            "config": config, "model": model, "bare": bare, "space": space, "engine": engine or {},
        }  # fmt: skip
        self.url = ""
        command = [sys.executable, str(Path(__file__).resolve())]
        super().__init__(command, 0, folder / "log.txt", {"PYTHONSAFEPATH": "1"} | (env or {}))

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self._env, preexec_fn=processes.die_with_parent,
            )  # fmt: skip
        if self.url:
            self._first["config"]["serve"]["listen"] = self.url.removeprefix("tierloom://")
        self.url = self.tell(**self._first)
        assert self.url, self.log.read_text()

    def tell(self, **what: Any) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(what) + "\n")
        self.child.stdin.flush()
        said = self.child.stdout.readline()
        assert said, self.log.read_text()
        return json.loads(said)

    def stores(self, seed: int, tokens: int = 192) -> int:
        """Keep a prompt, and say how many tokens of it are kept."""
        kept: int = self.tell(store=seed, tokens=tokens)
        return kept

    def close(self) -> None:
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()

    def kill(self) -> None:
        super().kill()
        self.close()

    def stop(self, patience: float = 20.0) -> int:
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            return self.child.wait(patience)
        finally:
            self.kill()


@contextmanager
def engine(folder: Path, config: dict[str, Any], **more: Any) -> Iterator[EngineProcess]:
    process = EngineProcess(folder, config, **more)
    try:
        yield process
    finally:
        process.resume()
        process.kill()


class _Bare:
    """The life of a pipeline without its calls, in the contract's namespace."""

    def __init__(self, config: dict[str, Any], space: str) -> None:
        from tierloom.pipeline.config.load import load_config
        from tierloom.pipeline.runtime import Worker
        from tierloom.testing import NAMESPACE
        from tierloom.testing.bench import GEOMETRY

        names: Any = SimpleNamespace(
            digest=bytes.fromhex(space) or NAMESPACE, layers=(0, GEOMETRY.layers),
            heads=(0, GEOMETRY.heads),
        )  # fmt: skip
        self.worker = Worker(load_config(config), GEOMETRY, "cpu", names)
        assert self.worker.serving is not None
        self.url = self.worker.serving.address
        self.tier = next(iter(self.worker.tiers.values()))

    def put(self, file: str, sizes: list[int]) -> list[int]:
        raw = Path(file).read_bytes()
        return [int(code or 0) for code in self.worker.portal.call(self._put, raw, sizes)]

    async def _put(self, raw: bytes, sizes: list[int]) -> list[Any]:
        from tierloom.stages.kv.object import Header, Object

        at, objects = 0, []
        for size in sizes:
            lease = self.worker.arena.lease(size)
            lease.view[:size] = raw[at : at + size]
            at += size
            header = Header.unpack(lease.view[:size])
            objects.append(Object(header, lease, loaded=len(header.frames), sealed=True))
        codes = await self.tier.put(objects)
        for each in objects:
            each.lease.release()
        return codes

    def delete(self, keys: list[str]) -> int:
        return int(self.worker.portal.call(self.tier.delete, [bytes.fromhex(k) for k in keys]))

    def clear(self) -> int:
        return int(self.worker.portal.call(self.tier.clear))

    def stat(self) -> list[int]:
        return list(self.tier.stat())


def main() -> None:
    first = json.loads(sys.stdin.readline())
    served: Any
    if first["bare"]:
        served = _Bare(first["config"], first["space"])
        url, close = served.url, served.worker.close
    else:
        import conftest

        import tierloom

        rig = conftest.Engine(**first["engine"])
        served = tierloom.open(first["config"], layout=rig.layout, model=first["model"])
        url, close = served.serves_at, served.close
    print(json.dumps(url), flush=True)
    for line in sys.stdin:
        said = json.loads(line)
        if first["bare"]:
            ((call, arguments),) = said.items()
            answer = getattr(served, call)(*arguments)
        elif "store" in said:
            ids = conftest.tokens(said["tokens"], seed=said["store"])
            served.store(ids, rig.caches, rig.slots(len(ids))).wait()
            answer = served.lookup(ids)
        elif "retrieve" in said:
            ids = conftest.tokens(said["tokens"], seed=said["retrieve"])
            got = served.retrieve(ids, rig.blank().caches, rig.slots(len(ids))).wait()
            answer = {"tokens": got.tokens, "tiers": got.tiers}
        else:
            answer = served.stats()[said["stats"]]
        print(json.dumps(answer), flush=True)
    close()


if __name__ == "__main__":
    main()
