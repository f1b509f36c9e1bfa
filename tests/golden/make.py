"""Write `data/` and `expected.json` anew: what this very commit keeps, for tests to read later.

    PYTHONPATH=src python tests/golden/make.py

Run it only when a format is changed on purpose, in the commit that changes it, and say there what
becomes of all that users have kept until then. A test that fails is no reason to run it. Wants a
Redis.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), str(HERE.parent / "stages" / "tiers"), *sys.path]

import golden_cases as golden  # noqa: E402
from golden_cases import CASES, DATA  # noqa: E402
from servers import redis  # noqa: E402


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        decoded = {name: _files(name, scratch) for name in golden.FILES}
        _disk(scratch)
        (DATA / "redis").mkdir()
        for name in golden.REDIS:
            decoded[name] = _redis(name, scratch)
        names = {}
        for what, case in golden.IDENTITIES.items():
            names[what] = golden.names_of(case, scratch)
            shutil.rmtree(scratch / "names")
        expected = {"libraries": golden.LIBRARIES, "decoded": decoded, "names": names}
        golden.EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")
    for path in sorted(DATA.iterdir()):
        sizes = [p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file()]
        print(f"{path.name:16} {len(sizes):4} files {sum(sizes):9,} bytes")


def _files(name: str, scratch: Path) -> str:
    case, folder = CASES[name], DATA / "files" / name
    golden.write_files(case, folder, scratch)
    with golden.opened(case, golden.files(folder), scratch) as pipe:
        found = golden.retrieved(pipe, case)
    assert (found == golden.digest(golden.caches(case))) == (not case.lossy), name
    return found


def _disk(scratch: Path) -> None:
    golden.write_disk(DATA / "disk", scratch)
    with golden.write_log(scratch / "open", scratch):
        shutil.copytree(scratch / "open", DATA / "disk-open")


def _redis(name: str, scratch: Path) -> str:
    case = CASES[name]
    with redis() as server:
        with golden.opened(case, golden.redis_at(server.port), scratch) as pipe:
            golden.stored(pipe, case)
            found = golden.retrieved(pipe, case)
        commands = golden.as_commands(golden.kept(server.port))
    (DATA / "redis" / f"{name}.resp").write_bytes(commands)
    return found


if __name__ == "__main__":
    main()
