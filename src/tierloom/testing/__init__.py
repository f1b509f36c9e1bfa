"""The contracts of tiers and codecs, as pytest suites for whoever writes one.

    from tierloom.testing import TierContract

    class TestMine(TierContract):
        def make(self, ctx, folder, clock, **options):
            return Mine(MineOptions(**options), ctx)

Needs what `pip install 'tierloom[test]'` brings. Nothing else of tierloom imports this.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "tierloom.testing.bench", "tierloom.testing.codecs", "tierloom.testing.tiers"
)

from tierloom.testing.arena import PoisonArena  # noqa: E402
from tierloom.testing.bench import (  # noqa: E402
    ALL,
    FRAMES,
    GEOMETRY,
    GRAIN,
    GROUP,
    NAMESPACE,
    SIZE,
    Clock,
    Pool,
    TierBench,
    encrypted_anew,
    key_of,
    links_of,
    make_object,
    verify,
)
from tierloom.testing.codecs import CodecContract, header_of, mutations, noise  # noqa: E402
from tierloom.testing.tiers import TierContract  # noqa: E402

__all__ = [
    "ALL",
    "FRAMES",
    "GEOMETRY",
    "GRAIN",
    "GROUP",
    "NAMESPACE",
    "SIZE",
    "Clock",
    "CodecContract",
    "PoisonArena",
    "Pool",
    "TierBench",
    "TierContract",
    "encrypted_anew",
    "header_of",
    "key_of",
    "links_of",
    "make_object",
    "mutations",
    "noise",
    "verify",
]
