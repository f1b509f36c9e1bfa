"""`tierloom inspect`: what a kept object says of itself, and whether every byte of it is right.

An object is a file of the `files` tier, or FOLDER@KEY of a disk tier (the first digits of the key
will do); FOLDER alone lists what a disk tier keeps. A folder may be in use: nothing is changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tierloom.adapters.demo.screen import screen_for
from tierloom.stages.codecs.contract.decoding import codec_name, describe
from tierloom.stages.errors import BadObject, ConfigError, Unreadable
from tierloom.stages.kv.object import LINK, Header
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.tiers.disk.index_log import read_index

_MAGIC = b"TLM"  # what follows is the format


def inspect_object(where: str, *, as_json: bool = False) -> int:
    """Print an object's header and verify its frames. 0: whole, 1: damaged, 2: no object."""
    code, said = _looked_at(where)
    if as_json:
        sys.stdout.write(json.dumps({"object": where, **said}, indent=2) + "\n")
        return code
    console = screen_for()
    if "error" in said:
        Console(stderr=True, highlight=False).print(said["error"], markup=False, soft_wrap=True)
    elif "kept" in said:
        console.print(_table(said["kept"], where))
    else:
        frames = [
            {n: v for n, v in f.items() if n != "details"}
            | {"codecs": " ".join(f["codecs"]) + f["details"]}
            for f in said["frames"]
        ]
        console.print(_table([{"field": n, "value": v} for n, v in said["header"].items()], where))
        console.print(_table(frames))
        if said["bytes"] != said["header"]["bytes"]:
            console.print(
                f"length: {said['bytes']:,} bytes, the header has {said['header']['bytes']:,}"
            )
        bad = sum(not f["good"] for f in said["frames"])
        console.print(
            "whole: every checksum is right" if said["state"] == "whole"
            else f"damaged: {bad} of {len(frames)} frames are bad",
            style="green" if said["state"] == "whole" else "red",
        )  # fmt: skip
    return code


def _looked_at(where: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what there is as plain values: an object, a folder's objects, an error."""
    folder, _, key = where.partition("@")
    try:
        if Path(where).is_dir():
            return 0, {"state": "folder", "kept": _kept(Path(where))}
        raw = _from_disk(Path(folder), key) if key else Path(where).read_bytes()
        if raw[: len(_MAGIC)] != _MAGIC:
            told = f"{where}: not a kept object: it does not begin with TLM1"
            return 1 if key else 2, {"state": "damaged" if key else "no object", "error": told}
        return _of_object(raw)
    except OSError as e:
        return 2, {"state": "no object", "error": f"{where}: {e.strerror}"}
    except ConfigError as e:
        return 2, {"state": "no object", "error": str(e)}
    except Unreadable as e:
        return 2, {"state": "unreadable", "error": f"{where}: {e}; {e.lost.cure}"}
    except BadObject as e:
        return 1, {"state": "damaged", "error": f"{where}: damaged: {e}"}


def _table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A column for each key of the first row."""
    table = Table(*(rows[0] if rows else ()), title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*(escape(_word(value)) for value in row.values()))
    return table


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _kept(folder: Path) -> list[dict[str, Any]]:
    """What a disk tier keeps, oldest first."""
    FolderLock.segment_of(folder)
    return [
        {"key": e.key.hex(), "bytes": e.nbytes, "grains": len(e.links) // LINK, "pinned": e.pinned}
        for e in read_index(folder)[0]
    ]


def _from_disk(folder: Path, key: str) -> bytes:
    """An object's bytes out of a disk tier's segments."""
    segment = FolderLock.segment_of(folder)
    found = [e for e in read_index(folder)[0] if e.key.hex().startswith(key.lower())]
    if len(found) != 1:
        raise ConfigError(f"{folder}: {len(found)} objects have a key that begins with {key}")
    raw = bytearray()
    for offset, nbytes in found[0].place.pieces:
        while nbytes:  # a piece may go on in the next segment
            number, at = divmod(offset, segment)
            part = min(nbytes, segment - at)
            with (folder / f"segment-{number:05}.slab").open("rb") as file:
                file.seek(at)
                raw += file.read(part).ljust(part, b"\0")
            offset, nbytes = offset + part, nbytes - part
    return bytes(raw[: found[0].nbytes])


def _of_object(raw: bytes) -> tuple[int, dict[str, Any]]:
    page = raw[:PAGE]
    header = Header.unpack(raw[: Header.length(page.ljust(PAGE, b"\0"))])
    frames = [_frame(raw, header, i) for i in range(len(header.frames))]
    whole = len(raw) >= header.nbytes and all(frame["good"] for frame in frames)
    said = {"state": "whole" if whole else "damaged", "bytes": len(raw), "header": _fields(header)}
    return 0 if whole else 1, {**said, "frames": frames}


def _fields(header: Header) -> dict[str, Any]:
    g = header.geometry
    order = f"native, blocks of {g.block_tokens}" if g.native else "canonical"
    return {
        "key": header.key.hex(),
        "namespace": header.namespace.hex(),
        "parent": header.parent.hex(),
        "tokens": header.tokens,
        "grain": header.grain,
        "token digest": header.token_digest.hex(),
        "geometry": f"{g.kv} x {g.layers} layers x {g.heads} heads x {g.dim}, {g.dtype}, {order}",
        "bytes": header.nbytes,
        "raw bytes": sum(f.raw for f in header.frames),
    }


def _frame(raw: bytes, header: Header, i: int) -> dict[str, Any]:
    """A frame, verified."""
    frame = header.frames[i]
    data = raw[frame.offset : frame.offset + frame.stored]
    good = xxhash.xxh3_64_intdigest(data) == frame.checksum
    first = i % header.groups * header.group
    last = min(first + header.group, header.geometry.layers) - 1
    bits = 8 * frame.stored * header.geometry.itemsize / max(1, frame.raw)
    return {
        "frame": i, "layers": f"{first} to {last}", "offset": frame.offset,
        "stored": frame.stored, "raw": frame.raw, "bits per element": round(bits, 2),
        "codecs": list(map(codec_name, frame.codecs)) or ["none"],
        "details": describe(data, frame.codecs, i // header.groups) if good else "",
        "xxh3-64": f"{frame.checksum:016x}", "good": good,
    }  # fmt: skip
