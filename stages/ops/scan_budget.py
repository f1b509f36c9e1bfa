"""How much of progressive objects to read, and when to compute instead.

After CacheGen's controller (arXiv 2310.07240, section 5.3), which before each chunk chooses one of
several encodings by the throughput of the chunk before, or has the chunk computed. Here a chunk is
one stream whose beginning is all of it, coarsely. So nothing must be foretold for the chunk at
hand: its coarsest scan is read, that shows what the link gives now, and finer scans follow while
there is time for them and for the same of all chunks after them. A read is cancelled at the last
moment at which computing the rest still ends in time; and whatever a link does, nobody waits longer
than all would have taken to compute, and one group more. Only later chunks are estimated, by what
bytes have taken on average, which one slow chunk does not upset.

Pure: `get` drives it by the clock, and a test by simulated links.
"""

from __future__ import annotations

from typing import NamedTuple

SPARE = 0.9
"""Share of the time left that is planned with; the rest is for decoding, placing and surprise."""


class ScanBudget(NamedTuple):
    """What is known of a group of chunks that travel together, when they are about to be read."""

    time_left: float
    """Seconds until all should be in place, or computed."""
    s_per_byte: float
    """Seconds that a byte has taken on average; 0: not known."""
    remaining_ratio: float
    """Tokens after these that are still to be read, as a multiple of these."""
    compute: float = 0.0
    """Seconds to compute these chunks and all after them; 0: not known."""
    lead: float = 0.0
    """Seconds by which computing what is in place would have ended later than now."""

    def hopeless(self, coarsest: float) -> bool:
        """Computing is quicker than reading even the coarsest scan of these and all after, which
        has `coarsest` bytes here; or too much time is lost already."""
        reading = coarsest * (1 + self.remaining_ratio) * self.s_per_byte
        return bool(self.compute) and (reading > self.compute or self._slack <= 0)

    def patience(self) -> float | None:
        """Seconds that the coarsest scan may take before these and all after are computed; None:
        how long that takes is not known."""
        if not self.compute:
            return None
        in_time = self.time_left - self.compute
        return min(self._slack, in_time) if in_time > 0 else self._slack

    @property
    def _slack(self) -> float:
        return self.lead + self.compute / (1 + self.remaining_ratio)

    def finer(self, step: int, upto: int, now: float) -> bool:
        """Whether there is time for one scan more: `step` bytes here, with which `upto` bytes here
        are read in all, as much of each later chunk. `now`: seconds a byte takes just now."""
        if self.compute and step * now > self._slack:
            return False
        return (
            step * now + self.remaining_ratio * upto * (self.s_per_byte or now)
            <= SPARE * self.time_left
        )

    def after(self, seconds: float) -> ScanBudget:
        """The same, `seconds` later."""
        return self._replace(time_left=self.time_left - seconds, lead=self.lead - seconds)
