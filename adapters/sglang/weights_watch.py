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
"""Signs of updates in this process."""

_INSIDE = (
    "_observe_weight_load", "flush_cache_after_weight_update", "record_weight_version_after_update",
)  # fmt: skip
"""Methods of SGLang's that its ways of changing weights call, the first at each begin: one that
fails half way has changed weights, too."""


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
    found = [
        (owner, name)
        for owner in vars(weight_updater).values()
        for name in (_INSIDE if isinstance(owner, type) else ())
        if name in vars(owner)
    ]
    for owner, name in found:
        before = vars(owner)[name]
        if not hasattr(before, "counts_updates"):
            setattr(owner, name, _counting(before))
    return None if found else _cannot(f"nothing in {weight_updater.__name__} has {_INSIDE[0]}")


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
