"""What the figures are held to, and by which of them. Nothing fails by a bar: the table tells."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """A limit on one figure of the benchmarks whose name fits."""

    name: str
    """Regular expression over `file::test[params]`."""
    figure: str
    """Key of `extra_info`; a median, unless it says that it is the best round."""
    most: bool
    """The figure may be this at most; else it must be this at least."""
    limit: float
    unit: str

    def fits(self, name: str, figures: dict[str, Any]) -> bool:
        return self.figure in figures and re.search(self.name, name) is not None

    def met(self, figures: dict[str, Any]) -> bool:
        value = figures[self.figure]
        return bool(value <= self.limit if self.most else value >= self.limit)

    def __str__(self) -> str:
        return f"{'<=' if self.most else '>='} {self.limit:g} {self.unit}"


BARS = (
    # The peer: 0.34 and 0.48 from memory, 0.41 and 0.53 with O_DIRECT, without checksums.
    Bar(r"test_(store|retrieve)\[8B-memory", "cpu_s_per_gb", True, 0.19, "CPU s/GB"),
    Bar(r"test_(store|retrieve)\[8B-disk", "cpu_s_per_gb", True, 0.28, "CPU s/GB"),
    Bar(r"test_(store|retrieve)\[8B-disk", "wall_vs_disk", True, 1.2, "x the disk"),
    Bar(r"test_cpu\[8B NHD-(gather|scatter)\]", "share_of_memcpy", False, 0.8, "of memcpy"),
    Bar(r"test_cpu\[.*K turned\]", "share_of_memcpy", False, 0.6, "of memcpy"),
    Bar(r"test_hash\[256", "m_tokens_per_s", False, 60, "M tokens/s"),
    Bar(r"test_hash\[32", "m_tokens_per_s", False, 25, "M tokens/s"),
    Bar(r"test_runner\[16", "us_per_chunk", True, 25, "us/chunk"),
    # The peer: 12 MB/s encoded, 13 decoded.
    Bar(r"test_codec\[cachegen .*-encode", "mb_per_cpu_s", False, 60, "MB per CPU s"),
    Bar(r"test_codec\[cachegen .*-decode", "mb_per_cpu_s", False, 130, "MB per CPU s"),
    Bar(r"test_codec\[int[48]-", "mb_per_cpu_s", False, 1000, "MB per CPU s"),
    # By the best of 15: one thread, and its misses of the cache cost more beside other work.
    Bar(r"test_find.*half", "ms_best", True, 2, "ms"),
    Bar(r"test_find.*nothing", "ms_best", True, 1, "ms"),
    Bar(r"test_find.*worst", "ms_best", True, 10, "ms"),
    Bar(r"test_index", "index_mb", True, 160, "MB"),
    Bar(r"test_index", "longest_ms", True, 20, "ms"),
    Bar(r"test_capacity", "resident_least", False, 0.97, "resident"),
)
