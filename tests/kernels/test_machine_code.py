"""Compiled code is kept where this user may write, and no call fails for want of such a place.

Each case is a process of its own: where code is kept is settled while a module is imported. A file
in a folder's place stops root too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOWHERE = "/dev/null/home"

MODULE = """
from tierloom.triton_kernels.memory.machine_code import compiled

@compiled(nogil=True)
def twice(x):
    return 2 * x
"""
CALL = """
import json, os, sys
sys.path.insert(0, {folder!r})
{before}
import one
{between}
assert one.twice(21) == 42
print(json.dumps([one.twice._cache.cache_path, sum(one.twice.stats.cache_hits.values())]))
"""


class User:
    """Who calls a function that is compiled: its source, a home and a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.source, self.temporary = folder / "source", folder / "tmp"
        for made in (self.source, self.temporary):
            made.mkdir()
        (self.source / "one.py").write_text(MODULE)
        self.env = {"HOME": NOWHERE, "TMPDIR": str(self.temporary)}
        self.kept = self.temporary / f"tierloom-{os.geteuid()}"

    def may_not_write(self) -> User:
        (self.source / "__pycache__").write_text("in its place")
        return self

    def runs(self, code: str, cwd: Path | None = None) -> str:
        dropped = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME"}
        env = {k: v for k, v in os.environ.items() if k not in dropped} | self.env
        env |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300,
            cwd=cwd or self.source, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout

    def settled(self, *modules: str) -> list[str]:
        """Where Triton keeps its code, once each of our modules has been imported first."""
        return self.runs(SETTLED.format(modules=modules)).splitlines()

    def calls(self, before: str = "", between: str = "", cwd: Path | None = None) -> Any:
        """Where the code was kept, and how often it was found there."""
        code = CALL.format(folder=str(self.source), before=before, between=between)
        where, hits = json.loads(self.runs(code, cwd))
        return where and Path(where), hits


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def test_beside_the_source_as_ever(user: User) -> None:
    assert [user.calls() for _ in range(2)] == [(user.source / "__pycache__", n) for n in (0, 1)]
    assert not user.kept.exists()


def test_another_numba_leaves_it_as_it_is(user: User) -> None:
    older = "import numba; numba.__version__ = '0.1'"
    where = user.source / "__pycache__"
    assert [user.calls(b) for b in ("", older, "", older)] == [(where, n) for n in (0, 0, 1, 1)]


def test_in_a_folder_of_this_user_where_nothing_else_can_be_written(user: User) -> None:
    user.may_not_write()
    (where, hits), (again, found) = user.calls(), user.calls()
    assert (where, hits, found) == (again, 0, 1)
    assert user.kept / "numba" in where.parents
    assert user.kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file", "movable", "no temporary"])
def test_nothing_is_run_that_others_could_have_put_there(user: User, trap: str) -> None:
    """Then it is compiled in each process anew."""
    user.may_not_write()
    if trap == "open to others":
        user.kept.mkdir()
        user.kept.chmod(0o777)
    elif trap == "a link":
        (user.temporary / "elsewhere").mkdir(mode=0o700)
        user.kept.symlink_to(user.temporary / "elsewhere")
    elif trap == "a file":
        user.kept.write_text("")
    elif trap == "movable":
        user.temporary.chmod(0o777)
    else:
        user.env["TMPDIR"] = NOWHERE
        user.temporary.rmdir()
    nobody = "import tempfile; tempfile.tempdir = os.environ['TMPDIR']"
    assert user.calls(before=nobody) == (None, 0)


def test_where_numba_is_told_to(user: User, tmp_path: Path) -> None:
    user.env["NUMBA_CACHE_DIR"] = str(tmp_path / "told")
    assert tmp_path / "told" in user.may_not_write().calls()[0].parents


def test_a_user_without_a_home_gets_none_in_the_folder_he_is_in(user: User, tmp_path: Path) -> None:
    user.may_not_write()
    here = tmp_path / "here"
    here.mkdir()
    unknown = (
        "import pwd\ndef nobody(_): raise KeyError\npwd.getpwuid = nobody\ndel os.environ['HOME']"
    )
    assert user.kept in user.calls(before=unknown, cwd=here)[0].parents
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_code_that_cannot_be_read_is_compiled_anew(user: User, suffix: str) -> None:
    """Once: then it is kept again. Nothing is left of a file, or half."""
    where, _ = user.calls()
    for left in (0, 0.5):
        (file,) = where.glob(f"one.twice-*.{suffix}")
        file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
        assert [user.calls() for _ in range(2)] == [(where, 0), (where, 1)]


def test_code_that_cannot_be_written_is_used_all_the_same(user: User) -> None:
    """The folder went, or its disk is full, after the module was imported."""
    where = user.source / "__pycache__"
    full = f"os.rmdir({str(where)!r}); open({str(where)!r}, 'w').close()"
    assert user.calls(before="sys.dont_write_bytecode = True", between=full) == (where, 0)


def test_one_place_decides() -> None:
    files = (f for n in ("triton_kernels", "stages", "pipeline") for f in (ROOT / n).rglob("*.py"))
    assert [f.name for f in files if re.search(r"jit\(.*cache=", f.read_text())] == []


SETTLED = """
import importlib, os, sys
told = dict(os.environ)
for module in {modules}:
    os.environ.clear()
    os.environ.update(told)
    for ours in [name for name in sys.modules if name.startswith("tierloom")]:
        del sys.modules[ours]
    importlib.import_module(f"tierloom.triton_kernels.{{module}}")
    print(os.environ.get("TRITON_CACHE_DIR"))
"""
COMPILES = f"""
import sys; sys.path.append({str(Path(__file__).parent)!r})
from test_aot import OTHERS, compile_for
compile_for(OTHERS["rANS compact"], "sm_80")
"""
KERNELS = [
    ".".join(f.relative_to(ROOT / "triton_kernels").with_suffix("").parts)
    for f in (ROOT / "triton_kernels").rglob("*.py")
    if "@triton.jit" in f.read_text()
]


def test_triton_keeps_its_code_there_too(user: User) -> None:
    """Whichever module is imported first."""
    assert len(KERNELS) > 5
    assert user.settled(*KERNELS) == [str(user.kept / "triton")] * len(KERNELS)


def test_a_kernel_compiles_without_a_home(user: User) -> None:
    user.runs(COMPILES)
    assert list((user.kept / "triton").rglob("rans_compact.cubin"))


def test_triton_keeps_its_code_where_it_is_told_to_or_ever_did(user: User, tmp_path: Path) -> None:
    user.env["TRITON_CACHE_DIR"] = "/told"
    assert user.settled("memory.launch") == ["/told"]
    del user.env["TRITON_CACHE_DIR"]
    user.env["HOME"] = str(tmp_path)
    assert user.settled("memory.launch") == ["None"]
    assert not (tmp_path / ".triton").exists(), "asking makes nothing"
