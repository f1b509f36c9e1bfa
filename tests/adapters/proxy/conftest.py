"""Engines that answer by a formula, and a proxy over them: all real HTTP servers here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("proxy_rig")
sys.path.append(str(Path(__file__).parent))
from proxy_rig import Rig, proxy, renew  # noqa: E402
from stub_engine import InThread, StubEngine  # noqa: E402

from tierloom.adapters.proxy.parts import ProxyParts  # noqa: E402


@pytest.fixture(scope="session")
def engines() -> Iterator[tuple[list[StubEngine], list[int]]]:
    stubs = [StubEngine() for _ in range(4)]
    with InThread(stub.app for stub in stubs) as threads:
        for stub, port in zip(stubs, threads.ports, strict=True):
            stub.port = port
        yield stubs, threads.ports


@pytest.fixture(scope="session")
def running() -> Iterator[tuple[ProxyParts, InThread]]:
    with proxy() as made:
        yield made


@pytest.fixture
def rig(engines, running, request) -> Iterator[Rig]:
    """`request.param`: options of the proxy."""
    (stubs, ports), (parts, threads) = engines, running
    for stub in stubs:
        stub.__dict__.update(seen=[], aborted=[], faults=[], pace=0.0)
    options = getattr(request, "param", {})
    threads.do(lambda: renew(parts, ports, **options))
    made = Rig(stubs, parts, threads)
    with made.client:
        yield made
        made.until(made.at_rest)


@pytest.fixture(autouse=True)
def quiet(caplog) -> None:
    caplog.set_level(logging.INFO, "tierloom.proxy")
