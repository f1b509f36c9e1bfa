"""What goes wrong between a plan that found text anywhere and its rows: never a wrong row, and what
is not in place is computed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import Engine, config, settle

from tierloom import Lost

from .blends import BLANK, Captured, blending, opened_with, rows, turned

if TYPE_CHECKING:
    from conftest import Open

PIECES, PIECE = 12, 64


class Scene:
    """Pieces of text kept in one prompt, and a prompt that has them in another order."""

    def __init__(self, opened: Open, source: dict[str, Any] | None = None, **options: Any) -> None:
        self.engine = Engine(layers=2, heads=1, blocks=70, dtype=torch.float32)
        self.kept = Captured(self.engine)
        self.pipe = opened_with(opened, source or blending(), self.engine, **options)
        self.head = self.kept.text(16)
        self.pieces = [self.kept.text(PIECE) for _ in range(PIECES)]
        self.at = self.engine.slots(PIECE * PIECES)
        self.rng = np.random.default_rng(5)

    def store(self) -> Any:
        return self.kept.store(self.pipe, np.concatenate(self.pieces), self.at)

    def prompt(self) -> np.ndarray:
        order = self.rng.permutation(PIECES)
        return np.concatenate([self.head, *(self.pieces[i] for i in order)])

    def retrieve(self, prompt: np.ndarray) -> tuple[Any, int]:
        """The receipt, and tokens in place."""
        target = self.engine.blank()
        to = target.slots(len(prompt))
        ticket = self.pipe.retrieve(prompt, target.caches, to, blend=True)
        got = ticket.wait()
        return got, self.kept.check(ticket, prompt, target, to)

    @property
    def objects(self) -> list[Any]:
        """Of the memory tier: its entries, in the order of its index."""
        return list(self.pipe.tiers["hot"].tier._index._entries.values())


@pytest.mark.parametrize(
    "faults", [2000, pytest.param(10_000, marks=pytest.mark.campaign)], ids=str
)
@pytest.mark.timeout(300)
def test_damaged_frames_are_computed_and_the_rest_stands(opened: Open, faults: int) -> None:
    scene = Scene(opened)
    scene.store()
    assert scene.retrieve(scene.prompt())[1] == PIECE * PIECES
    done = hit = stood = 0
    while done < faults:
        views = [e.place.lease.view for e in scene.objects]
        bad = set()
        for _ in range(int(scene.rng.integers(1, 17))):
            i = int(scene.rng.integers(len(views)))
            bit = int(scene.rng.integers(4096 * 8, len(views[i]) * 8))
            views[i][bit // 8] ^= 1 << bit % 8
            bad ^= {(i, bit)}
            done += 1
        del views
        got, placed = scene.retrieve(scene.prompt())
        lost = len({i for i, _ in bad})
        assert placed == PIECE * (PIECES - lost)
        assert got.lost == ({Lost.CORRUPT: lost} if lost else {})
        hit, stood = hit + lost, stood + PIECES - lost
        settle(scene.pipe)
        assert len(scene.objects) == PIECES - lost, "a bad object must be gone"
        scene.store()
    assert hit > faults / 4
    assert stood


@pytest.mark.parametrize("gone", [1, 5, PIECES])
def test_evicted_between_plan_and_read(
    opened: Open, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    from tierloom.stages.ops import lookup
    from tierloom.stages.passages import anywhere

    scene = Scene(opened)
    scene.store()
    keys = [e.key for e in scene.pipe.tiers["hot"].tier._index]
    lost = scene.rng.permutation(len(keys))[:gone]

    def plan(*args: Any) -> Any:
        chunks = anywhere.plan_excerpts(*args)
        for i in lost:
            scene.pipe._portal.call(drop, keys[i])
        return chunks

    async def drop(key: bytes) -> None:
        await scene.pipe.tiers["hot"].delete([key])

    monkeypatch.setattr(lookup, "plan_excerpts", plan)
    got, placed = scene.retrieve(scene.prompt())
    assert placed == PIECE * (PIECES - gone)
    assert got.lost == {Lost.ABSENT: gone}
    assert len(scene.pipe._worker._texts.index) == PIECES - gone


@pytest.mark.parametrize("layered", [False, True], ids=["whole", "layered"])
def test_half_of_it_is_past_the_deadline(opened: Open, layered: bool) -> None:
    """Half the pieces are in memory; the others in a tier that answers too late."""
    source = blending(
        config(
            tiers__warm={"use": "slow", "capacity": "8 MiB", "delay": "3 s", "timeout": "20 s"},
            graphs__store__deadline="20 s",
            graphs__retrieve__deadline="500 ms",
        )
    )
    source["graphs"]["store"]["stages"]["warm"] = {
        "use": "put", "tier": "warm", "when_full": "block",
    }  # fmt: skip
    if layered:
        source["graphs"]["retrieve"]["pace"] = {"by": "layer", "window": 1}
    scene = Scene(opened, source)
    scene.store()
    settle(scene.pipe)

    async def drop() -> None:
        tier = scene.pipe.tiers["hot"]
        await tier.delete([e.key for e in list(tier.tier._index)[: PIECES // 2]])

    scene.pipe._portal.call(drop)
    prompt, target = scene.prompt(), scene.engine.blank()
    to = target.slots(len(prompt))
    begin = scene.pipe.begin_retrieve if layered else scene.pipe.retrieve
    ticket = begin(prompt, target.caches, to, blend=True)
    for layer in range(scene.engine.layers if layered else 0):
        ticket.wait_layer(layer)
    got = ticket.wait()
    placed = scene.kept.check(ticket, prompt, target, to)
    assert placed in (0, PIECE * PIECES // 2)
    assert got.blended == placed
    settle(scene.pipe)
    assert scene.kept.check(ticket, prompt, target, to) == placed


def test_nan_where_nobody_looks(opened: Open) -> None:
    """Rows of a chunk in front of an excerpt, and behind it, are not wanted: they may hold NaN."""
    scene = Scene(opened)
    chunk = scene.kept.text(PIECE)
    for cache in scene.engine.caches:
        flat = cache.flatten(1, 2)
        flat[:, scene.at[:16]] = flat[:, scene.at[48:64]] = float("nan")
    scene.kept.store(scene.pipe, chunk, scene.at[:PIECE])
    prompt, target = np.concatenate([scene.head, chunk[16:48]]), scene.engine.blank()
    to = target.slots(len(prompt))
    ticket = scene.pipe.retrieve(prompt, target.caches, to, blend=True)
    assert ticket.wait().blended == 32
    assert scene.kept.check(ticket, prompt, target, to) == 32
    assert target.untouched(to[16:])


def test_special_tokens_only(opened: Open) -> None:
    scene = Scene(opened)
    special = np.zeros(PIECE, np.int32)
    at = scene.at[:PIECE]
    scene.pipe.store(special, scene.engine.caches, at).wait()
    target, prompt = scene.engine.blank(), np.concatenate([scene.head[1:], special])
    to = target.slots(len(prompt))
    ticket = scene.pipe.retrieve(prompt, target.caches, to, blend=True)
    assert ticket.wait().blended == PIECE
    assert ticket.compute() == [(0, 15)]
    was, now = rows(scene.engine, at), rows(target, to[15:])
    assert torch.equal(now[1], was[1])
    assert (now[0] - turned(was[0], 15)).abs().max() < 1e-4


@pytest.mark.parametrize("n", [1, 15])
def test_a_chunk_shorter_than_a_grain_is_never_found(opened: Open, n: int) -> None:
    scene = Scene(opened)
    text = scene.kept.text(PIECE + n)
    scene.kept.store(scene.pipe, text, scene.at[: PIECE + n])
    got, placed = scene.retrieve(np.concatenate([scene.head, text]))
    assert (got.blended, placed) == (PIECE, PIECE)
    assert len(scene.pipe._worker._texts.index) == 1


def test_the_same_prompt_twice(opened: Open) -> None:
    scene = Scene(opened)
    scene.store()
    before = scene.pipe.tiers["hot"].stat().objects
    assert scene.store().tiers == {}
    assert scene.pipe.tiers["hot"].stat().objects == before
    prompt = np.concatenate(scene.pieces)
    for _ in range(2):
        got, placed = scene.retrieve(prompt)
        assert (got.tokens, got.blended, placed) == (len(prompt), 0, len(prompt))


def test_all_of_it_is_found_in_another_order(opened: Open) -> None:
    scene = Scene(opened)
    scene.store()
    order = [*range(1, PIECES), 0]
    prompt = np.concatenate([scene.pieces[i] for i in order])
    got, placed = scene.retrieve(prompt)
    assert (got.tokens, got.blended, placed) == (0, len(prompt), len(prompt))


@pytest.mark.parametrize("exact", [0, 8, 16, 32, 40, 72])
def test_behind_a_prefix_of_any_length(opened: Open, exact: int) -> None:
    """A prefix hit ends at a grain; what stands behind its last one is computed or found."""
    scene = Scene(opened)
    scene.store()
    first = np.concatenate(scene.pieces[:2])[:exact]
    prompt = np.concatenate([first, scene.head, *scene.pieces[4:]])
    got, placed = scene.retrieve(prompt)
    assert got.tokens == exact // 16 * 16
    assert got.blended == PIECE * (PIECES - 4)
    assert placed == got.tokens + got.blended


@pytest.mark.parametrize("behind", [0, 1, 15])
def test_a_run_that_ends_in_the_last_tokens(opened: Open, behind: int) -> None:
    scene = Scene(opened)
    scene.store()
    prompt = np.concatenate([scene.head, scene.pieces[3], scene.kept.text(behind)])
    got, placed = scene.retrieve(prompt)
    assert (got.blended, placed) == (PIECE, PIECE)


def test_what_is_blended_is_used_and_stays(opened: Open) -> None:
    """Text that is asked for outlives, in a store that evicts, text that is not."""
    scene = Scene(opened, blending(config(tiers__hot__capacity="160 KiB")))
    passage = scene.kept.text(PIECE)
    scene.kept.store(scene.pipe, passage, scene.at[:PIECE])
    for _ in range(80):
        assert scene.retrieve(np.concatenate([scene.head, passage]))[1] == PIECE
        scene.kept.store(scene.pipe, scene.kept.text(PIECE), scene.at[PIECE : 2 * PIECE])
    assert scene.pipe.tiers["hot"].stat().objects < 40


def test_several_threads(opened: Open) -> None:
    """Some store, drop and damage what others blend."""
    scene, wrong = Scene(opened), []
    scene.store()
    stop = threading.Event()

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                order = rng.permutation(PIECES)
                prompt = np.concatenate([scene.head, *(scene.pieces[i] for i in order)])
                scene.retrieve(prompt)
        except BaseException as error:
            wrong.append(error)

    def disturb() -> None:
        while not stop.is_set():
            scene.pipe._portal.call(scene.pipe.tiers["hot"].clear)
            scene.store()

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    other = threading.Thread(target=disturb)
    for thread in (*askers, other):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    other.join()
    assert not wrong, wrong[0]
    scene.store()
    settle(scene.pipe)
    assert scene.retrieve(scene.prompt())[1] == PIECE * PIECES


def test_a_blank_row_is_told_from_a_placed_one(opened: Open) -> None:
    """The check itself: a row that did not come fails it."""
    scene = Scene(opened)
    scene.store()
    prompt, target = scene.prompt(), scene.engine.blank()
    to = target.slots(len(prompt))
    ticket = scene.pipe.retrieve(prompt, target.caches, to, blend=True)
    ticket.wait()
    target.caches[1].flatten(1, 2)[0, to[40]] = torch.tensor(BLANK, dtype=torch.int32).view(
        torch.float32
    )
    with pytest.raises(AssertionError, match="wrong K"):
        scene.kept.check(ticket, prompt, target, to)
