"""What the index of kept text finds, beside brute force."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tierloom.stages.directory.text_index import TextIndex
from tierloom.stages.kv.text import Text

from .texts import OTHER, ROOT, Shelf, Tokens, chunks_of, most_tokens, opening_of


def noise(seed: int, n: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 50_000, n).astype(np.int32)


def join(*parts: Tokens) -> Tokens:
    return np.concatenate(parts).astype(np.int32)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_runs_are_those_that_brute_force_finds(data: st.DataObject) -> None:
    """Small texts of few tokens, so that they are alike in many places."""
    words = [noise(i, 12) for i in range(5)]
    some = st.lists(st.integers(0, 4), min_size=1, max_size=8)
    text = some.map(lambda picked: join(*(words[i] for i in picked)))
    shelf = Shelf(chunk=16, grain=4, base=data.draw(st.integers(2, (1 << 61) - 2)))
    prompts = data.draw(st.lists(text, min_size=1, max_size=3))
    for prompt in prompts:
        cut = data.draw(st.integers(0, 5))
        shelf.keep(prompt[cut:])
    asked = join(noise(99, 1), data.draw(text)[data.draw(st.integers(0, 5)) :])  # no prefix
    least = data.draw(st.sampled_from([4, 8, 11]))
    runs = shelf.index.find(asked, ROOT, least=least)
    shelf.check(asked, runs, least=least)
    got = sum(run.end - run.start - least + 1 for run in runs)
    assert got <= most_tokens(shelf, asked, least)
    grains = [t.ids[i : i + 4].tobytes() for t in shelf.texts.values()
              for i in range(0, len(t.ids) - 3, 4)]  # fmt: skip
    if max(map(grains.count, grains), default=0) <= 4:  # of more copies, the oldest are forgotten
        assert got == most_tokens(shelf, asked, least)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30), st.integers(63, 300), st.integers(0, 400), st.integers(0, 99))
def test_every_common_stretch_of_two_grains_less_one_holds_a_hit(
    seed: int, size: int, kept_at: int, asked_at: int
) -> None:
    same = noise(seed, size)
    shelf = Shelf()
    shelf.keep(join(noise(seed + 1, kept_at), same, noise(seed + 2, 64)))
    asked = join(noise(seed + 3, asked_at), same, noise(seed + 4, 40))
    runs = shelf.index.find(asked, ROOT, least=32)
    assert shelf.check(asked, runs, least=32) > size - 64
    assert runs[0].start < asked_at + 32


def test_passages_of_200_to_400_tokens_are_found_at_any_alignment() -> None:
    """A system prompt and 8 of 100 passages in any order, cut from each prompt's beginning: of new
    prompts, 9 tokens of 10."""
    rng, shelf = np.random.default_rng(2), Shelf()
    pool = [noise(100 + i, int(rng.integers(200, 400))) for i in range(100)]
    system = noise(99, 60)

    def prompt() -> Tokens:
        return join(system, *(pool[i] for i in rng.choice(len(pool), 8, replace=False)))

    for _ in range(70):
        shelf.keep(prompt())
    asked = [prompt() for _ in range(40)]
    runs = [shelf.index.find(text, ROOT, start=64) for text in asked]
    found = sum(shelf.check(text, got, start=64) for text, got in zip(asked, runs, strict=True))
    assert found >= 0.9 * sum(len(text) - len(system) for text in asked)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_after_any_changes_it_is_as_if_built_anew(data: st.DataObject) -> None:
    shelf = Shelf(chunk=16, grain=4)
    pieces = [noise(i, 24) for i in range(12)]
    some = st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)
    for _ in range(data.draw(st.integers(1, 30))):
        keys = shelf.keep(join(*(pieces[i] for i in data.draw(some))))
        for key in data.draw(st.lists(st.sampled_from(keys), max_size=3)):
            shelf.drop(key)
        shelf.drop(b"never" * 6)
    assert len(shelf.index) == len(shelf.texts)
    assert all(key in shelf.index for key in shelf.texts)
    asked = join(noise(99, 7), *(pieces[i] for i in data.draw(some)))
    runs = shelf.index.find(asked, ROOT, least=8)
    shelf.check(asked, runs, least=8)
    for key in list(shelf.texts):
        shelf.drop(key)
    assert len(shelf.index) == 0
    assert not shelf.index.find(asked, ROOT, least=4)
    assert not shelf.index._table.any()  # no trace is left


def test_identities_are_reused_and_it_grows() -> None:
    shelf = Shelf(chunk=16, grain=4)
    first = shelf.keep(noise(1, 16 * 3000))
    full = shelf.index.nbytes
    for key in first:
        shelf.drop(key)
    assert not shelf.index._entries
    kept = noise(2, 16 * 3000)
    shelf.keep(kept)
    assert shelf.index.nbytes <= full
    (run,) = shelf.index.find(kept, ROOT)
    assert shelf.check(kept, [run]) == len(kept)
    shelf.index.clear()
    assert len(shelf.index) == 0
    assert not shelf.index.find(kept, ROOT)


def test_it_changes_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices so small that most changes meet a table that is half moved."""
    monkeypatch.setattr("tierloom.stages.directory.text_index._SLICE", 40)
    shelf, rng, between = Shelf(chunk=16, grain=4), np.random.default_rng(8), 0
    index, texts, keys = shelf.index, [], []
    for i in range(400):
        same = np.full(16, i % 3, np.int32)  # more copies than are kept
        texts.append(join(noise(i, 40), same, noise(i % 7, 24)))
        keys += shelf.keep(texts[-1])
        for key in rng.choice(np.array(keys, object), 2):
            shelf.drop(key)
        table = index._table[index._table != 0]
        assert len(table) == index._entries
        if index._larger is not None:
            larger = index._larger[0]
            before = [e for e in table if _home(e, index._size) < index._moved]
            assert sorted(larger[larger != 0].tolist()) == sorted(map(int, before))
            between += 1
    assert 50 < between < 390
    assert all(key in index for key in shelf.texts)
    for text in texts[::20]:
        shelf.check(text, index.find(text, ROOT, least=4), least=4)
    for key in list(shelf.texts):
        shelf.drop(key)
    assert not index._table.any()
    assert index._larger is None or not index._larger[0].any()


