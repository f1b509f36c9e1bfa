"""What the tests of pooled tiers need: clients, servers, and a stand-in for libibverbs. Parts of
`install.py`, each of which leaves what is there alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
INFINISTORE = ROOT / ".venv-infinistore"
"""Its server needs an older uvloop than its metadata says, so it has a place of its own."""
VERBS = INFINISTORE / "libfakeverbs.so"
_LIBRARIES = ["libibverbs1", "librdmacm1", "libnuma1", "libcurl4", "libjsoncpp25"]
_SERVER = ["infinistore==0.2.35", "uvloop==0.21.0"]
_SERVER_NEEDS = ["numpy", "fastapi", "uvicorn"]  # and torch, its metadata says, which it never uses


def system_libraries() -> None:
    """What both clients link against; found by dpkg, got by apt-get where we may."""
    shown = subprocess.run(["dpkg", "-s", *_LIBRARIES], capture_output=True, check=False)
    if shown.returncode and shutil.which("apt-get"):
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "--yes", *_LIBRARIES)


def mooncake() -> None:
    """Client, owner and master: all in one wheel, into the environment that runs this."""
    system_libraries()
    if find_spec("mooncake") is None:
        run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[mooncake]")


def infinistore() -> None:
    """The server, in an environment of its own, and the library that lets it start without RDMA."""
    system_libraries()
    python = INFINISTORE / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", str(INFINISTORE))
    library = sysconfig.get_path("purelib", vars={"base": str(INFINISTORE)})
    if not (Path(library) / "infinistore").exists():
        run(str(python), "-m", "pip", "install", "--quiet", *_SERVER_NEEDS)
        run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *_SERVER)
    source = Path(__file__).with_name("fakeverbs.c")
    if not VERBS.exists() or VERBS.stat().st_mtime < source.stat().st_mtime:
        run("cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", str(VERBS), str(source))


def run(*command: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(command, check=True, cwd=ROOT)


PARTS = {"mooncake": mooncake, "infinistore": infinistore}
