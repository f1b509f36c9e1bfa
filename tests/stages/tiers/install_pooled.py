"""What the tests of pooled tiers need: clients, servers, and a stand-in for libibverbs. Parts of
`install.py`, each of which leaves what is there alone."""

from __future__ import annotations

import sys
import sysconfig
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from installing import NotInstalled, apt, pip, run

ROOT = Path(__file__).resolve().parents[3]
INFINISTORE = ROOT / ".venv-infinistore"
"""Its server needs an older uvloop than its metadata says, so it has a place of its own."""
VERBS = INFINISTORE / "libfakeverbs.so"
_LIBRARIES = ["libibverbs1", "librdmacm1", "libnuma1", "libcurl4", "libjsoncpp25"]
_SERVER = ["infinistore==0.2.35", "uvloop==0.21.0"]
_SERVER_NEEDS = ["numpy", "fastapi", "uvicorn"]  # and torch, its metadata says, which it never uses


def libraries() -> None:
    """What both clients link against. One that we may not install, the client names."""
    with suppress(NotInstalled):
        apt(*_LIBRARIES)


def mooncake() -> None:
    """Client, owner and master: all in one wheel, into the environment that runs this."""
    libraries()
    if find_spec("mooncake") is None:
        pip("--editable", f"{ROOT}[mooncake]")


def infinistore() -> None:
    """The server, in an environment of its own, and the library that lets it start without RDMA."""
    libraries()
    python = INFINISTORE / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", str(INFINISTORE))
    library = sysconfig.get_path("purelib", vars={"base": str(INFINISTORE)})
    if not (Path(library) / "infinistore").exists():
        pip(*_SERVER_NEEDS, python=str(python))
        pip("--no-deps", *_SERVER, python=str(python))
    source = Path(__file__).with_name("fakeverbs.c")
    if not VERBS.exists() or VERBS.stat().st_mtime < source.stat().st_mtime:
        run("cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", str(VERBS), str(source))


PARTS = {"mooncake": mooncake, "infinistore": infinistore}
