"""`tierloom sglang --check`: what SGLang, or the adapter in it, would refuse on this machine.

Reads the settings and the pipeline, and loads the adapter; no model, no pool, no tier.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tierloom.adapters.cli.sglang_launch import TESTED, refuse_mistakes
from tierloom.stages.errors import ConfigError

PAGE_HASH = {"g++": "g++", "ninja": "ninja-build"}
"""Programs that SGLang compiles its page hash with, and Debian's packages of them."""
NO_GPU = (
    "no GPU here: SGLang's copies between device and host memory are CUDA's, and on a CPU only "
    "stand-ins for them were tested"
)


def run_check(extra: Mapping[str, Any], page: int, *, linker: bool) -> int:
    """Print what is found; 1 where something would be refused, else 0."""
    status = 0
    for name, look in looks(extra, page, linker=linker).items():
        try:
            state, found = "ok", look()
        except ConfigError as error:
            status, state, found = 1, "refused", str(error)
        print(f"{state:<8} {name}: {found}")  # noqa: T201
    for note in _notes():
        print(f"{'note':<8} {note}")  # noqa: T201
    return status


def looks(extra: Mapping[str, Any], page: int, *, linker: bool) -> dict[str, Callable[[], str]]:
    """What is looked at. Each says what it found, or raises ConfigError."""

    def settings() -> str:
        refuse_mistakes(extra, page, linker=linker)
        return f"{extra['tierloom.config']}, pages of {page} tokens"

    return {
        "settings": settings,
        "SGLang": _installed,
        "page hash": _page_hash,
        "adapter": _linker if linker else _hicache,
    }


def missing_compilers() -> list[str]:
    """Debian's packages without which SGLang cannot compile its page hash."""
    return [package for program, package in PAGE_HASH.items() if not shutil.which(program)]


def _installed() -> str:
    if importlib.util.find_spec("sglang") is None:
        raise ConfigError(f"not installed for {sys.executable}: pip install sglang=={TESTED}")
    return importlib.metadata.version("sglang")


def _page_hash() -> str:
    if packages := missing_compilers():
        raise ConfigError(f"SGLang compiles it: apt-get install {' '.join(packages)}")
    return "can be compiled"


def _hicache() -> str:
    cls = _loaded("hicache").TierloomHiCache
    _refuse_unknown(getattr(cls, "__abstractmethods__", ()), "HiCacheStorage")
    return f"{cls.__module__}:{cls.__name__}"


def _linker() -> str:
    module = _loaded("linker")
    _refuse_unknown(module.UNKNOWN, "UnifiedCacheLinker")
    return f"{module.__name__}:{module.TierloomLinker.__name__}"


def _loaded(name: str) -> Any:
    try:
        return importlib.import_module(f"tierloom.adapters.sglang.{name}")
    except Exception as error:  # whatever SGLang's modules do when they are imported
        raise ConfigError(f"cannot be loaded: {type(error).__name__}: {error}") from error


def _refuse_unknown(methods: Any, of: str) -> None:
    if methods:
        raise ConfigError(
            f"this SGLang's {of} wants methods that ours lacks: {', '.join(sorted(methods))}"
        )


def _notes() -> Iterator[str]:
    import torch

    try:
        version = _installed()
    except ConfigError:
        return
    if version != TESTED:
        yield f"SGLang {version} is not the version that was tested, {TESTED}"
    if not torch.cuda.is_available():
        yield NO_GPU