def _home(entry: int, size: int) -> int:
    return (int(entry) >> 32) * size >> 32


def test_a_collision_is_a_hit_that_the_caller_refuses() -> None:
    """With a known base another text can be made: x^2 a + x b + c is the same for (a, b + 1, c) and
    (a, b, c + x), and as the base is small, both are token ids."""
    base = 1000
    shelf = Shelf(base=base)
    kept, asked = noise(3, 256), noise(3, 256)
    kept[10], kept[11], asked[10], asked[11] = 6, 5, 5, 5 + base
    shelf.keep(kept)
    (run,) = shelf.index.find(asked, ROOT)
    assert run.end == 256
    assert (asked != shelf.texts[run.excerpts[0].key].ids).sum() == 2
    secret = Shelf()
    secret.keep(kept)
    (run,) = secret.index.find(asked, ROOT)
    assert run.start == 32


def test_one_token_repeated_is_kept_and_asked() -> None:
    shelf, same = Shelf(), np.full(32_768, 7, np.int32)
    for root in (ROOT, OTHER):
        shelf.keep(same, root)
    shelf.keep(join(noise(1, 40), same))
    runs = shelf.index.find(same, ROOT)
    assert shelf.check(same, runs) >= 32_768 - 64
    for key in list(shelf.texts):
        shelf.drop(key)
    assert not shelf.index.find(same, ROOT)


@pytest.mark.parametrize("size", [1, 31, 32, 63, 100])
def test_what_is_shorter_than_a_chunk_or_grain(size: int) -> None:
    shelf, text = Shelf(), noise(5, size)
    shelf.keep(text)
    assert len(shelf.index) == (size >= 32)
    runs = shelf.index.find(join(noise(6, 9), text), ROOT, least=32)
    assert shelf.check(join(noise(6, 9), text), runs, least=32) == size // 32 * 32


def test_a_chunk_of_special_tokens_only() -> None:
    shelf, special = Shelf(), np.zeros(256, np.int32)
    shelf.keep(special)
    shelf.keep(np.full(256, -1, np.int32))
    assert shelf.check(special, shelf.index.find(special, ROOT)) == 256


