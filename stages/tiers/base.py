"""Where `Tier` was until 0.1, for one release: it is in `tierloom.stages.tiers.contract.tier`."""

from __future__ import annotations

import warnings

from tierloom.stages.tiers.contract.tier import Read, Tier, TierContext, TierStat

__all__ = ["Read", "Tier", "TierContext", "TierStat"]

warnings.warn(
    "tierloom.stages.tiers.base is now tierloom.stages.tiers.contract.tier",
    DeprecationWarning,
    stacklevel=2,
)
