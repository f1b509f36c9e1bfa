"""`tierloom inspect`: what a kept object says of itself, and whether every byte of it is right.

An object is a file of the `files` tier, or FOLDER@KEY of a disk tier (the first digits of the key
will do); FOLDER alone lists what a disk tier keeps. A folder may be in use: nothing is changed.
"""

from __future__ import annotations

from pathlib import Path

import xxhash
from rich.console import Console
from rich.table import Table

from tierloom.adapters.cli.doctor import WHOLE_LINES
from tierloom.stages.codecs.contract.decoding import codec_name, describe
from tierloom.stages.errors import BadObject, ConfigError, Unreadable
from tierloom.stages.kv.object import LINK, Header
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.tiers.disk.index_log import read_index

_MAGIC = b"TLM"  # what follows is the format


def inspect_object(where: str) -> int:
    """Print an object's header and verify its frames. 0: whole, 1: damaged, 2: no object."""
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = WHOLE_LINES
    folder, _, key = where.partition("@")
    try:
        if Path(where).is_dir():
            console.print(_kept(Path(where)))
            return 0
        raw = _from_disk(Path(folder), key) if key else Path(where).read_bytes()
        if raw[: len(_MAGIC)] != _MAGIC:
            errors.print(f"{where}: not a kept object: it does not begin with TLM1")
            return 1 if key else 2
        return _show(raw, where, console)
    except OSError as e:
        errors.print(f"{where}: {e.strerror}")
        return 2
    except ConfigError as e:
        errors.print(str(e))
        return 2
    except Unreadable as e:
        errors.print(f"{where}: {e}; {e.lost.cure}")
        return 2
    except BadObject as e:
        errors.print(f"{where}: damaged: {e}")
        return 1


def _kept(folder: Path) -> Table:
    """What a disk tier keeps, oldest first."""
    FolderLock.segment_of(folder)
    table = Table("key", "bytes", "grains", "pinned", title=str(folder), title_justify="left")
    for e in read_index(folder)[0]:
        grains = len(e.links) // LINK
        table.add_row(e.key.hex(), f"{e.nbytes:,}", str(grains), "yes" if e.pinned else "")
    return table


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


def _show(raw: bytes, where: str, console: Console) -> int:
    page = raw[:PAGE]
    header = Header.unpack(raw[: Header.length(page.ljust(PAGE, b"\0"))])
    console.print(_fields(header, where))
    frames, bad = _frames(raw, header)
    console.print(frames)
    there = len(raw)
    if there != header.nbytes:
        console.print(f"length: {there:,} bytes, the header says {header.nbytes:,}")
    if bad or there < header.nbytes:
        console.print(f"[red]damaged[/]: {bad} of {len(header.frames)} frames are bad")
        return 1
    console.print("[green]whole[/]: every checksum is right")
    return 0


def _fields(header: Header, where: str) -> Table:
    g = header.geometry
    order = f"native, blocks of {g.block_tokens}" if g.native else "canonical"
    table = Table("field", "value", title=where, title_justify="left")
    for name, value in (
        ("key", header.key.hex()),
        ("namespace", header.namespace.hex()),
        ("parent", header.parent.hex()),
        ("tokens", f"{header.tokens}, in grains of {header.grain}"),
        ("token digest", header.token_digest.hex()),
        ("geometry", f"{g.kv} x {g.layers} layers x {g.heads} heads x {g.dim}, {g.dtype}, {order}"),
        ("bytes", f"{header.nbytes:,}, raw {sum(f.raw for f in header.frames):,}"),
    ):
        table.add_row(name, value)
    return table


def _frames(raw: bytes, header: Header) -> tuple[Table, int]:
    """The frames as a table, each verified, and how many are bad."""
    table = Table("frame", "layers", "offset", "stored", "raw", "bits", "codecs", "xxh3-64", "")
    bad = 0
    for i, frame in enumerate(header.frames):
        data = raw[frame.offset : frame.offset + frame.stored]
        good = xxhash.xxh3_64_intdigest(data) == frame.checksum
        bad += not good
        first = i % header.groups * header.group
        last = min(first + header.group, header.geometry.layers) - 1
        bits = 8 * frame.stored * header.geometry.itemsize / max(1, frame.raw)  # per element
        codecs = " ".join(map(codec_name, frame.codecs)) or "none"
        codecs += describe(data, frame.codecs, i // header.groups) if good else ""
        table.add_row(
            str(i), f"{first} to {last}",
            f"{frame.offset:,}", f"{frame.stored:,}", f"{frame.raw:,}", f"{bits:.2f}", codecs,
            f"{frame.checksum:016x}", "[green]ok[/]" if good else "[red]bad[/]",
        )  # fmt: skip
    return table, bad
