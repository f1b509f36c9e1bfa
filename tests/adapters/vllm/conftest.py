"""Engines, models, and what an engine without a connector says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).resolve().parent

# Imported by name once; this folder does not stay on the path, for it is called `vllm`.
pytest.register_assert_rewrite("driver_process", "harness", "launch", "serving")
sys.path += [str(HERE), str(HERE.parent)]
import driver_process  # noqa: E402
import harness  # noqa: E402
import launch  # noqa: E402
import models  # noqa: E402
import processes  # noqa: E402
import serving  # noqa: E402, F401

sys.path.remove(str(HERE))
sys.path.remove(str(HERE.parent))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Reference = Callable[..., list[int]]
    Expect = Callable[..., harness.Answer]

_NOISE = ("warmup", "render", "[base.py:380]", "cpu_worker.py", "Loading safetensors", "config: ")
_LOG_FOLDER = pytest.StashKey[Path]()


def _runs_vllm(item: pytest.Item) -> bool:
    return HERE in item.path.parents and item.path.name != "test_vllm_sides.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _runs_vllm(item):
            item.add_marker(pytest.mark.slow)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(600))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _runs_vllm(item) and (reason := harness.why_not()):
        processes.missing("vllm", reason, "make vllm")


def pytest_sessionfinish() -> None:
    launch.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Show the end of the engines' logs with a test that failed."""
    report = yield
    if report.failed and HERE in item.path.parents:
        folder = item.config.stash.get(_LOG_FOLDER, HERE)
        report.sections.extend(driver_process.ends_of_logs(folder, _NOISE))
    return report


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("vllm-logs")
    request.config.stash[_LOG_FOLDER] = folder
    return folder


@pytest.fixture(scope="session")
def _engines(logs: Path) -> Iterator[harness.Engine]:
    one = harness.Engine(logs)
    yield one
    one.close()


@pytest.fixture
def engine(_engines: harness.Engine, request: pytest.FixtureRequest) -> Iterator[harness.Engine]:
    """The process that this and other tests run their engines in, one after another."""
    failed = request.session.testsfailed
    yield _engines
    if request.session.testsfailed > failed:
        _engines.kill()  # whatever state it is in, the next test begins with a new one


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def reference(logs: Path, llama: Path) -> Iterator[Reference]:
    """`reference(prompt, max_tokens=8)`: greedy ids without a connector, in a process of its own.

    Each is computed once, alone and cold.
    """
    plain = harness.Engine(logs, "reference")
    known: dict[str, list[int]] = {}

    def ask(tokens: list[int], *, model: Path = llama, options: Any = None, **how: Any) -> Any:
        key = repr((tokens, model, sorted(how.items()), options))
        if key not in known:
            answer = plain.use(model, **(options or {})).one(tokens, **how)
            assert answer.cached == 0
            known[key] = answer.ids
        return known[key]

    yield ask
    plain.close()


@pytest.fixture(scope="session")
def expect(reference: Reference) -> Expect:
    """`expect(engine, tokens, cached=992)`: the right ids, and so many tokens not computed."""

    def ask(
        engine: harness.Engine, tokens: list[int], *, cached: int | None = None, **how: Any
    ) -> harness.Answer:
        right = reference(tokens, max_tokens=how.get("max_tokens", 8))
        answer = engine.one(tokens, **how)
        assert answer.ids == right, f"wrong tokens, {answer.cached} of the prompt's from a cache"
        if cached is not None:
            assert answer.cached == cached
        return answer

    return ask
