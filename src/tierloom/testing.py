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
    "tierloom.adapters.testing_bench",
    "tierloom.adapters.testing_codecs",
    "tierloom.adapters.testing_tiers",
)

from .adapters.testing_arena import PoisonArena  # noqa: E402
from .adapters.testing_bench import (  # noqa: E402
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
from .adapters.testing_codecs import (  # noqa: E402
    CodecContract,
    header_of,
    mutations,
    noise,
)
from .adapters.testing_tiers import TierContract  # noqa: E402

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
