"""Where `Blobs` was until 0.1, for one release: `tierloom.stages.tiers.contract.key_value`."""

from __future__ import annotations

import warnings

from tierloom.stages.tiers.contract.key_value import Blobs

__all__ = ["Blobs"]

warnings.warn(
    "tierloom.stages.tiers.blobs is now tierloom.stages.tiers.contract.key_value",
    DeprecationWarning,
    stacklevel=2,
)
