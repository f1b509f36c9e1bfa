"""What lies in `data/`: which KV, under which names, written through which codecs to which tiers.

Goes by the public interface alone (`tierloom.open`, `KVLayout`, configs), so that it still runs
when all behind that has other names. KV is made of SHAKE-256 and of integers: it is the same on
every machine, by every version of numpy and torch.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from hashlib import sha256, shake_256
from pathlib import Path
from typing import Any, NamedTuple

import lz4
import numpy as np
import torch
import zstandard
from servers import ask

import tierloom
from tierloom import KVLayout, Pipeline

HERE = Path(__file__).parent
DATA, EXPECTED = HERE / "data", HERE / "expected.json"
LAYERS, HEADS, DIM, BLOCK = 3, 2, 32, 16
NONE: Mapping[str, Any] = {}
ROPE = '{"rope_theta": 10000.0, "rope_type": "default"}'
LIBRARIES = {"zstd": str(zstandard.ZSTD_VERSION), "lz4": str(lz4.library_version_number())}
"""Whose output is their own affair: another version may write other bytes, which all read."""


class Case(NamedTuple):
    """One prompt: two chunks and a tail that ends inside a grain, where not said otherwise."""

    codecs: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    order: str = "2BNHD"
    tokens: int = 75
    chunk: int = 32
    seed: str = "prompt"
    """Of the tokens and of their KV."""
    identity: Mapping[str, Any] = NONE
    """What `open` is told of the model."""
    names: Mapping[str, Any] = NONE
    """What each call is told of the tenant."""

    @property
    def lossy(self) -> bool:
        return bool({*self.codecs} - {"zstd", "lz4", "rans", "aesgcm"})

    @property
    def random(self) -> bool:
        """Encrypted: no two writers write the same."""
        return "aesgcm" in self.codecs

    @property
    def ids(self) -> np.ndarray:
        raw = shake_256(f"golden tokens {self.seed}".encode()).digest(2 * self.tokens)
        return np.frombuffer(raw, "<u2").astype(np.int32)

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK)

    @property
    def slots(self) -> np.ndarray:
        """The last block holds the first tokens."""
        t = np.arange(self.tokens)
        return (self.blocks - 1 - t // BLOCK) * BLOCK + t % BLOCK


HALF = torch.float16
CASES = {
    "plain": Case(),
    "latent": Case(order="BND"),
    "native": Case(order="BHND", tokens=80),  # whole blocks alone are kept
    "native-rans": Case(("rans",), order="BHND", tokens=64),
    "tenant": Case(tokens=40, names={"salt": "s", "adapter": "lora", "tags": {"b": "2", "a": "1"}}),
    "zstd": Case(("zstd",)),
    "lz4": Case(("lz4",)),
    "rans": Case(("rans",)),
    "int8": Case(("int8",), dtype=HALF),
    "int4": Case(("int4",)),
    "fp8": Case(("fp8",)),
    "turboquant": Case(("turboquant",)),
    "cachegen": Case(("cachegen",)),
    "cachegen-rope": Case(("cachegen",), dtype=HALF, identity={"rope": ROPE}),
    "progressive": Case(("progressive",)),
    "aesgcm": Case(("aesgcm",), tokens=40),
    "chain": Case(("int4", "zstd", "aesgcm"), dtype=HALF),
    "two-pieces": Case(dtype=torch.float32, tokens=64, chunk=64),
}
FILES = [name for name in CASES if name != "two-pieces"]
REDIS = ["int4", "aesgcm", "two-pieces"]
DISK = ["plain", "progressive"]
"""One after another into one folder."""

ONE = Case(dtype=HALF, tokens=32, seed="one")
LOGGED = {
    "dropped": ONE, "pinned": ONE._replace(seed="two"), "let go": ONE._replace(seed="three"),
    "last": ONE._replace(tokens=20, seed="four"),
}  # fmt: skip
"""What the log of the folder `disk-open` tells of, of a process that was killed."""

IDENTITIES: dict[str, Case] = {
    "nothing but a model": Case(tokens=40),
    "another model": Case(tokens=40, identity={"model": "other"}),
    "weights": Case(tokens=40, identity={"weights": "abc"}),
    "rope": Case(tokens=40, identity={"rope": ROPE}),
    "a share": Case(
        tokens=40, identity={"layers": (3, 6), "heads": (2, 4), "part": "sliding window"}
    ),
    "salt": Case(tokens=40, names={"salt": "secret"}),
    "adapter": Case(tokens=40, names={"adapter": "lora"}),
    "tags": Case(tokens=40, names={"tags": {"b": "2", "a": "1"}}),
    "larger chunks": Case(tokens=56, chunk=48),
    "float16": Case(tokens=40, dtype=HALF),
    "latent": Case(tokens=40, order="BND"),
    "native": Case(tokens=48, order="BHND"),
    "native of a backend": Case(tokens=48, order="BHND", identity={"backend": "flash"}),
}
"""What goes into an object's name besides its tokens."""


