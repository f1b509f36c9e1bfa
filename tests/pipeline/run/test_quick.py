"""What costs less than a thread runs on the loop; gates that open are missed by nobody."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import Engine, config, tokens

from tierloom.stages.contract.gates import LayerGates
from tierloom.stages.ops.decode import Decode
from tierloom.stages.ops.hash import _SHORT, Hash

if TYPE_CHECKING:
    from conftest import Open


def ran(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str) -> list[str]:
    """Names of the threads that run a method of a stage from now on."""
    threads: list[str] = []
    method = getattr(cls, name)

    def noted(self: Any, item: Any) -> None:
        threads.append(threading.current_thread().name)
        method(self, item)

    monkeypatch.setattr(cls, name, noted)
    return threads


@pytest.mark.parametrize("count", [64, _SHORT, _SHORT + 64])
@pytest.mark.parametrize("codec", [None, "zstd"])
def test_where_stages_run(
    opened: Open, monkeypatch: pytest.MonkeyPatch, count: int, codec: str | None
) -> None:
    hashed, decoded = ran(monkeypatch, Hash, "plan"), ran(monkeypatch, Decode, "apply")
    made = config()
    if codec:
        stages = made["graphs"]["store"]["stages"]
        stages |= {"host": {"use": "to_host"}, "small": {"use": codec}, "hot": stages.pop("hot")}
    engine = Engine(blocks=80)
    pipe, ids, at = opened(made, engine), tokens(count), engine.slots(count)
    assert pipe.store(ids, engine.caches, at).wait().tokens == count
    target = engine.blank()
    assert pipe.retrieve(ids, target.caches, at).wait().tokens == count
    assert np.array_equal(engine.rows(at[:64]), target.rows(at[:64]))
    short = count <= _SHORT
    assert all(name.startswith("tierloom-portal") == short for name in hashed)
    assert all(name.startswith("tierloom-portal") == (codec is None) for name in decoded)
    assert len(hashed) == 2


def test_gates_open_for_all_who_wait() -> None:
    """Whenever they come: before the first gate opens, in between, or afterwards."""
    for turn in range(50):
        gates, passed = LayerGates(6), []
        gates.expect(2)

        def wait(group: int, gates: LayerGates = gates, passed: list[bool] = passed) -> None:
            passed.append(gates.wait(group, 99) if group >= 0 else gates.wait_all(99))

        waiting = [
            threading.Thread(target=wait, args=(group,), daemon=True)
            for group in (*range(6), -1, -1)
        ]
        for thread in waiting:
            thread.start()
        while turn % 2 and len(gates._changed._waiters) < 8:  # type: ignore[attr-defined]
            time.sleep(0.001)
        for _ in range(2):
            for group in range(6):
                gates.passed([group])
        for thread in waiting:
            thread.join(30)
        assert passed == [True] * 8
        assert gates.all_open


def test_gates_that_stay_shut() -> None:
    gates = LayerGates(3)
    gates.expect(2)
    gates.passed(range(3))
    gates.passed([1])
    assert not gates.all_open
    assert gates.wait(1, 0.0)
    assert not gates.wait(0, 0.001)
    assert not gates.wait_all(0.001)
    gates.open()
    assert gates.wait_all(0.0)
    gates = LayerGates(3)
    gates.expect(0)
    assert gates.all_open, "there is nothing to wait for"
