"""`tierloom inspect`: what a kept object says of itself, and whether every byte of it is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash
from rich.console import Console
from rich.table import Table

from ..stages.codecs.table import LZ4, PLANES, ZSTD
from ..stages.errors import BadObject
from ..stages.object import Header
from ..stages.space import PAGE

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

_MAGIC = b"TLM1"
_CODECS = {PLANES: "planes", ZSTD: "zstd", LZ4: "lz4"}


def inspect_file(path: Path) -> int:
    """Print an object's header and verify its frames. 0: whole, 1: damaged, 2: no object."""
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                errors.print(f"{path}: not a kept object: it does not begin with TLM1")
                return 2
            file.seek(0)
            return _show(file, path, console)
    except OSError as e:
        errors.print(f"{path}: {e.strerror}")
        return 2
    except BadObject as e:
        errors.print(f"{path}: damaged: {e}")
        return 1


def _show(file: BinaryIO, path: Path, console: Console) -> int:
    page = file.read(PAGE)
    header = Header.unpack(page + file.read(Header.length(page.ljust(PAGE, b"\0")) - PAGE))
    console.print(_fields(header, path))
    frames, bad = _frames(file, header)
    console.print(frames)
    there = path.stat().st_size
    if there != header.nbytes:
        console.print(f"length: {there:,} bytes, the header says {header.nbytes:,}")
    if bad or there < header.nbytes:
        console.print(f"[red]damaged[/]: {bad} of {len(header.frames)} frames are bad")
        return 1
    console.print("[green]whole[/]: every checksum is right")
    return 0


def _fields(header: Header, path: Path) -> Table:
    g = header.geometry
    order = f"native, blocks of {g.block_tokens}" if g.native else "canonical"
    table = Table("field", "value", title=str(path), title_justify="left")
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


def _frames(file: BinaryIO, header: Header) -> tuple[Table, int]:
    """The frames as a table, each verified, and how many are bad."""
    table = Table("frame", "layers", "offset", "stored", "raw", "codecs", "xxh3-64", "")
    bad = 0
    for i, frame in enumerate(header.frames):
        file.seek(frame.offset)
        good = xxhash.xxh3_64_intdigest(file.read(frame.stored)) == frame.checksum
        bad += not good
        first = i * header.group
        last = min(first + header.group, header.geometry.layers) - 1
        codecs = " ".join(_CODECS.get(c, f"unknown ({c})") for c in frame.codecs) or "none"
        table.add_row(
            str(i), f"{first} to {last}",
            f"{frame.offset:,}", f"{frame.stored:,}", f"{frame.raw:,}", codecs,
            f"{frame.checksum:016x}", "[green]ok[/]" if good else "[red]bad[/]",
        )  # fmt: skip
    return table, bad