def caches(case: Case, *, blank: bool = False) -> list[Any]:
    """An engine's tensors. Slots that no token has are zero, and so is all of a blank one."""
    kv, heads, dim = (1, 1, HEADS * DIM) if case.order == "BND" else (2, HEADS, DIM)
    shape = (kv, LAYERS, case.blocks * BLOCK, heads, dim)
    x = np.zeros(shape, np.float32)
    if not blank:
        raw = shake_256(f"golden KV {case.seed}".encode()).digest(4 * x.size)
        bells = np.frombuffer(raw, np.uint8).reshape(*shape, 4).sum(-1, dtype=np.int32) - 510
        channel = np.arange(dim)
        x[:] = (bells + 64 * (channel % 3)) * 2.0 ** (channel % 4 - 9)  # exact in float32
        x[:, :, case.tokens :] = 0
    x = x.reshape(kv, LAYERS, case.blocks, BLOCK, heads, dim)[:, :, ::-1]

    def tensor(part: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(part.copy()).to(case.dtype)

    if case.order == "BND":
        return [tensor(layer.reshape(case.blocks, BLOCK, dim)) for layer in x[0]]
    if case.order == "BHND":
        return [
            (tensor(k.swapaxes(1, 2)), tensor(v.swapaxes(1, 2))) for k, v in zip(*x, strict=True)
        ]
    return [tensor(x[:, layer]) for layer in range(LAYERS)]


def digest(tensors: list[Any]) -> str:
    """sha256 of every byte."""
    flat = [t for c in tensors for t in (c if isinstance(c, tuple) else (c,))]
    return sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in flat)).hexdigest()


def opened(case: Case, tier: Mapping[str, Any], scratch: Path) -> Pipeline:
    """A pipeline over that tier alone, through the case's codecs. `scratch`: for the key file."""
    key = scratch / "key"
    if not key.exists():
        key.write_bytes(bytes(range(32)))
        key.chmod(0o600)  # a key file that others can read is refused
    keys = {"keys": [str(key)]}
    codecs = {use: {"use": use} | (keys if use == "aesgcm" else {}) for use in case.codecs}
    source = {
        "version": 1,
        "name": "golden",
        "chunk": {"tokens": case.chunk, "grain": 16, "group": 2},
        "budget": {"arena": "4 MiB"},
        "tiers": {"cold": {**tier}},
        "graphs": {
            "store": {
                "deadline": "60 s",
                "stages": {
                    "keys": {"use": "hash"},
                    "fresh": {"use": "lookup", "want": "absent"},
                    "pack": {"use": "gather"},
                    "host": {"use": "to_host"},
                    **codecs,
                    "cold": {"use": "put", "tier": "cold", "when_full": "block"},
                },
            },
            "retrieve": {
                "deadline": "60 s",
                "stages": {
                    "keys": {"use": "hash"},
                    "plan": {"use": "lookup"},
                    "fetch": {"use": "get"},
                    "grow": {"use": "decode"} | keys,
                    "place": {"use": "scatter"},
                },
            },
        },
    }
    layout = KVLayout.from_tensors(caches(case, blank=True), order=case.order)
    identity = {"model": "golden"} | dict(case.identity)
    return tierloom.open(source, layout=layout, **identity)


def stored(pipe: Pipeline, case: Case) -> None:
    got = pipe.store(case.ids, caches(case), case.slots, **case.names).wait()
    assert (got.tokens, got.lost) == (case.tokens, {}), got


def retrieved(pipe: Pipeline, case: Case) -> str:
    """The digest of blank caches into which all tokens came."""
    target = caches(case, blank=True)
    got = pipe.retrieve(case.ids, target, case.slots, **case.names).wait()
    assert (got.tokens, got.lost) == (case.tokens, {}), got
    return digest(target)


def files(folder: Path) -> dict[str, Any]:
    return {"use": "files", "path": str(folder)}


def disk(folder: Path, capacity: str = "200 KiB") -> dict[str, Any]:
    """`depth`: one object after another, so that all lies where it lay before."""
    return {
        "use": "disk", "path": str(folder), "capacity": capacity, "segment": "100 KiB",
        "keep_free": 0, "depth": 1,
    }  # fmt: skip


