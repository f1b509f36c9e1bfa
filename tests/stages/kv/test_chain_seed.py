"""Seeds of chains: SGLang's, as its own `storage_namespace_seed` gives them, and ours."""

from __future__ import annotations

import numpy as np
import pytest

from tierloom.stages.kv.chain_seed import chain_seed, sglang_seed
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import grain_links

NAMES = Namespace(model="m")
# From SGLang 0.5.23: storage_namespace_seed(extra_key, cache_salt).
SEEDS = {
    (None, None): "",
    ("lora-a", None): "407c773a7c02b33bd4a62af6bf5fc77997c2c8067811ecf2b39e3839c3f4284b",
    (None, "s1"): "82bf52060ac4846a68db76addaf8351f01fc5558e3512755d222cbd8632771a2",
    ("lora-a", "s1"): "464a1334f03edbc67f426b391e919e71cd5266dab64c2ca82f42e8bc05572e25",
    ("", ""): "bea08aaebe976c9c4f8ebade6674ba3fe15783c47020e10c4721ad211aae36e4",
    ("ü€", "日本"): "7112dca18e252ee928dce6ebfed9cb2d8a7d6fb942c362b1760abbf055a4a8fd",
}


@pytest.mark.parametrize(("parts", "seed"), SEEDS.items())
def test_sglang(parts: tuple[str | None, str | None], seed: str) -> None:
    assert sglang_seed(*parts).hex() == seed


def test_pages_are_named_as_sglang_names_them() -> None:
    """Its `get_hash_str(list(range(64)), None, 32)`."""
    links = grain_links(b"", np.arange(64, dtype=np.int32), 32)
    assert [link.hex() for link in links] == [
        "afbc67011b6f94a508935ad8edcbdd3c9b56c4db336f8d3847a8a1815183828f",
        "b4c73dd5107d2bcdfee5d93a843fabb558e266d33090dd8a0507afd6e6341453",
    ]


@pytest.mark.parametrize("what", [{"tags": (("a", "b"),)}, {"adapter": "x"}])
def test_what_sglang_has_no_name_for_is_named_by_us(what: dict[str, object]) -> None:
    names = NAMES.of(**{"salt": "", "adapter": "", "tags": (), **what})  # type: ignore[arg-type]
    assert chain_seed(names, "sglang") == chain_seed(names, "own") == names.digest


def test_salts_part_tenants() -> None:
    salted = NAMES.of(salt="s", adapter="", tags=())
    assert chain_seed(NAMES, "sglang") == b""
    assert chain_seed(salted, "sglang") == sglang_seed(None, "s") != b""
