"""Traces to replay: a public one where it is at hand, and one like it that is made here."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pools
import pytest

from tierloom.testing import PoisonArena

ROOT = Path(__file__).resolve().parents[3]
USER = 65534
"""The id of a user who has no rights."""
CONVERSATION = ROOT.parent / "shared" / "traces" / "mooncake_conversation_trace.jsonl"


@pytest.fixture(autouse=True)
def over_poison(poisoned: list[PoisonArena]) -> list[PoisonArena]:
    """The whole folder runs over memory into which nobody may write late."""
    return poisoned


@pytest.fixture(scope="session")
def conversation() -> list[list[int]]:
    """Block ids per request of Mooncake's conversation trace."""
    if not CONVERSATION.exists():
        pytest.skip(f"{CONVERSATION} is not here")
    with CONVERSATION.open() as file:
        return [json.loads(line)["hash_ids"] for line in file]


@pytest.fixture(scope="session")
def generated() -> list[list[int]]:
    """Sessions that grow turn by turn, some far more wanted than others."""
    rng = random.Random(0)
    sessions: dict[int, list[int]] = {}
    fresh = iter(range(1, 1 << 40))
    requests = []
    for _ in range(3000):
        session = sessions.setdefault(int(rng.paretovariate(0.6)) % 4000, [0])
        if len(session) > 40:
            del session[1:]
        session.extend(next(fresh) for _ in range(rng.randint(1, 6)))
        requests.append(list(session))
    return requests


@pytest.fixture(scope="module")
def mooncake_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pools.MooncakePool]:
    """A master and one owner, shared by the tests of a module."""
    pools.require("mooncake")
    pool = pools.MooncakePool(tmp_path_factory.mktemp("mooncake"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def infini_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pools.InfiniServer]:
    """A server, shared by the tests of a module."""
    pools.require("infinistore")
    server = pools.InfiniServer(tmp_path_factory.mktemp("infinistore"))
    yield server
    server.kill()


@pytest.fixture
def other_user() -> Iterator[Path]:
    """A folder of a user who is not root, as whom all of this process's threads go on."""
    folder = Path(tempfile.mkdtemp(prefix="tierloom-user-"))
    os.chown(folder, USER, USER)
    folder.chmod(0o755)
    os.setegid(USER)
    os.seteuid(USER)
    try:
        yield folder
    finally:
        os.seteuid(0)
        os.setegid(0)
        shutil.rmtree(folder)