LOG_ROOM = "84 KiB"
"""Three whole objects."""


def redis_at(port: int) -> dict[str, Any]:
    """For ever, in pieces of the least size that there is."""
    url = f"redis://127.0.0.1:{port}"
    return {"use": "redis", "url": url, "ttl": 0, "piece": "64 KiB", "timeout": "30 s"}


def write_files(case: Case, folder: Path, scratch: Path) -> None:
    with opened(case, files(folder), scratch) as pipe:
        stored(pipe, case)


def write_disk(folder: Path, scratch: Path) -> None:
    """Closed in order: what is there, a snapshot says."""
    for name in DISK:
        with opened(_apart(name), disk(folder), scratch) as pipe:
            stored(pipe, _apart(name))


def _apart(name: str) -> Case:
    """Codecs are in no name: in one folder, each case wants a model of its own."""
    return CASES[name]._replace(identity={"model": name})


def on_disk(name: str, folder: Path, scratch: Path) -> Pipeline:
    """What `write_disk` wrote of a case."""
    return opened(_apart(name), disk(folder), scratch)


def on_log(folder: Path, scratch: Path) -> Pipeline:
    return opened(ONE, disk(folder, LOG_ROOM), scratch)


def write_log(folder: Path, scratch: Path) -> Pipeline:
    """All kinds of records: put, drop, pin, unpin. Who closes the pipeline makes a snapshot."""
    pipe = on_log(folder, scratch)
    stored(pipe, LOGGED["dropped"])
    assert pipe.clear() == 1
    for name in ("pinned", "let go"):
        stored(pipe, LOGGED[name])
        assert pipe.pin(LOGGED[name].ids) == 1
    assert pipe.pin(LOGGED["let go"].ids, pinned=False) == 1
    stored(pipe, LOGGED["last"])  # pins are written with the next record
    return pipe


def names_of(case: Case, scratch: Path) -> list[str]:
    """What the files tier calls the objects of a prompt."""
    folder = scratch / "names"
    write_files(case, folder, scratch)
    return sorted(tree(folder))


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path, and its length."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: f"{len(raw)}:{sha256(raw).hexdigest()}" for name, raw in found.items()}


def expected() -> dict[str, Any]:
    """What `make.py` noted of the data: names of objects, and digests of what was decoded.

    Those are the same with all vector instructions of numpy, numba and torch turned off. Another
    kind of CPU than x86 was not tried.
    """
    found: dict[str, Any] = json.loads(EXPECTED.read_text())
    return found


def kept(port: int) -> dict[bytes, bytes]:
    """All that a server has: strings, without an end. A server's DUMP would bind the data to
    versions of Redis; what a tier keeps is plain strings, which any server takes."""
    found = {}
    for name in sorted(ask(port, "KEYS", "*").split("\r\n")[2::2]):
        if name:
            assert ask(port, "TYPE", name) == "+string\r\n"
            assert ask(port, "PTTL", name) == ":-1\r\n"
            said = ask(port, "GET", name).encode("latin-1")
            found[name.encode()] = said.split(b"\r\n", 1)[1][:-2]
    return found


def as_commands(found: Mapping[bytes, bytes]) -> bytes:
    """SET commands as they go to a server, in the order of their names."""
    out = bytearray()
    for name, value in sorted(found.items()):
        out += b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            len(name), name, len(value), value,
        )  # fmt: skip
    return bytes(out)


def replay(port: int, commands: bytes) -> None:
    """Send what `as_commands` made."""
    with socket.create_connection(("127.0.0.1", port), 5) as s:
        s.sendall(commands + b"*1\r\n$4\r\nPING\r\n")
        said = b""
        while not said.endswith(b"+PONG\r\n"):
            got = s.recv(1 << 16)
            assert got, "closed the connection"
            said += got
    assert said.startswith(b"+OK\r\n")
    assert not said.removesuffix(b"+PONG\r\n").replace(b"+OK\r\n", b""), said[:200]


def without_writers(found: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """With zeros for the word that each writer draws at random: it stands in the 16th to the 24th
    byte of a manifest, and in the names of its pieces."""
    words = [value[16:24] for name, value in found.items() if name.endswith(b"}")]
    made = {}
    for name, value in found.items():
        if name.endswith(b"}"):
            value = value[:16] + bytes(8) + value[24:]
        for word in words:
            name = name.replace(b":%b:" % word.hex().encode(), b":" + b"0" * 16 + b":")
        made[name] = value
    return made
