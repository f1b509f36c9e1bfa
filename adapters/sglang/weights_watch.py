"""Whether SGLang has changed its weights since: KV of the old ones is not that of the new ones.

`/update_weights_from_disk` and its kin load other weights into a running engine, flush SGLang's own
caches, and tell no storage backend.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

log = logging.getLogger("tierloom.sglang")

_changes = 0
"""Successful updates in this process."""

_AFTER = "record_weight_version_after_update"
"""Method of SGLang's that every way of changing weights ends with."""


class WeightsWatch:
    """Asks whether the weights changed since it was made."""

    def __init__(self) -> None:
        _watch()
        self._seen = _changes

    @property
    def changed(self) -> bool:
        return _changes != self._seen


def _watch() -> None:
    """Count SGLang's updates of weights from now on; twice does no harm."""
    try:
        from sglang.srt.managers.scheduler_components import weight_updater
    except ImportError:
        return _cannot("there is no sglang.srt.managers.scheduler_components.weight_updater")
    owners = [c for c in vars(weight_updater).values() if isinstance(c, type) and _AFTER in vars(c)]
    for owner in owners:
        before = vars(owner)[_AFTER]
        if not hasattr(before, "counts_updates"):
            setattr(owner, _AFTER, _counting(before))
    return None if owners else _cannot(f"nothing in {weight_updater.__name__} has {_AFTER}")


def _counting(method: Any) -> Any:
    @functools.wraps(method)
    def counted(*args: Any, **named: Any) -> Any:
        global _changes
        _changes += 1
        return method(*args, **named)

    counted.counts_updates = True  # type: ignore[attr-defined]
    return counted


def _cannot(why: str) -> None:
    log.warning(
        "whether SGLang's weights change while it runs cannot be seen (%s): detach the storage "
        "backend before you update them", why,
    )  # fmt: skip
