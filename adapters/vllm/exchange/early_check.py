"""The user's settings, checked while vLLM makes its configuration, before an engine's process is.

vLLM shows them to no connector so early on every platform, but it asks its factory for the class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from vllm import envs

from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.stages.errors import ConfigError

log = logging.getLogger("tierloom.vllm")

_known: set[str] = set()
"""Settings that were found right, as text."""


def check_settings(extra: Mapping[str, Any]) -> None:
    """Raise ConfigError, with every problem of the settings and of the pipeline that they name.
    Imports the classes that it names, opens nothing.

    Of an engine in this very process, the connector says what is wrong with the pipeline: some
    classes bring llvmlite, and vLLM's CPU worker, which looks for kernels in every module that is
    there when it starts, breaks on that one.
    """
    text = repr(extra)
    if text in _known:
        return
    try:
        said = configured(extra)
        if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            said.pipeline()
    except ConfigError:
        raise
    except Exception:  # the engine's own processes will tell, if it is more than this check
        log.debug("settings could not be checked", exc_info=True)
    _known.add(text)


def check_early(factory: Any) -> None:
    """From now on `factory.get_connector_class` checks the settings of a connector of ours; twice
    does no harm. A factory that has changed is left as it is."""
    look_up = getattr(getattr(factory, "get_connector_class", None), "__func__", None)
    if look_up is None or hasattr(look_up, "checks"):
        return

    @functools.wraps(look_up)
    def checked(cls: Any, kv_transfer_config: Any, *more: Any, **others: Any) -> Any:
        found = look_up(cls, kv_transfer_config, *more, **others)
        if found.__module__ == "tierloom.adapters.vllm.connector":
            check_settings(kv_transfer_config.kv_connector_extra_config)
        return found

    checked.checks = True  # type: ignore[attr-defined]
    factory.get_connector_class = classmethod(checked)
