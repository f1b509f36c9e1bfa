"""Names of chunks and records of workers: what is in them, and what is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from tierloom.stages.directory.shared.records import (
    NUMBERS,
    ChunkHolder,
    WorkerRecord,
    chunk_name,
    epoch_of,
    holders_in,
    number_of,
    pack_changes,
    require_changes,
    turn_of,
    word_of,
)
from tierloom.stages.errors import InputError
from tierloom.stages.kv.object import name_of
from tierloom.testing.directories import worker_of

SPACE = b"s" * 32
KEYS = [bytes([i]) * 32 for i in range(40)]


def test_a_chunk_is_called_as_a_server_calls_its_object() -> None:
    assert chunk_name(SPACE, KEYS[3]) == name_of(SPACE, KEYS[3])[:16]
    assert chunk_name(b"t" * 32, KEYS[3]) != chunk_name(SPACE, KEYS[3])
    for space, key in ((SPACE, b"short"), (b"short", KEYS[0])):
        with pytest.raises(InputError, match="not 32"):
            chunk_name(space, key)


@given(st.integers(0, NUMBERS - 1), st.integers(0, 15), st.binary(max_size=2))
def test_words(number, tiers, more) -> None:
    words = word_of(number, tiers) * 2
    assert holders_in(words + more) == (ChunkHolder(number, tiers),) * 2


def test_epochs_grow_with_turns_and_tell_processes_apart() -> None:
    a, b = worker_of("a", 1), worker_of("a", 2)
    assert epoch_of(7, a) != epoch_of(7, b)
    assert max(epoch_of(7, a), epoch_of(7, b)) < min(epoch_of(8, a), epoch_of(8, b))
    assert turn_of(epoch_of(NUMBERS + 3, a)) == NUMBERS + 3
    assert number_of(epoch_of(NUMBERS + 3, a)) == 3


def test_changes_are_packed() -> None:
    raw = pack_changes([(b"n" * 16, 3), (b"m" * 16, 0)])
    assert raw == b"n" * 16 + b"\3" + b"m" * 16 + b"\0"
    require_changes(raw)
    require_changes(b"")
    for bad in (raw[:-1], raw * 513, b"n" * 16 + b"\x10"):
        with pytest.raises(InputError, match="at most"):
            require_changes(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instance", ""), ("instance", "a\nb"), ("instance", "x" * 201), ("instance", 7),
        ("share", "\ud800"),
        ("process", "0" * 31), ("process", "G" * 32), ("rank", -1), ("rank", "0"), ("chunk", 0),
        ("grain", 100), ("grain", 0), ("tiers", ("a",) * 5), ("tiers", "hot"), ("tiers", (1,)),
        ("addresses", (None,)), ("fields", {"a": 1}), ("fields", []), ("heartbeat", 0.01),
        ("heartbeat", float("nan")), ("heartbeat", 1e9), ("model", None),
    ],
)  # fmt: skip
def test_a_worker_that_cannot_be_is_named(field, value) -> None:
    with pytest.raises(InputError, match=f"worker's .*{field}"):
        replace(worker_of("a"), **{field: value})


def test_a_record_is_what_it_was() -> None:
    record = worker_of("ä", fields={"model": "m"}, addresses=("tcp://h:1",), share="0-7")
    assert record.name == "ä/0/0-7"
    assert WorkerRecord.unpack(record.pack()) == record
    later = json.dumps(json.loads(record.pack()) | {"color": "blue"}).encode()
    assert WorkerRecord.unpack(later) == record
    with pytest.raises(InputError, match="8192 at most"):
        replace(record, fields={"model": "m" * 9000}).pack()


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
FIELDS = list(WorkerRecord.__dataclass_fields__)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3), st.binary(max_size=40))
def test_records_that_nobody_wrote(said, raw) -> None:
    for bad in (raw, json.dumps(said).encode(), json.dumps([said]).encode(), b"[" * 8000):
        with suppress(InputError):
            WorkerRecord.unpack(bad)
    whole = json.loads(worker_of("a").pack())
    with suppress(InputError):
        WorkerRecord.unpack(json.dumps(whole | said).encode()).pack()
