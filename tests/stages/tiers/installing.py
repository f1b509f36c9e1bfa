"""How the parts of `install.py` get what they need: wheels, and Debian's packages as root."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys


class NotInstalled(Exception):
    """Why a part is not there."""


def apt(*packages: str) -> None:
    """Install Debian packages, those that are not there. Their services are not started."""
    if (
        shutil.which("dpkg")
        and not subprocess.run(
            ["dpkg", "-s", *packages], capture_output=True, check=False
        ).returncode
    ):
        return
    if not shutil.which("apt-get"):
        raise NotInstalled(f"no apt-get here: install {' '.join(packages)} by hand")
    if os.geteuid():
        raise NotInstalled(f"not root: apt-get install {' '.join(packages)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-qq", "--no-install-recommends", *packages]
    try:
        run(*install, **quiet)
    except NotInstalled:  # the lists of packages are old, or were never fetched
        run("apt-get", "update", "-qq", **quiet)
        run(*install, **quiet)


def pip(*what: str, python: str = sys.executable) -> None:
    """Install wheels into the environment of `python`, by default this one."""
    run(python, "-m", "pip", "install", "--quiet", *what)
    importlib.invalidate_caches()


def run(*command: str, **environment: str) -> None:
    """Raises NotInstalled, with the last error that was told."""
    try:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False,
            timeout=600,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        errors = [line for line in lines if line.startswith(("E:", "ERROR"))] or lines
        raise NotInstalled(f"{' '.join(command[:3])}: {errors[-1]}")
