"""Our links and SGLang's page hashes have the same bytes, in Python, and in its native tree."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_hash_str, get_storage_hash_str, storage_namespace_seed

from tierloom.stages.kv.chain_seed import sglang_seed
from tierloom.stages.kv.prefix import Chain


def compare(rounds: int, source: random.Random) -> int:
    pages = 0
    for _ in range(rounds):
        page = source.choice([2, 4, 16, 32, 64])
        size = 1 << source.choice([8, 17, 31])
        tokens = [source.randrange(size) for _ in range(page * source.randrange(1, 12))]
        extra = source.choice([None, "", "lora-1", "é"])
        salt = source.choice([None, "", "s", "a tenant's long salt" * 9])
        key = RadixKey(array("q", tokens), extra_key=extra, cache_salt=salt)
        assert (key.extra_key, key.cache_salt) == (extra, salt or None)  # no salt is an empty one
        salt = salt or None
        chain = Chain(sglang_seed(extra, salt), page)
        chain.extend(np.array(tokens, np.int32))
        ours = [link.hex() for link in chain.links]
        assert ours == get_hash_str(tokens, storage_namespace_seed(extra, salt), page)
        assert ours == get_storage_hash_str(key, None, page_size=page)
        pages += len(ours)
    return pages


def test_page_hashes() -> None:
    assert compare(300, random.Random(1)) > 1000


@pytest.mark.campaign
def test_page_hashes_at_length() -> None:
    assert compare(10_000, random.Random(2)) > 40_000


def test_a_chain_goes_on_where_another_call_ended() -> None:
    tokens = list(range(64))
    whole = get_hash_str(tokens, None, 16)
    assert get_hash_str(tokens[32:], whole[1], 16) == whole[2:]
