"""Arms: a way to store KV, which says what comes back and what it costs.

`Stored` is tierloom itself: a pipeline with the codec's own stages and a `files` tier in a folder
of its own stores the KV and retrieves it. Nothing about a codec is known here but its name.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

import tierloom
from tierloom.adapters.quality.subject import Subject, Treated
from tierloom.adapters.transformers.cache import layout_of
from tierloom.pipeline.codec_chain import NONE, ChainStep, codecs, parse_codec
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages.errors import ConfigError, TierloomError
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.allocator import PAGE

__all__ = ["BATCH", "NONE", "Stored", "check_codec", "codecs", "parse_codec"]

BATCH = 32 << 20
"""Bytes that a pipeline moves at once, or one chunk."""


def check_codec(text: str) -> None:
    """Raise ConfigError unless `text` is a chain of codecs whose options are right."""
    try:
        chain = parse_codec(text)
    except ConfigError as e:
        raise ConfigError(f"--{e}") from None
    try:
        load_config(_config(chain, tempfile.gettempdir(), 256, BATCH))
    except ConfigProblems as e:
        said = "; ".join(f"{p.message} ({p.hint})" if p.hint else p.message for p in e.problems)
        raise ConfigError(f"--codec {text}: {said}") from e


class Stored:
    """KV through tierloom: a real pipeline, files in a folder of its own. Close it, or use `with`.

    What counts are the files: header of 4 KiB, frames with all their side data, padding of each
    frame to 4 KiB. What a codec keeps once per model (a calibration) does not count.
    """

    def __init__(self, codec: str, subject: Subject, chunk: int = 256) -> None:
        """Raises ConfigError, with every problem of the codec's options."""
        self.name = codec
        self._folder = tempfile.TemporaryDirectory(prefix="tierloom-quality-")
        shape = subject.shape
        nbytes = 2 * shape.layers * chunk * shape.heads * shape.dim * 2
        arena = 8 * max(nbytes, BATCH)  # a batch as read, as decoded, and as each stage leaves it
        row = torch.empty(1, shape.heads, shape.dim, dtype=torch.bfloat16)
        try:
            self._pipe = tierloom.open(
                _config(parse_codec(codec), self._folder.name, chunk, arena),
                layout=layout_of([(row, row)] * shape.layers),
                model=subject.name, weights=subject.weights, rope=subject.rope,
            )  # fmt: skip
        except BaseException:
            self._folder.cleanup()
            raise

    def treat(self, ids: torch.Tensor, kv: torch.Tensor) -> Treated:
        """Store, count, retrieve. Raises TierloomError when not all of it comes back."""
        tokens, slots = ids.to(torch.int32), torch.arange(len(ids))
        planes = _planes(kv)
        kept = self._pipe.store(tokens, planes, slots, layout=layout_of(planes)).wait()
        files = [p for p in Path(self._folder.name).rglob("*.tlm") if p.is_file()]
        stored, payload = sum(p.stat().st_size for p in files), sum(map(_payload, files))
        back = torch.zeros_like(kv)
        planes = _planes(back)
        came = self._pipe.retrieve(tokens, planes, slots, layout=layout_of(planes)).wait()
        for file in files:
            file.unlink()
        if came.tokens != len(ids):
            lost = {code.name.lower(): n for code, n in {**kept.lost, **came.lost}.items()}
            raise TierloomError(
                f"codec {self.name}: {came.tokens} of {len(ids)} tokens came back ({lost}): "
                "the log says which stage failed"
            )
        return Treated(back, stored, payload)

    def close(self) -> None:
        self._pipe.close()
        self._folder.cleanup()

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _planes(kv: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of each layer's K and V, `[tokens, heads, dim]`."""
    return list(zip(kv[0], kv[1], strict=True))


def _payload(path: Path) -> int:
    with path.open("rb") as file:
        page = file.read(PAGE)
        header = Header.unpack(page + file.read(Header.length(page) - PAGE))
    return sum(frame.stored for frame in header.frames)


def _config(chain: list[ChainStep], folder: str, chunk: int, arena: int) -> dict[str, Any]:
    """`minimal`, with the codecs before a `files` tier instead of memory, and enough time."""
    codecs = {f"codec{i}": {"use": c.use, **c.options} for i, c in enumerate(chain)}
    return {
        "version": 1,
        "extends": "minimal",
        "order": "canonical",
        "chunk": {"tokens": chunk, "grain": math.gcd(chunk, 32)},
        "budget": {"arena": arena},
        "tiers": {"hot": None, "kept": {"use": "files", "path": folder, "timeout": "60 s"}},
        "graphs": {
            "store": {
                "deadline": "600 s",
                "stages": {"hot": None, **codecs, "kept": {"use": "put", "tier": "kept"}},
            },
            "retrieve": {"deadline": "600 s", "stages": {"plan": {"worth": "always"}}},
        },
    }
