"""Loading stays ahead of the model, storing behind it, and what does not come is not used."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tierloom.adapters.transformers.cached_model import Abandoned, TierloomCache
from tierloom.adapters.transformers.model import with_cache

from .conftest import greedy, tokens
from .test_kept import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISK_ONLY = {
    "version": 1,
    "tiers": {"warm": {"use": "disk", "path": "set by the fixture", "capacity": "64 MiB"}},
    "graphs": {
        "store": {
            "stages": {
                "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
                "pack": {"use": "gather"}, "host": {"use": "to_host"},
                "warm": {"use": "put", "tier": "warm"},
            }
        },
        "retrieve": {
            "deadline": "20 s",
            "stages": {
                "keys": {"use": "hash"}, "plan": {"use": "lookup", "want": "prefix"},
                "fetch": {"use": "get"}, "grow": {"use": "decode"}, "place": {"use": "scatter"},
            }
        },
    },
}  # fmt: skip


class Log:
    """A ticket that notes which calls reach it, and may come up short from a layer on."""

    def __init__(self, ticket: Any, short_from: int = 99) -> None:
        self.ticket, self.short_from = ticket, short_from
        self.waited: list[int] = []
        self.done: list[int] = []

    def wait_layer(self, layer: int) -> int:
        self.waited.append(layer)
        there: int = self.ticket.wait_layer(layer)
        return there - 32 if layer >= self.short_from else there

    def layer_done(self, layer: int) -> None:
        self.done.append(layer)
        self.ticket.layer_done(layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ticket, name)


def logged(monkeypatch: pytest.MonkeyPatch, short_from: int = 99) -> list[TierloomCache]:
    """Every cache made from now on has logged tickets; the list of them."""
    made: list[TierloomCache] = []
    begin = TierloomCache._begin

    def wrapped(self: TierloomCache, what: str, ids: Any) -> Any:
        made.append(self)
        return Log(begin(self, what, ids), short_from)

    monkeypatch.setattr(TierloomCache, "_begin", wrapped)
    return made


@contextmanager
def hooked(model: Any, see: Callable[[], list[int]]) -> Iterator[list[list[int]]]:
    """What is seen behind each layer of the model, as long as a request is under way."""
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        with suppress(IndexError, AttributeError):
            seen.append(list(see()))

    hooks = [layer.register_forward_hook(look) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_each_layer_is_stored_when_it_is_computed(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = logged(monkeypatch)
    with hooked(model, lambda: made[-1].storing.done) as seen:
        kept = keep(model, weights="hooks only look on")
        seen.clear()
        kept.generate(tokens(300), max_new_tokens=1, do_sample=False)
    assert seen == [list(range(i + 1)) for i in range(6)]
    assert kept.last.storing[0].wait().tokens == 300


def test_each_layer_waits_for_its_own_kv_only(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keep(model, weights="hooks only look on")
    say(first, tokens(300))
    first.close()
    made = logged(monkeypatch)
    with hooked(model, lambda: made[-1].loading.waited) as seen:
        kept = keep(model, weights="hooks only look on")
        seen.clear()
        kept.generate(tokens(300), max_new_tokens=1, do_sample=False)
    assert seen == [list(range(i + 1)) for i in range(6)]
    assert kept.last.loaded is not None
    assert kept.last.loaded.tokens == kept.last.hit_tokens == 288


def test_the_model_driven_by_hand(keep: Any, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    cache = kept.cache(tokens(300))
    n = cache.get_seq_length()
    assert n == 288
    with torch.no_grad():
        part = model(tokens(300)[:, n:], **with_cache(model, cache)).logits[:, -1]
        whole = model(tokens(300)).logits[:, -1]
    torch.testing.assert_close(part, whole)
    assert cache.get_seq_length() == 300
    assert cache.storing.captured()


def test_what_does_not_come_in_time_is_computed(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    logged(monkeypatch, short_from=4)

    class Stream:
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.got.append(-1)

    stream = Stream()
    assert say(kept, tokens(300), streamer=stream) == 0
    assert "256 of 288" in kept.last.abandoned
    assert stream.got == [*greedy(model, tokens(300))[0].tolist(), -1]


def test_who_drives_the_model_is_told_that_it_did_not_come(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    logged(monkeypatch, short_from=0)
    cache = kept.cache(tokens(300))
    with torch.no_grad(), pytest.raises(Abandoned, match="256 of 288"):
        model(tokens(300)[:, cache.get_seq_length() :], **with_cache(model, cache))


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_a_damaged_object_is_never_used(keep: Any, model: Any, tmp_path: Path, at: float) -> None:
    first = keep(model, config=DISK_ONLY)
    say(first, tokens(600))
    first.close()
    for file in (tmp_path / "kv").rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            raw = bytearray(file.read_bytes())
            whole = len(raw.rstrip(b"\0"))
            raw[int(whole * at)] ^= 0x10
            file.write_bytes(raw)
    second = keep(model, config=DISK_ONLY)
    assert say(second, tokens(600)) < 576
    assert say(second, tokens(600)) == 576


def test_a_failing_model_leaves_nothing_under_way(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("the model failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", fail)  # of the MLP: behind a layer's KV
        with pytest.raises(RuntimeError, match="the model failed"):
            kept.generate(tokens(300), max_new_tokens=4, do_sample=False)
    assert say(kept, tokens(300)) == 0
    assert say(kept, tokens(300)) == 288
