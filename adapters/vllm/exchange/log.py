"""Our log lines among vLLM's: where its own appear, and under our name.

vLLM's format has the file and the line of what speaks, and no logger's name: `request 7: ...` might
be anybody's. What a line carries beside its words (`extra=`) would not be shown at all.
"""

from __future__ import annotations

import copy
import logging

from tierloom.stages.options import masked

NAME = "tierloom"


class PrefixedRecords(logging.Handler):
    """Passes records on to another handler: our name, the message, then `extra`."""

    def __init__(self, to: logging.Handler) -> None:
        super().__init__(to.level)
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        usual = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
        beside = {k: v for k, v in vars(record).items() if k not in usual}
        said = ", ".join(f"{k}: {v}" for k, v in beside.items())
        ours = copy.copy(record)  # other handlers see it as it was
        ours.msg = f"{NAME}: {record.getMessage()}{masked(f' ({said})') if said else ''}"
        ours.args = None
        self._to.handle(ours)


def speak() -> None:
    """Let our lines appear where vLLM's do, unless the user has settled that already."""
    ours, theirs = logging.getLogger(NAME), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers, ours.propagate = (
            [PrefixedRecords(handler) for handler in theirs.handlers],
            False,
        )
        ours.setLevel(theirs.level)
