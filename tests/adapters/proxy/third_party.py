"""Proxies that other people run, out of source distributions; nothing of them is committed.

    .venv/bin/python tests/adapters/proxy/third_party.py        (prints the folder they lie in)

pip finds and loads the archives, but does not build them: that would take a compiler and an hour.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

_EXAMPLES = "examples/disaggregated"


class Release(NamedTuple):
    """A source distribution, and which of its files are wanted."""

    package: str
    version: str
    sha256: str
    files: dict[str, str]

    @property
    def folder(self) -> Path:
        return FOLDER / (self.version if self.package == "vllm" else f"{self[0]}-{self[1]}")


VLLM = Release(
    "vllm", "0.32.0", "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad", {
        "toy": "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py",
        "toy push": f"{_EXAMPLES}/disaggregated_serving/disagg_proxy_pushconnector_demo.py",
        "lmcache": f"{_EXAMPLES}/lmcache/disagg_prefill_lmcache_v1/disagg_proxy_server.py",
    },
)  # fmt: skip
LMCACHE = Release(
    "lmcache", "0.5.6", "d6951e60ce8818a76aa42d0866a4ba85f1c95cd919355fff30ff24dcc3243f1e",
    {"told": "examples/disagg_prefill/disagg_proxy_server.py"},
)  # fmt: skip
RELEASES = (VLLM, LMCACHE)
FOLDER = Path(sys.prefix) / "proxies"


def third_party_proxies() -> dict[str, Path]:
    """Their files by name, loaded if they are not there. Raises OSError with the reason."""
    paths = {
        name: release.folder / Path(path).name
        for release in RELEASES
        for name, path in release.files.items()
    }
    if not all(path.is_file() for path in paths.values()):
        done = subprocess.run(
            [sys.executable, __file__], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise OSError(f"their sources could not be loaded: {last[0]}")
    return paths


def load(release: Release, into: IO[bytes]) -> None:
    """An archive. Raises RuntimeError, and what pip raises."""
    from pip._internal.commands import create_command

    command = create_command("download")
    package, version, *_ = release
    options, _ = command.parse_args(["--no-binary", package, "--no-deps", package])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options=options, session=session)
        links = [c.link for c in finder.find_all_candidates(package) if str(c.version) == version]
        links = [link for link in links if not link.is_wheel]
        if not links:
            raise RuntimeError(f"no index has the sources of {package} {version}")
        answer, digest = session.get(links[0].url_without_fragment, stream=True), hashlib.sha256()
        answer.raise_for_status()
        for piece in answer.iter_content(1 << 20):
            digest.update(piece)
            into.write(piece)
    if digest.hexdigest() != release.sha256:
        raise RuntimeError(f"the sources of {package} {version} are not those that were tested")


def unpack_files(release: Release) -> None:
    """Load what is wanted of it. Raises RuntimeError, and what pip raises."""
    import tempfile

    with tempfile.TemporaryFile() as archive:
        load(release, archive)
        archive.seek(0)
        release.folder.mkdir(parents=True, exist_ok=True)
        wanted = {f"{release.package}-{release.version}/{path}" for path in release.files.values()}
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                if member.name in wanted:
                    data = tar.extractfile(member)
                    assert data is not None
                    partial = release.folder / f"{Path(member.name).name}.partial"
                    partial.write_bytes(data.read())
                    partial.rename(partial.with_suffix(""))


def main() -> None:
    for release in RELEASES:
        if not all((release.folder / Path(path).name).is_file() for path in release.files.values()):
            unpack_files(release)
    print(FOLDER)


if __name__ == "__main__":
    main()
