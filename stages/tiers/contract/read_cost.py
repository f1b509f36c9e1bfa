"""How long reads of a tier take, learned from those that were timed."""

from __future__ import annotations


class ReadCostModel:
    """Seconds of a read as latency + bytes / bandwidth, fitted to recent reads.

    Least squares over exponentially weighted means; a plain ratio while all reads are of one size.
    """

    __slots__ = ("_n", "_nn", "_nt", "_t", "reads")

    def __init__(self) -> None:
        self.reads = 0
        self._n = self._t = self._nn = self._nt = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        self.reads += 1
        weight = max(0.1, 1 / self.reads)
        self._n += weight * (nbytes - self._n)
        self._t += weight * (seconds - self._t)
        self._nn += weight * (nbytes * nbytes - self._nn)
        self._nt += weight * (nbytes * seconds - self._nt)

    @property
    def _line(self) -> tuple[float, float]:
        """(seconds of an empty read, seconds per byte), neither negative."""
        spread = self._nn - self._n * self._n
        slope = (self._nt - self._n * self._t) / spread if spread > 0.01 * self._nn else -1.0
        if slope <= 0 or slope * self._n > self._t:
            return 0.0, self._t / self._n
        return self._t - slope * self._n, slope

    @property
    def latency(self) -> float:
        """Seconds before the first byte; 0 when not known."""
        return self._line[0] if self.reads else 0.0

    @property
    def per_byte(self) -> float:
        """Seconds for each further byte; 0 when not known."""
        return self._line[1] if self.reads else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second; 0 when not known."""
        return 1 / self.per_byte if self.per_byte else 0.0

    def of(self, nbytes: int) -> float | None:
        """Seconds that a read of `nbytes` should take; None before the first read."""
        if not self.reads:
            return None
        latency, slope = self._line
        return latency + nbytes * slope
