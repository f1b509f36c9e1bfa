"""Keep the checkout's root off sys.path.

There, `adapters` and `triton_kernels` would pass for other people's packages.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VLLM = ROOT / "tests" / "adapters" / "vllm"
SGLANG = ROOT / "tests" / "adapters" / "sglang"
TIERS = ROOT / "tests" / "stages" / "tiers"
SERVED = [VLLM, SGLANG, ROOT / "tests" / "pipeline" / "remote"]
SERVED += [TIERS / folder for folder in ("buckets", "nixl", "pools", "redis", "server")]
ALONE = {"test_vllm_sides.py", "test_redis_resp.py", "test_wire.py"}
"""Files of these folders that need neither a server nor an engine."""
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]

# Files run side by side on all cores: threads of torch, which spin while they wait for one
# another, would cost several times what they compute. Read when torch is imported, by children too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # the same threads
# Hundreds of processes are started, and each would compile all that it imports, this suite as well.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What tests share is imported once by name. This folder does not stay on the path: its own folders
# would pass for other people's packages, too.
sys.path.append(str(ROOT / "tests"))
import bounds  # noqa: E402, F401
import fake_cuda  # noqa: E402, F401
import tiny  # noqa: E402, F401

sys.path.pop()
sys.path.append(str(TIERS))  # servers: other folders need them, too


def touched(thing):
    """The leases that a call's arguments lead to."""
    from tierloom.stages.contract.batch import Batch
    from tierloom.stages.memory.arena import Lease

    if isinstance(thing, Lease):
        return [thing]
    if isinstance(thing, Batch):
        return thing.leases()
    if hasattr(thing, "lease"):
        return [thing.lease]
    if isinstance(thing, list | tuple):
        return [lease for each in thing for lease in touched(each)]
    return []


@pytest.fixture
def poisoned(monkeypatch):
    """Pipelines and depots are made over memory that tells who writes into it late, and every call
    that is handed leases must name them. A list of these arenas.

    TIERLOOM_COPYING=8: so many threads copy, however few cores there are.
    """
    from tierloom.pipeline.run.threads import Pool
    from tierloom.stages.memory.held import Call
    from tierloom.testing.arena import PoisonArena

    made = []

    def arena(*sizes, **options):
        made.append(PoisonArena(*sizes, **options))
        return made[-1]

    def pool(threads, name):
        copying = int(os.environ.get("TIERLOOM_COPYING", "0"))
        return Pool(copying or threads if name == "work" else threads, name)

    monkeypatch.setattr("tierloom.pipeline.runtime.Arena", arena)
    monkeypatch.setattr("tierloom.pipeline.serve.object_store.Arena", arena)
    begin = Call.__init__

    def named(call, fn, args, leases):
        leases = tuple(leases)
        missing = [lease for lease in touched(args) if lease not in leases]
        assert not missing, f"{fn} is handed leases that its call does not name: {missing}"
        begin(call, fn, args, leases)

    monkeypatch.setattr("tierloom.pipeline.runtime.Pool", pool)
    monkeypatch.setattr(Call, "__init__", named)
    yield made
    for each in made:
        each.check()


def pytest_collection_modifyitems(config, items):
    """Long campaigns run when they are asked for. The folder that takes longest goes first: tests
    run side by side, and end together so.

    A contract cannot mark its tests: whoever else runs it knows no such mark.
    """
    if "campaign" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("campaign")]
    parents = {path: set(path.parents) for path in {item.path for item in items}}
    items.sort(key=lambda item: VLLM not in parents[item.path])
    for item in items:
        if item.name == "test_hostile_bytes":
            item.add_marker("slow")
        if item.path.name not in ALONE and not parents[item.path].isdisjoint(SERVED):
            item.add_marker("server")