def test_what_another_root_keeps_is_never_found() -> None:
    shelf, text = Shelf(), noise(7, 2000)
    shelf.keep(text, OTHER)
    assert not shelf.index.find(text, ROOT)
    assert shelf.index.find(text, OTHER)


def test_a_run_is_kept_whole_and_only_what_moved_has_a_seam() -> None:
    shelf, text = Shelf(), noise(8, 1500)
    keys = shelf.keep(text)
    (run,) = shelf.index.find(join(noise(9, 70), text[100:1400]), ROOT)
    assert len(run.excerpts) == 6
    assert run.seam
    (run,) = shelf.index.find(text, ROOT, start=512, before=keys[1])
    assert (run.start, run.seam) == (512, False)
    (run,) = shelf.index.find(text, ROOT, start=544, before=keys[2])
    assert (run.start, run.seam) == (544, False)
    (run,) = shelf.index.find(text, ROOT, start=544, before=keys[1])
    assert run.seam
    (run,) = shelf.index.find(text, ROOT)
    assert not run.seam


def test_a_long_run_is_not_cut_by_an_early_short_one() -> None:
    shelf, text = Shelf(), noise(10, 1024)
    shelf.keep(join(noise(11, 192), text[:64]))
    shelf.keep(join(noise(12, 250), text))
    (run,) = shelf.index.find(text, ROOT)
    assert shelf.check(text, [run]) >= 1024 - 64


def test_of_the_same_text_the_better_capture_is_taken() -> None:
    opening, passage = noise(13, 64), noise(14, 192)
    asked = join(opening, noise(15, 100), passage)

    def found(*prompts: Tokens, known: bool) -> Tokens:
        shelf = Shelf()
        for prompt in prompts:
            shelf.keep(prompt)
        name = opening_of(asked) if known else b""
        runs = shelf.index.find(asked, ROOT, start=64, opening=name)
        return shelf.texts[runs[-1].excerpts[0].key].ids[:8]

    own = join(opening, passage)
    newer = join(noise(16, 64), passage)
    first = join(passage, noise(17, 64))
    assert (found(own, newer, known=True) == own[:8]).all()
    assert (found(own, newer, known=False) == newer[:8]).all()
    assert (found(newer, own, known=False) == own[:8]).all()
    assert (found(newer, first, known=False) == newer[:8]).all()
    longer = join(noise(18, 64), noise(15, 100)[-32:], passage[:160])
    assert (found(longer, newer, known=False) == newer[:8]).all()


def test_a_fifth_copy_cuts_no_run() -> None:
    """One grain is in many prompts; the table has four of them, and every run goes on over it."""
    shelf, common = Shelf(), noise(19, 32)
    prompts = [join(noise(20 + i, 96), common, noise(40 + i, 128)) for i in range(9)]
    for prompt in prompts:
        shelf.keep(prompt)
    for prompt in prompts:
        (run,) = shelf.index.find(prompt, ROOT)
        assert shelf.check(prompt, [run]) == 256


def test_threads_add_remove_and_find() -> None:
    index, wrong = TextIndex(16, 4), []
    stays = noise(70, 160)
    for key, text in chunks_of(stays, 16):
        index.add(key, text)

    def change(seed: int) -> None:
        for round_ in range(60):
            mine = list(chunks_of(noise(1000 * seed + round_, 160), 16))
            for key, text in mine:
                index.add(key, text)
            for key, _ in mine:
                index.remove(key)

    def ask() -> None:
        for _ in range(120):
            runs = index.find(stays, ROOT, least=8)
            if [(r.start, r.end) for r in runs] != [(0, 160)]:
                wrong.append(runs)

    threads = [threading.Thread(target=change, args=(i,)) for i in range(3)]
    threads += [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(index) == 10


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="whole grains"):
        TextIndex(100, 32)
    with pytest.raises(ValueError, match="least is 0"):
        TextIndex(256, 32).find(noise(1, 100), ROOT, least=0)
    assert not TextIndex(256, 32).find(noise(1, 10), ROOT, start=50)


def test_the_module_alone_imports_no_numba() -> None:
    code = "import sys, tierloom.stages.directory.text_index; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_text_longer_than_a_chunk_is_not_taken() -> None:
    index = TextIndex(256, 32)
    index.add(b"k" * 32, Text(noise(1, 300), 0, ROOT, ROOT, ROOT))
    assert len(index) == 0
