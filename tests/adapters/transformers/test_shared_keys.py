"""With SGLang's keys a model goes by the name that other engines have for its files."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tierloom.adapters.model_identity.shared import shared_id
from tierloom.adapters.transformers.cached_model import CachedModel
from tierloom.stages.errors import InputError
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import Span

from .conftest import spread, tiny_llama, tokens

if TYPE_CHECKING:
    from pathlib import Path

SGLANG = {"chunk.keys": "sglang", "tiers.hot.capacity": "16 MiB", "budget.arena": "32 MiB"}


@pytest.fixture(scope="module")
def model() -> Any:
    return spread(tiny_llama())


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    return made


def test_its_namespace_and_keys_are_those_of_its_files(model: Any, folder: Path) -> None:
    identity = shared_id(str(folder), dtype="float32")
    ids = tokens(300)
    with CachedModel(model, config="minimal", weights=identity, overrides=SGLANG) as kept:
        geometry = str(kept.pipe.geometry)
        assert kept.pipe.whole(6, 2) == Namespace(
            model="", weights=identity.weights, rope=identity.rope, geometry=geometry,
            layers=(0, 6), heads=(0, 2),
        )  # fmt: skip
        kept.generate(ids, max_new_tokens=1)
        kept.flush()
        links, link = b"", b""
        for page in ids[0, :256].to(torch.int32).split(32):
            link = hashlib.sha256(link + page.numpy().astype("<u4").tobytes()).digest()
            links += link
        assert kept.pipe.lookup(Span(links, b"", 256)) == 256


def test_the_id_alone_is_enough_and_a_name_is_kept(model: Any, folder: Path) -> None:
    identity = shared_id(str(folder), dtype="float32")
    assert json.loads(identity.rope)["rope_theta"] == 10000.0
    with CachedModel(
        model, config="minimal", name="m", weights=identity.weights, overrides=SGLANG
    ) as kept:
        names = kept.pipe.whole(6, 2)
        assert (names.model, names.weights, names.rope) == ("m", *identity)


def test_a_model_in_memory_is_not_guessed_to_be_its_files(model: Any) -> None:
    with pytest.raises(InputError, match=r"weights=shared_id\(folder, dtype='float32'\)"):
        CachedModel(model, config="minimal", overrides=SGLANG)
