"""A real SGLang engine on the CPU, models for it, and its logs with a test that failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).resolve().parent
CONTRACT = HERE / "contract"
VLLM = HERE.with_name("vllm")

# Imported by name once; these folders do not stay on the path, for they are called like packages.
pytest.register_assert_rewrite("driver_process", "harness", "launch", "real_engine")
sys.path += [str(HERE), str(VLLM), str(HERE.parent)]
import driver_process  # noqa: E402
import harness  # noqa: E402, F401
import launch  # noqa: E402, F401
import models  # noqa: E402
import processes  # noqa: E402
import real_engine  # noqa: E402

sys.path.remove(str(HERE))
sys.path.remove(str(VLLM))
sys.path.remove(str(HERE.parent))

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOISE = ("UserWarning", "warnings.warn", "Ignore import error", "Multi-thread loading")
_LOG_FOLDER = pytest.StashKey[Path]()
_RUNNING: list[real_engine.Engine] = []


def _runs_sglang(item: pytest.Item) -> bool:
    return HERE in item.path.parents and CONTRACT not in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _runs_sglang(item):
            item.add_marker(pytest.mark.slow)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(600))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _runs_sglang(item) and (reason := real_engine.why_not()):
        processes.missing("sglang", reason, "make sglang")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Show the end of the engines' logs with a test that failed."""
    report = yield
    if report.failed and _runs_sglang(item):
        folder = item.config.stash.get(_LOG_FOLDER, HERE)
        report.sections.extend(driver_process.ends_of_logs(folder, _NOISE))
    return report


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("sglang-logs")
    request.config.stash[_LOG_FOLDER] = folder
    return folder


@pytest.fixture(scope="session")
def _engines(logs: Path) -> Iterator[real_engine.Engine]:
    one = real_engine.Engine(logs)
    _RUNNING.append(one)
    yield one
    one.close()


@pytest.fixture(scope="module", autouse=True)
def _no_engine_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """SGLang's scheduler looks for work without a pause: an idle one takes a core from others."""
    yield
    for one in _RUNNING:
        one.stop()


@pytest.fixture
def engine(
    _engines: real_engine.Engine, request: pytest.FixtureRequest
) -> Iterator[real_engine.Engine]:
    """The one engine that tests share while they want the same: a start takes a minute or two."""
    failed = request.session.testsfailed
    yield _engines
    if request.session.testsfailed > failed:
        _engines.end()  # whatever state it is in, the next test begins with a new one


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama that vLLM's tests have, so that one text can be shared by the engines."""
    return models.llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from tierloom.adapters.demo import smollm2
    from tierloom.stages.errors import ConfigError

    try:
        return smollm2.model_dir(progress=False)
    except ConfigError as missing:
        pytest.skip(str(missing))
