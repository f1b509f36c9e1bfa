"""What happens before vLLM's engine starts, without an engine: run by vLLM's own Python.

    python start_cases.py MODEL

Prints the names of the cases that held.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from types import SimpleNamespace as Bag
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tierloom import ConfigError
from tierloom.adapters.engine.rank import Rank
from tierloom.adapters.model_identity.shared import shared_id
from tierloom.adapters.vllm.connector import register
from tierloom.adapters.vllm.exchange import early_check as vllm_check
from tierloom.adapters.vllm.exchange.log import speak
from tierloom.adapters.vllm.exchange.messages import Save
from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.adapters.vllm.worker.pipelines import _shared
from tierloom.adapters.vllm.worker.transfer_log import TransferLog
from tierloom.stages.kv.prefix import Span

MODEL = sys.argv[1]
FLAG = "--kv-transfer-config"
OURS = (f"{FLAG}.kv_connector", "TierloomConnector", f"{FLAG}.kv_role", "kv_both")
EXTRA = f"{FLAG}.kv_connector_extra_config"


def config(*flags: str) -> Any:
    """vLLM's configuration, made as `vllm serve` makes it of its command line."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    plain = ("--model", MODEL, "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")
    return EngineArgs.from_cli_args(parser.parse_args([*plain, *flags])).create_engine_config()


def refused(make: Any) -> str:
    """What a configuration is refused with."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    raise AssertionError("it was taken")


def nothing_is_imported_that_breaks_a_worker_in_this_process() -> None:
    """vLLM's CPU worker looks for kernels in every module that is there when it starts, and breaks
    on llvmlite's. A codec brings it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    config(*OURS, f"{EXTRA}.tierloom.config", "cachegen")
    assert "llvmlite" not in sys.modules
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"


def dotted_flags_without_json_are_enough() -> None:
    conf = configured(config(*OURS).kv_transfer_config.kv_connector_extra_config)
    assert conf.settings == configured({}).settings
    os.environ |= {"TIERLOOM_MEMORY": "3 GiB", "TIERLOOM_DIR": "/data/kv", "TIERLOOM_DISK": "9 GiB"}
    hot, warm = (tier.options for tier in conf.pipeline().tiers.values())
    assert (hot.capacity, warm.capacity, warm.path) == (3 << 30, 9 << 30, "/data/kv")


def dotted_flags_reach_the_settings_and_the_pipeline() -> None:
    given = config(
        *OURS, f"{EXTRA}.tierloom.save_decode", "true", f"{EXTRA}.tierloom.wait", "100ms",
        f"{EXTRA}.tiers.hot.capacity", "1 GiB", f"{EXTRA}.tiers.warm.path", "/data/kv",
    )  # fmt: skip
    conf = configured(given.kv_transfer_config.kv_connector_extra_config)
    assert (conf.settings.save_decode, conf.settings.wait) == (True, 0.1)
    tiers = conf.pipeline().tiers
    assert (tiers["hot"].options.capacity, tiers["warm"].options.path) == (1 << 30, "/data/kv")


def mistakes_are_said_while_vllm_makes_its_configuration() -> None:
    for flags, says in (
        (("tierloom.wait", "250"), "tierloom.wait: 250 has no unit; write '250 ms' or '250 s'"),
        (("tierloom.wait", "5m"), "tierloom.wait: 5000000 has no unit"),  # vLLM makes it 5 million
        (("tierloom.laod", "layer"), "tierloom: unknown key 'laod'\n    hint: did you mean 'load"),
        (("tiers.hot.kapacity", "1"), "tiers.hot: unknown key 'kapacity'"),
        (("tierloom.config", "teired"), "no preset is called 'teired'"),
    ):
        said = refused(partial(config, *OURS, f"{EXTRA}.{flags[0]}", *flags[1:]))
        assert said.startswith(f"kv_connector_extra_config: {says}"), said


def mistakes_of_a_child_are_said_too() -> None:
    child = {
        "kv_connector": "TierloomConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"tierloom.load": "sync"},
    }  # fmt: skip
    from vllm.config import KVTransferConfig

    args = EngineArgs(model=MODEL, dtype="float32", max_model_len=1024, enforce_eager=True)
    args.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both",
        kv_connector_extra_config={"connectors": [child]},
    )  # fmt: skip
    assert "tierloom.load: wants one of async, layer" in refused(args.create_engine_config)


