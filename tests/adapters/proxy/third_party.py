"""Proxies that other people run, out of vLLM's source distribution; nothing of them is committed.

    .venv/bin/python tests/adapters/proxy/third_party.py        (prints the folder they lie in)

pip finds and loads the archive, but does not build it: that would take a compiler and an hour.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO

VERSION = "0.32.0"
SHA256 = "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad"
_EXAMPLES = "examples/disaggregated"
FILES = {
    "toy": "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py",
    "toy push": f"{_EXAMPLES}/disaggregated_serving/disagg_proxy_pushconnector_demo.py",
    "lmcache": f"{_EXAMPLES}/lmcache/disagg_prefill_lmcache_v1/disagg_proxy_server.py",
}
FOLDER = Path(sys.prefix) / "proxies" / VERSION


def third_party_proxies() -> dict[str, Path]:
    """Their files by name, loaded if they are not there. Raises OSError with the reason."""
    paths = {name: FOLDER / Path(path).name for name, path in FILES.items()}
    if not all(path.is_file() for path in paths.values()):
        done = subprocess.run(
            [sys.executable, __file__], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise OSError(f"vLLM's sources could not be loaded: {last[0]}")
    return paths


def load(into: IO[bytes]) -> None:
    """The archive. Raises RuntimeError, and what pip raises."""
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args(["--no-binary", "vllm", "--no-deps", "vllm"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options=options, session=session)
        links = [c.link for c in finder.find_all_candidates("vllm") if str(c.version) == VERSION]
        links = [link for link in links if not link.is_wheel]
        if not links:
            raise RuntimeError(f"no index has the sources of vllm {VERSION}")
        answer, digest = session.get(links[0].url_without_fragment, stream=True), hashlib.sha256()
        answer.raise_for_status()
        for piece in answer.iter_content(1 << 20):
            digest.update(piece)
            into.write(piece)
    if digest.hexdigest() != SHA256:
        raise RuntimeError(f"the sources of vllm {VERSION} are not those that were tested")


def main() -> None:
    import tempfile

    with tempfile.TemporaryFile() as archive:
        load(archive)
        archive.seek(0)
        FOLDER.mkdir(parents=True, exist_ok=True)
        wanted = {f"vllm-{VERSION}/{path}" for path in FILES.values()}
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                if member.name in wanted:
                    data = tar.extractfile(member)
                    assert data is not None
                    partial = FOLDER / f"{Path(member.name).name}.partial"
                    partial.write_bytes(data.read())
                    partial.rename(partial.with_suffix(""))
    print(FOLDER)


if __name__ == "__main__":
    main()
