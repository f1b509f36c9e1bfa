"""Every kind of remote store, with its processes, and how to do harm to what it keeps.

One interface for all kinds, so that one suite (`test_remote_*.py`) serves them all: who adds a kind
adds a class here, and its name to `kinds.py`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buckets import KEY, NAME, SECRET, localbucket
from conftest import config, tokens
from processes import need

if TYPE_CHECKING:
    from processes import Process

    from tierloom import Pipeline

IDS = tokens(192)
_PLACES = ("url", "endpoint")
AWS = {
    "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


class Store:
    """Values under names, which processes share."""

    tier: dict[str, Any]
    """Options of the tier."""
    victims: Sequence[Process] = ()
    """Processes that it consists of, in the order in which they start."""
    port = 0
    """Where it is spoken to, if that is one TCP port."""
    model = ""
    """Of the test at hand, so that none finds what another has left."""
    lasting = False
    """What is kept outlives the processes."""
    whole = False
    """A value is a whole object."""
    fixed = False
    """Values cannot be made shorter or longer."""
    pooled = False
    """A value is a frame, a header or a record."""
    fragile = False
    """A client that hangs up takes the server with it."""
    counting = True
    """It can say how many objects are cleared that others have put."""
    sealed = False
    """What it keeps can neither be seen nor changed from outside."""
    lends = False
    """What is read stays where it is: in memory of this host."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        self._stack.close()

    def config(
        self, *, hot: bool = False, by: str = "request", port: int = 0, **changes: Any
    ) -> dict[str, Any]:
        """A pipeline over it alone, or behind memory (`hot`). `port`: of a gate in front of it.

        Time limits are far off where they are not said: a busy machine is no failure.
        """
        options = {
            name: value.replace(f":{self.port}", f":{port}") if port and name in _PLACES else value
            for name, value in self.tier.items()
        }
        pace = {"by": by, "window": 1} if by == "layer" else {"by": by}
        far: dict[str, Any] = {
            "tiers__cold": options | {"timeout": "30 s", "probe": "100 ms"},
            "graphs__store__stages__cold": {"use": "put", "tier": "cold", "when_full": "block"},
        }
        for graph in ("store", "retrieve"):
            far |= {f"graphs__{graph}__deadline": "60 s", f"graphs__{graph}__pace": pace}
        made = config(**(far | changes))
        if hot:
            made["graphs"]["retrieve"]["stages"]["fetch"]["promote"] = "hot"
        else:
            del made["tiers"]["hot"], made["graphs"]["store"]["stages"]["hot"]
        return made

    def ready(self) -> None:
        """It runs, and nothing is left of the test before."""
        self.revive()

    def revive(self) -> None:
        """Let all its processes run that do not."""
        for process in self.victims:
            process.resume()
            if process.child.poll() is not None:
                process.start()

    def values(self, pipe: Pipeline) -> list[Any]:
        """Names of all that `pipe` keeps of IDS."""
        raise NotImplementedError

    def get(self, pipe: Pipeline, name: Any) -> bytes:
        raise NotImplementedError

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        """Put a value, or none, in the place of another behind everybody's back."""
        raise NotImplementedError


class InFiles(Store):
    """Whose objects are files of a folder."""

    lasting = whole = True

    def __init__(self, files: Path) -> None:
        super().__init__()
        self.files = files

    def ready(self) -> None:
        super().ready()
        for path in self._objects():
            path.unlink()

    def values(self, pipe: Pipeline) -> list[Any]:
        return self._objects()

    def get(self, pipe: Pipeline, name: Any) -> bytes:
        raw: bytes = name.read_bytes()
        return raw

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        name.unlink() if value is None else name.write_bytes(value)

    def _objects(self) -> list[Path]:
        """A bucket's server has small files of its own among them."""
        found = (p for p in self.files.rglob("*") if p.is_file())
        return sorted(p for p in found if p.stat().st_size >= 4096 or p.suffix == ".tlm")


class Files(InFiles):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "kv")
        self.tier = {"use": "files", "path": str(self.files)}


class Gds(InFiles):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "kv")
        self.tier = {"use": "gds", "path": str(self.files)}


class NixlPosix(InFiles):
    def __init__(self, folder: Path) -> None:
        need("nixl", "nixl_cu12")
        super().__init__(folder / "kv")
        self.tier = {"use": "nixl", "path": str(self.files)}


class Disk(Store):
    """A folder of one process: objects lie one after another in segments."""

    lasting = whole = fixed = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.files = folder / "kv"
        self.tier = {
            "use": "disk", "path": str(self.files), "capacity": "8 MiB", "keep_free": 0,
        }  # fmt: skip

    def ready(self) -> None:
        shutil.rmtree(self.files, ignore_errors=True)

    def values(self, pipe: Pipeline) -> list[Any]:
        tier: Any = pipe.tiers["cold"].tier
        entries = getattr(tier, "tier", tier)._index._entries.values()
        return [e.place.pieces[0] for e in entries if len(e.place.pieces) == 1]

    def get(self, pipe: Pipeline, name: Any) -> bytes:
        (segment,) = self.files.glob("segment-*.slab")
        return segment.read_bytes()[name[0] : name[0] + name[1]]

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        assert value is not None
        (segment,) = self.files.glob("segment-*.slab")
        with segment.open("r+b") as file:
            file.seek(name[0])
            file.write(value)


