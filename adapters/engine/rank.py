"""Which share of a model's KV a process of an engine holds, and where it may keep its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rank:
    """The position of a worker in the engine."""

    tp: int
    tp_size: int
    pp: int
    pp_size: int
    dp: int
    """Numbers copies of the model that nothing else distinguishes."""
    dp_size: int
    """1 for dense models too, where each copy is a separate engine."""

    @property
    def index(self) -> int:
        """Numbers this engine's workers."""
        return self.pp * self.tp_size + self.tp

    @property
    def folder(self) -> str:
        """Its part of paths that only one process may use; empty if it is alone."""
        parts = [f"dp{self.dp}"] if self.dp else []
        parts = [f"dp{self.dp}of{self.dp_size}"] if self.dp_size > 1 else parts
        parts += [f"tp{self.tp}of{self.tp_size}"] if self.tp_size > 1 else []
        parts += [f"pp{self.pp}of{self.pp_size}"] if self.pp_size > 1 else []
        return "-".join(parts)

    def heads(self, total: int) -> tuple[tuple[int, int], bool]:
        """The KV heads that this rank holds, and whether an earlier rank holds the same ones."""
        if total >= self.tp_size:
            each = total // self.tp_size
            return (self.tp * each, self.tp * each + each), False
        first = self.tp * total // self.tp_size
        return (first, first + 1), self.tp > 0 and (self.tp - 1) * total // self.tp_size == first