def other_connectors_and_a_failing_check_are_left_alone() -> None:
    other = (f"{FLAG}.kv_connector", "ExampleConnector", f"{FLAG}.kv_role", "kv_both")
    assert config(*other, f"{EXTRA}.tierloom.wait", "250").kv_transfer_config is not None
    sound, vllm_check.configured = vllm_check.configured, lambda extra: 1 / 0
    try:
        assert config(*OURS, f"{EXTRA}.tierloom.min_tokens", "7").kv_transfer_config is not None
    finally:
        vllm_check.configured = sound


def registering_again_changes_nothing() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as Factory

    before = Factory.get_connector_class
    register()
    assert Factory.get_connector_class == before
    vllm_check.check_early(Bag())  # a factory that has changed


def each_process_of_an_engine_has_a_folder_of_its_own() -> None:
    """(tensor rank, size; pipeline rank, size; index of the copy, size)."""
    names = {
        (0, 1, 0, 1, 0, 1): "",
        (0, 1, 0, 1, 1, 1): "dp1",  # of a dense model vLLM says that there is one copy
        (1, 2, 0, 1, 1, 1): "dp1-tp1of2",
        (0, 1, 0, 1, 0, 2): "dp0of2",
        (1, 2, 1, 2, 1, 2): "dp1of2-tp1of2-pp1of2",
    }
    assert {Rank(*at).folder for at in names} == set(names.values())
    assert [Rank(*at).folder for at in names] == list(names.values())


def what_no_file_says_of_a_model_is_not_shared_with_sglang() -> None:
    shares = configured({"tierloom.keys": "sglang"})
    plain, dummy = config(), config("--load-format", "dummy")
    assert _shared(plain, configured({})) is None
    assert _shared(plain, shares) == shared_id(MODEL, dtype="float32")
    said: list[str] = []
    ours, ear = logging.getLogger("tierloom.vllm"), logging.Handler()
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    ours.addHandler(ear)
    assert _shared(dummy, shares) is None
    ours.removeHandler(ear)
    assert "shared with vLLM alone, not with SGLang" in said[0]
    assert "load format dummy" in said[0]
    named = configured({"chunk.keys": "sglang", "tierloom.weights": "mine"})
    assert _shared(dummy, named) == ("mine", shared_id(MODEL, dtype="float32").rope)


def lines_name_us_and_say_what_stands_beside_them() -> None:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ours, theirs = logging.getLogger("tierloom"), logging.getLogger("vllm")
    init_logger("vllm.some")
    usual, theirs.handlers = theirs.handlers, [Ear()]
    try:
        speak()
        TransferLog().stored(Save(1, "r", Span(b"", b"", 0, 0), ()), [])
        log = logging.getLogger("tierloom.stages.tiers.contract.circuit_breaker")
        log.warning("tier is down", extra={"tier": "a%s", "cause": "redis://u:s3cret@h is gone"})
        speak()
        log.error("100 %% of %s", "it")
    finally:
        theirs.handlers, ours.handlers = usual, []
    assert heard[0].startswith("tierloom: request r: 0 tokens to store, 0 stored")
    assert heard[1:] == [
        "tierloom: tier is down (tier: a%s, cause: redis://***@h is gone)",
        "tierloom: 100 % of it",
    ]


CASES = [
    nothing_is_imported_that_breaks_a_worker_in_this_process,
    dotted_flags_without_json_are_enough,
    dotted_flags_reach_the_settings_and_the_pipeline,
    mistakes_are_said_while_vllm_makes_its_configuration,
    mistakes_of_a_child_are_said_too,
    other_connectors_and_a_failing_check_are_left_alone,
    registering_again_changes_nothing,
    each_process_of_an_engine_has_a_folder_of_its_own,
    what_no_file_says_of_a_model_is_not_shared_with_sglang,
    lines_name_us_and_say_what_stands_beside_them,
]

if __name__ == "__main__":
    for case in CASES:
        case()
        print(case.__name__, flush=True)