class NixlStatic(Disk):
    def __init__(self, folder: Path) -> None:
        need("nixl", "nixl_cu12")
        super().__init__(folder)
        del self.tier["keep_free"]
        self.tier |= {"use": "nixl", "pool": "static"}


class S3(InFiles):
    def __init__(self, folder: Path) -> None:
        need("s3", "obstore")
        super().__init__(folder / "data" / NAME)
        server = self._stack.enter_context(localbucket(folder / "data"))
        self.victims, self.port = [server], server.port
        self.tier = {
            "use": "s3", "url": f"s3://{NAME}/kv", "region": "us-east-1", "endpoint": server.url,
        }  # fmt: skip


class NixlObj(S3):
    def __init__(self, folder: Path) -> None:
        need("nixl", "nixl_cu12")
        super().__init__(folder)
        self.tier |= {"use": "nixl", "backend": "OBJ"}


class Redis(Store):
    def __init__(self, folder: Path, *options: str) -> None:
        from servers import redis

        super().__init__()
        server = self._stack.enter_context(redis(*options))
        self.victims, self.port = [server], server.port
        url = f"redis://127.0.0.1:{server.port}"
        self.tier = {"use": "redis", "url": url, "piece": "64 KiB"}

    def ready(self) -> None:
        super().ready()
        self._ask("FLUSHALL")

    def values(self, pipe: Pipeline) -> list[Any]:
        return sorted(word for word in self._ask("KEYS", "*").split("\r\n")[2::2] if word)

    def get(self, pipe: Pipeline, name: Any) -> bytes:
        return self._ask("GET", name).encode("latin-1").split(b"\r\n", 1)[1][:-2]

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        self._ask("UNLINK", name) if value is None else self._ask("SET", name, value)

    def _ask(self, *words: str | bytes) -> str:
        from servers import ask

        return ask(self.port, *words)


class Served(Store):
    """`tierloom serve`, over memory, on a port or on a socket, whose memory is lent or not."""

    sealed = True

    def __init__(self, folder: Path, way: str) -> None:
        super().__init__()
        _serve(self, folder, way)


class ServedFiles(InFiles):
    """The same over a folder, whose files can be damaged."""

    def __init__(self, folder: Path, way: str) -> None:
        super().__init__(folder / "kv")
        _serve(self, folder, way, {"cold": {"use": "files", "path": str(self.files)}})


def _serve(store: Store, folder: Path, way: str, tiers: dict[str, Any] | None = None) -> None:
    from store_server import Process

    where = "tcp://127.0.0.1:0" if way == "tcp" else f"unix://{folder}/socket"
    server = Process(folder, listen=(where,), tiers=tiers)
    store._stack.callback(server.kill)
    store.victims = [server]
    store.port = int(server.url.rsplit(":", 1)[1]) if way == "tcp" else 0
    store.lends = way == "shared"
    store.tier = {"use": "server", "url": server.url, "share": store.lends}


class Lent(Store):
    """A server in this process: damage is done to the memory that it lends."""

    whole = fixed = True

    def __init__(self, folder: Path) -> None:
        from store_server import Within

        super().__init__()
        self._server = Within(folder / "socket")
        self._stack.callback(self._server.stop)
        self.tier = {"use": "server", "url": self._server.urls[1]}

    def ready(self) -> None:
        (memory,) = self._server.serving.store.tiers
        self._server.call(memory.clear)

    def values(self, pipe: Pipeline) -> list[Any]:
        (memory,) = self._server.serving.store.tiers
        return [e.place.lease for e in memory.tier._index._entries.values()]  # type: ignore[attr-defined]

    def get(self, pipe: Pipeline, name: Any) -> bytes:
        return bytes(name.view)

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        name.view[:] = value


class Pool(Store):
    """Whose names are known to those alone who know the keys."""

    pooled = True

    def values(self, pipe: Pipeline) -> list[Any]:
        from pooled_cases import names_of

        from tierloom.stages.kv.prefix import grain_links

        keys = grain_links(pipe._requests._seed("", "", ()), IDS, 16)[3::4]
        tier: Any = pipe.tiers["cold"].tier
        return [name for key in keys for name in (key.hex(), *names_of(tier, key))]

    def get(self, pipe: Pipeline, name: Any) -> bytes:
        (value,) = pipe.tiers["cold"].tier._peek([name])  # type: ignore[attr-defined]
        return bytes(value)


class Mooncake(Pool):
    def __init__(self, folder: Path) -> None:
        from pools import MooncakePool, require

        require("mooncake")
        super().__init__()
        pool = MooncakePool(folder)
        self._stack.callback(pool.close)
        self.victims = [pool.master, *pool.owners]
        self.tier = {"use": "mooncake", "url": pool.url, "deadline": "1 s"}

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        tier: Any = pipe.tiers["cold"].tier
        tier._remove([name])
        with tier._in_use() as client:
            assert not value or client.put(tier._base + name, value) == 0


class InfiniStore(Pool):
    counting = False
    fragile = True

    def __init__(self, folder: Path) -> None:
        from pools import InfiniServer, require

        require("infinistore")
        super().__init__()
        server = InfiniServer(folder)
        self._stack.callback(server.kill)
        self.victims, self.port = [server], server.port
        self.tier = {"use": "infinistore", "url": server.url, "deadline": "1 s"}

    def set(self, pipe: Pipeline, name: Any, value: bytes | None) -> None:
        tier: Any = pipe.tiers["cold"].tier
        with tier._link() as (link, base):
            link.remove(base + name)
            assert not value or link.put(base + name, value)
