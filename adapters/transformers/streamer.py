"""A streamer for `generate` that measures the time to the first token."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Watch:
    """A streamer that notes when the first new token comes, and passes all on to another."""

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.first = inner, 0.0
        self._puts, self._skip = 0, False

    def skip_prompt(self) -> None:
        """A second run begins: its prompt, which transformers puts first, was passed on already."""
        self._puts, self._skip = 0, True

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2 and not self.first:
            self.first = time.perf_counter()
        if self.inner is not None and not (self._skip and self._puts == 1):
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()
