"""One kept text serves vLLM, transformers and whoever has only SGLang's page hashes.

A real model in a real vLLM, and in this process; what they share is a folder of files.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import Engine, pipeline, transfer
from launch import ROOT
from processes import missing, real_model

import tierloom
from tierloom.adapters.demo import smollm2
from tierloom.adapters.model_identity.shared import SharedIdentity, shared_id
from tierloom.adapters.transformers import CachedModel
from tierloom.adapters.transformers.cache import layout_of
from tierloom.adapters.transformers.model import with_cache
from tierloom.stages.kv.chain_seed import sglang_seed
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import Header
from tierloom.stages.kv.prefix import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = real_model

CHUNK, PAGE, LAYERS, HEADS, DIM = 256, 32, 30, 3, 64
LENGTH = 600
WHOLE = LENGTH // PAGE * PAGE

IDENTITY = """
import sys
from tierloom.adapters.model_identity.shared import shared_id
print(*shared_id(sys.argv[1], dtype="torch.float32"), sep="\\n")
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.model_dir(progress=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return smollm2.load_smollm2(progress=False)[0]


def identity(folder: Path) -> SharedIdentity:
    return shared_id(str(folder), dtype="float32")


def source(kept: Path) -> dict[str, Any]:
    made = pipeline(cold={"use": "files", "path": str(kept)})
    return made | {"budget": {"arena": "128 MiB"}}


class Pages:
    """What SGLang has: its page hashes, and host memory."""

    def __init__(self, folder: Path, kept: Path) -> None:
        size = (LENGTH, HEADS, DIM)
        self.caches = [(torch.zeros(size), torch.zeros(size)) for _ in range(LAYERS)]
        self.pipe = tierloom.open(
            source(kept), layout=layout_of(self.caches), model="", **identity(folder)._asdict(),
            overrides={"order": "canonical", "chunk.keys": "sglang"},
        )  # fmt: skip

    def retrieve(self, tokens: list[int], salt: str | None = None) -> int:
        for cache in self.caches:
            for tensor in cache:
                tensor.zero_()
        ticket = self.pipe.retrieve(pages(tokens, salt), self.caches, torch.arange(WHOLE))
        return int(ticket.wait().tokens)


def pages(tokens: list[int], salt: str | None = None) -> Span:
    links, link = b"", sglang_seed(None, salt)
    for at in range(0, WHOLE, PAGE):
        page = b"".join(t.to_bytes(4, "little") for t in tokens[at : at + PAGE])
        link = hashlib.sha256(link + page).digest()
        links += link
    return Span(links, sglang_seed(None, salt), WHOLE, start=0)


def computed(model: Any, tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token-major KV of `tokens`, by transformers."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([tokens]), **with_cache(model, cache))
    return [(one.keys[0].transpose(0, 1), one.values[0].transpose(0, 1)) for one in cache.layers]


def document(folder: Path) -> tuple[list[int], list[int], list[int]]:
    """Three different prompts."""
    from transformers import AutoTokenizer

    text = (ROOT / "configs" / "demo.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    first, second, third = (ids[at : at + LENGTH] for at in (0, 300, 700))
    assert len(third) == LENGTH
    return first, second, third


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def other(folder: Path, kept: Path) -> Iterator[Pages]:
    made = Pages(folder, kept)
    yield made
    made.pipe.close()


def test_one_text_serves_all(
    engine: Engine, folder: Path, model: Any, kept: Path, other: Pages
) -> None:
    first, second, third = document(folder)
    kv = transfer(source(kept), **{"tierloom.keys": "sglang"})
    engine.use(folder, kv, max_model_len=1024)

    # vLLM keeps a text, and with a salt another one.
    assert engine.one(first).cached == 0
    assert engine.one(second, salt="secret").cached == 0
    engine.settle()
    names = Namespace(
        model="", layers=(0, LAYERS), heads=(0, HEADS), geometry=str(other.pipe.geometry),
        **identity(folder)._asdict(),
    )  # fmt: skip
    files = [path for path in kept.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    headers = [Header.unpack(path.read_bytes()[:8192]) for path in files]
    assert {header.namespace for header in headers} == {names.digest}
    assert other.retrieve(first) == WHOLE
    for ours, theirs in zip(other.caches, computed(model, first), strict=True):
        for mine, right in zip(ours, theirs, strict=True):
            worst = (mine[:WHOLE] - right[:WHOLE]).abs().max() / right.abs().max()
            assert worst < 1e-4
    assert other.retrieve(second) == other.retrieve(first, "secret") == 0
    assert other.retrieve(second, "secret") == WHOLE

    # transformers finds it, too.
    overrides = {"order": "canonical", "chunk.keys": "sglang"}
    with CachedModel(
        model, config=source(kept), weights=identity(folder), overrides=overrides
    ) as mine:
        assert mine.pipe.whole(LAYERS, HEADS) == names
        cache = mine.cache(torch.tensor([first]), store=False)
        assert cache.get_seq_length() == WHOLE // CHUNK * CHUNK  # its tail ends elsewhere
        cache.abandon()

    # And back: what comes in pages is vLLM's.
    for ours, right in zip(other.caches, computed(model, third), strict=True):
        for mine, theirs in zip(ours, right, strict=True):
            mine.copy_(theirs)
    got = other.pipe.store(pages(third), other.caches, torch.arange(WHOLE)).wait()
    assert (got.tokens, got.lost) == (WHOLE, {})
    answer = engine.one(third)
    said = model.generate(
        torch.tensor([third]), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert (answer.cached, answer.ids) == (WHOLE, said[0, LENGTH:].tolist())
    engine.settle()


@pytest.mark.parametrize("venv", [".venv-vllm", ".venv-sglang"])
def test_every_environment_comes_to_one_identity(folder: Path, venv: str, tmp_path: Path) -> None:
    python = ROOT / venv / "bin" / "python"
    if not python.exists():
        missing(venv.removeprefix(".venv-"), f"{python} is not there", "make vllm sglang")
    done = subprocess.run(
        [python, "-c", IDENTITY, folder], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == list(identity(folder))
