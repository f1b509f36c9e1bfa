"""By the code as it is written: no way leads from a lease to a thread but the one that names it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [p for f in ("stages", "pipeline", "adapters") for p in sorted((ROOT / f).rglob("*.py"))]
POOLS = {"pool", "_pool", "calls", "_calls"}
"""What calls into threads go through."""
MAKERS = {"Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor", "Process"}
RUNNERS = {"run_in_executor", "to_thread", "run_sync", "start_new_thread", "submit"}
THREADS = {
    "pipeline/run/threads.py": "Pool.__init__",
    "pipeline/run/loop_thread.py": "Portal.__init__ awaited",
    "pipeline/serve/engine_listener.py": "EngineListener.__init__",  # a loop, as the portal has
    "pipeline/serve/page_events.py": "PageEvents.__init__",  # is told names, touches nothing
    "stages/memory/device_queue.py": "DeviceQueue.__init__",  # waits for a device, touches nothing
    "stages/memory/first_touch.py": "FirstTouch.__init__",  # changes no byte
    "stages/tiers/landing/polled.py": "PolledThread.__init__",  # retains what it touches
    "stages/tiers/pools/mooncake.py": "Mooncake._leave",  # closes the client, touches nothing
    "src/tierloom/testing/bench.py": "Pool.__call__",
    "adapters/demo/on_pd.py": "OnPd._together",  # asks a server while another is asked
    "adapters/vllm/scheduler/lora.py": "LoraAdapters.__init__ LoraAdapters.name",  # reads files
    "adapters/vllm/exchange/reset_socket.py": "ResetSocket.__init__",  # clears pipelines
    "adapters/vllm/scheduler/worker_figures.py": "_asked",  # asks a socket
    "adapters/controller/control_routes.py": "ControlRoutes.__init__ ControlRoutes.call",  # asks
    "adapters/door/http_door.py": "HttpDoor.start",  # reads counters, touches nothing
    "adapters/engine/otlp_spans.py": "OtlpSpans.__init__",  # is told of calls, touches nothing
}
"""Where threads are made or used at all."""
ADDRESSES = {
    "adapters/vllm/repair/rows.py": "Rows._copy",
    "pipeline/handoff/arriving_objects.py": "_damaged",
    "pipeline/handoff/joined_objects.py": "Joining._fill",
    "stages/ops/frame_copy.py": "join _planes",
    "stages/ops/gather.py": "Gather.apply",
    "stages/ops/scatter.py": "Scatter._place",
    "stages/tiers/pools/tier.py": "Pooled._load Pooled._save",
    "stages/tiers/buckets/bucket.py": "Bucket.put",
    "stages/tiers/landing/arrival.py": "Landing._copy",
    "stages/tiers/landing/sender.py": "Sender._write",
    "stages/tiers/nixl/objects.py": "NixlObjects._load",
}
"""Who takes a lease's address: what runs as a named call, or holds the lease itself."""


def scoped(tree: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Each node with the qualified name of the function or class around it."""
    for node in ast.iter_child_nodes(tree):
        yield name, node
        inner = name
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{node.name}" if name else node.name
        yield from scoped(node, inner)


def called(node: ast.AST) -> str:
    """The last name of what a call calls."""
    fn = node.func if isinstance(node, ast.Call) else None
    return fn.attr if isinstance(fn, ast.Attribute) else fn.id if isinstance(fn, ast.Name) else ""


def names_leases(call: ast.Call) -> bool:
    return any(keyword.arg == "leases" for keyword in call.keywords)


def of_a_lease(node: ast.AST, what: str) -> bool:
    """`lease.WHAT`, or that of anything's lease."""
    if not (isinstance(node, ast.Attribute) and node.attr == what):
        return False
    owner = node.value
    return "lease" in (getattr(owner, "attr", ""), getattr(owner, "id", ""))


def faults(path: Path, source: str) -> Iterator[str]:
    """What of a file could touch a lease that nobody holds."""
    place = path.as_posix()
    tree = ast.parse(source)
    kept = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.Return)
    }
    for scope, node in scoped(tree):
        where = f"{place}:{getattr(node, 'lineno', 0)} {scope}"
        call = node if isinstance(node, ast.Call) else None
        at = [s for s in THREADS.get(place, "").split() if scope == s or scope.startswith(f"{s}.")]
        if call and called(call) in MAKERS | RUNNERS and not at:
            yield f"{where}: a thread besides those of the pool"
        if call and called(call) in POOLS and not names_leases(call):
            yield f"{where}: a call into threads that does not name its leases"
        if isinstance(node, ast.Attribute) and node.attr in POOLS and id(node) in kept:
            yield f"{where}: a pool by another name"
        if (
            of_a_lease(node, "address") and place != "stages/kv/layout_check.py"
        ):  # the caller's thread
            yield f"{where}: an address without bounds; say lease.at(begin, nbytes)"
        if call and of_a_lease(call.func, "at") and scope not in ADDRESSES.get(place, "").split():
            yield f"{where}: an address"
        if isinstance(node, ast.Await) and isinstance(node.value, ast.Call):
            args = [a for arg in node.value.args for a in ast.walk(arg)]
            if any(of_a_lease(a, "view") for a in args) and not names_leases(node.value):
                yield f"{where}: awaited over a lease's memory, which is not named"
        finalizer = isinstance(node, ast.FunctionDef) and node.name == "__del__"
        if finalizer or (call and called(call) == "finalize" and "weakref" in ast.unparse(call)):
            yield f"{where}: a finalizer, which runs under whatever lock"
        if call and called(call) == "ref" and len(call.args) > 1:
            yield f"{where}: a callback of a weak reference, which runs under whatever lock"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_threads_get_leases_by_name_alone(path: Path) -> None:
    if path.name in ("arena.py", "testing_arena.py"):
        pytest.skip("leases themselves")
    assert not list(faults(path.relative_to(ROOT), path.read_text()))


@pytest.mark.parametrize(
    "line",
    [
        "await self.ctx.pool(load, lease)",
        "await self._calls(self._load, jobs)",
        "run = self.ctx.pool",
        "threading.Thread(target=load, args=(lease,)).start()",
        "await anyio.to_thread.run_sync(load, lease)",
        "await loop.run_in_executor(None, load, lease)",
        "start = lease.address",
        "start = obj.lease.at(0, 4)",
        "await line.fill(obj.lease.view[:4])",
        "weakref.finalize(body, lease.release)",
        "weakref.ref(body, lease.release)",
        "def __del__(self): self.lease.release()",
    ],
)
def test_each_way_round_is_seen(line: str) -> None:
    body = f"async def f(self, lease, obj, loop):\n    {line}\n"
    assert list(faults(Path("stages/tiers/new.py"), body))


def test_what_names_its_leases_is_let_through() -> None:
    body = """
async def f(self, lease, line):
    await self.ctx.pool(load, lease, leases=(lease,))
    await self._calls(self._wipe, leases=())
    await line.fill(lease.view[:4], leases=(lease,))
    return Calls(self.ctx.pool, 2, self.counts)
"""
    assert not list(faults(Path("stages/tiers/new.py"), body))
