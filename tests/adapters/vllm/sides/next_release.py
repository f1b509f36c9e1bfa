"""vLLM's next release as far as it runs without its kernels: Python files, for `sim.py`.

    .venv-vllm/bin/python tests/adapters/vllm/sides/next_release.py 0.33.0 FOLDER

There is no CPU build of it. Its scheduler and its connectors' base class are plain Python, which
finds compiled parts missing and does without. FOLDER then goes in front of the Python path.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch(version: str, folder: Path) -> None:
    """Put the Python files of a release into `folder`, under a name that passes for a CPU build."""
    told = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    if told.exists():
        return
    with tempfile.TemporaryDirectory() as there:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", there,
             "--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", f"vllm=={version}"],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(there).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if name.endswith(".py"):
                    files.extract(name, folder)
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    fetch(sys.argv[1], Path(sys.argv[2]))
