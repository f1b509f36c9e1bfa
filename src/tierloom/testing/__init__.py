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
    "tierloom.testing.bench",
    "tierloom.testing.codecs",
    "tierloom.testing.directories",
    "tierloom.testing.tiers",
)

from tierloom.testing.arena import PoisonArena as PoisonArena  # noqa: E402
from tierloom.testing.bench import (  # noqa: E402
    ALL as ALL,
    FRAMES as FRAMES,
    GEOMETRY as GEOMETRY,
    GRAIN as GRAIN,
    GROUP as GROUP,
    NAMESPACE as NAMESPACE,
    SIZE as SIZE,
    Clock as Clock,
    Pool as Pool,
    TierBench as TierBench,
    encrypted_anew as encrypted_anew,
    key_of as key_of,
    links_of as links_of,
    make_object as make_object,
    verify as verify,
)
from tierloom.testing.codecs import (  # noqa: E402
    CodecContract as CodecContract,
    header_of as header_of,
    mutations as mutations,
    noise as noise,
)
from tierloom.testing.directories import DirectoryContract as DirectoryContract  # noqa: E402
from tierloom.testing.tiers import TierContract as TierContract  # noqa: E402
