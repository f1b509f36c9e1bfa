"""Times have units, wherever they are written."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from tierloom.adapters.vllm.exchange.settings import Settings
from tierloom.pipeline.config.coerce import BAD, coerce
from tierloom.pipeline.config.explain import option_words
from tierloom.pipeline.config.problems import Findings, Place
from tierloom.pipeline.config.spec import Breaker, GraphOptions, Pace
from tierloom.pipeline.config.yaml_tree import Leaf
from tierloom.stages import catalog
from tierloom.stages.options import parse_mode, parse_seconds, parse_size, seconds_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("150 ms", 0.15), ("2s", 2.0), ("1.5 h", 5400.0), ("7 d", 604800.0), ("3 us", 3e-6)],
)
def test_a_time_and_its_unit(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("nothing", [0, 0.0, "0", " 0.0 ", "0 s"])
def test_nothing_needs_no_unit(nothing) -> None:
    assert parse_seconds(nothing) == 0.0


@pytest.mark.parametrize("bare", [250, 0.25, "250", "0.25", " 3 "])
def test_a_number_alone_is_no_time(bare) -> None:
    n = str(bare).strip()
    with pytest.raises(ValueError, match=f"has no unit; write '{n} ms' or '{n} s'"):
        parse_seconds(bare)


@pytest.mark.parametrize("wrong", [True, False, None, -1, "-1", "1 GiB", "soon", "", "1e3", [1]])
def test_what_is_no_time_at_all(wrong) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_seconds(wrong)


@pytest.mark.parametrize("seconds", [0.0, 3e-6, 0.05, 0.25, 1.0, 5.0, 60.0, 86400.0])
def test_what_is_shown_can_be_written(seconds: float) -> None:
    assert parse_seconds(seconds_text(seconds)) == pytest.approx(seconds)


def test_sizes_may_be_whole_bytes() -> None:
    assert parse_size(4096) == parse_size("4096") == 4096


@pytest.mark.parametrize("text", [770, "770", "0770", " 0770 "])
def test_a_mode_is_octal(text) -> None:
    assert parse_mode(text) == "0770"


@pytest.mark.parametrize("wrong", [True, None, 0, 504, "0o770", "rwx", 70, "0970", "00770"])
def test_what_is_no_mode(wrong) -> None:
    with pytest.raises(ValueError, match="write one as in 0770"):
        parse_mode(wrong)


def times():
    """Every option that is a time: (class, name, type)."""
    kinds = (("stage", catalog.STAGES), ("tier", catalog.TIERS))
    found = [catalog.load_class(kind, name).Options for kind, names in kinds for name in names]
    for options in (*dict.fromkeys(found), Breaker, GraphOptions, Pace, Settings):
        hints = get_type_hints(options, include_extras=True)
        for field in fields(options):
            kind = hints[field.name]
            marks = [m for k in (kind, *get_args(kind)) for m in getattr(k, "__metadata__", ())]
            if parse_seconds in marks:
                yield pytest.param(kind, field.default, id=f"{options.__name__}.{field.name}")


TIMES = list(times())


@pytest.mark.parametrize(("kind", "default"), TIMES)
def test_every_option_that_is_a_time_wants_one(kind, default) -> None:
    at = Place("p.yaml", 1, 1)
    for bare in (250, 0.25, "250"):
        found = Findings()
        assert coerce(kind, Leaf(bare, at), "x", found) is BAD
        assert ["has no unit" in p.message for p in found.sorted()] == [True]
    assert coerce(kind, Leaf("250 ms", at), "x", Findings()) == 0.25
    if default is not None:
        assert coerce(kind, Leaf(seconds_text(default), at), "x", Findings()) == default


def test_all_of_them_are_found() -> None:
    assert len(TIMES) >= 18
    assert "ttl 86400 s" in option_words(
        catalog.load_class("tier", "redis").Options(url="redis://h"), all=True
    )
