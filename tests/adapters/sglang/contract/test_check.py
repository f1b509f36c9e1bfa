"""`tierloom sglang --check` with SGLang itself: nothing that ours lacks, and no model loaded."""

from __future__ import annotations

import pytest

from tierloom.adapters.cli.sglang_check import run_check


@pytest.mark.parametrize("linker", [False, True])
def test_this_sglang_refuses_nothing(monkeypatch, capsys, linker: bool) -> None:
    monkeypatch.setenv("TIERLOOM_MEMORY", "64 MiB")
    assert run_check({"tierloom.config": "tiered"}, 32, linker=linker) == 0
    said = capsys.readouterr().out
    assert "refused" not in said
    assert "adapter: tierloom.adapters.sglang." in said
