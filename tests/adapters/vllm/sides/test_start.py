"""Starting: the fewest flags, copies of a model and engines on one host, mistakes said early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import launch
import pytest
from harness import PATIENT, Engine, prompt, transfer
from serving import Server

if TYPE_CHECKING:
    from conftest import Expect, Reference

CASES = Path(__file__).with_name("start_cases.py")
FLAG = "kv-transfer-config"


def test_before_the_engine(llama: Path) -> None:
    run = launch.finish(CASES, str(llama), timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    written = re.findall(r"^def (\w+)\(\) -> None:", CASES.read_text(), re.MULTILINE)
    said = [line for line in run.stdout.splitlines() if line in written]
    assert said == written


@pytest.mark.timeout(900)
def test_copies_and_engines_side_by_side(
    engine: Engine, llama: Path, logs: Path, expect: Expect, reference: Reference, tmp_path: Path
) -> None:
    """Two copies of a dense model and another engine, all with default settings, in one home."""
    home = {"HOME": str(tmp_path)}
    sizes = {"TIERLOOM_MEMORY": "64 MiB", "TIERLOOM_DISK": "256 MiB"}
    flags = {f"{FLAG}.kv_connector_extra_config.{key}": value for key, value in PATIENT.items()}
    flags |= {f"{FLAG}.kv_connector": "TierloomConnector", f"{FLAG}.kv_role": "kv_both"}
    server = Server(
        llama, {}, logs / "copies.log", env=home | sizes,
        **{FLAG: None, "data-parallel-size": 2}, **flags,
    )  # fmt: skip
    try:
        server.wait_ready(400)
        folder = tmp_path / ".cache" / "tierloom"
        assert (folder / "lock").is_file()
        assert (folder / "dp1" / "lock").is_file()
        tokens = prompt(1000, seed=700)
        for _ in range(4):
            assert server.complete(tokens)["ids"] == reference(tokens)
        kv = transfer("tiered")
        assert "tiers.warm.path" not in kv["kv_connector_extra_config"]
        other = prompt(1000, seed=701)
        for cached in (0, 992):  # found again after a restart, though the first folder is taken
            engine.use(llama, kv, env=home, fresh=True)
            begun = engine.log_text()
            assert re.search(r"tierloom: disk tier uses \S+/tierloom-2: ", begun)
            assert re.search(r"tierloom: storing the KV of ", begun)
            expect(engine, other, cached=cached, name="one")
            engine.settle()
            assert re.search(r"tierloom: request one\S*: ", engine.log_text()[len(begun) :])
            engine.close()
    finally:
        server.close()
