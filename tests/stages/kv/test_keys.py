"""Keys: the namespace, the chain of grains, and how a prompt is cut."""

import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tierloom.stages.errors import ConfigError, InputError
from tierloom.stages.kv.namespace import Namespace, tlv
from tierloom.stages.kv.prefix import Chain, Span, grain_links
from tierloom.stages.kv.tokens import tokens_array
from tierloom.stages.ops.hash import chunks_of

BASE = Namespace(model="m", geometry="g")


def test_golden_namespace() -> None:
    assert BASE.digest.hex() == "d69ccea24c7cfc9f5e48040be37fca137470271a72d2ab13121b81cefdfcada3"
    full = Namespace(
        model="meta-llama/Llama-3.1-8B",
        weights="w",
        adapter="a",
        geometry="g",
        layers=(0, 32),
        heads=(0, 8),
        part="p",
        layout=b"\x01\x02",
        rope="theta=500000",
        chunk=(256, 32),
        salt="tenant",
        tags=(("k", "v"),),
        multimodal=("img",),
    )
    assert full.digest.hex() == "feb0c8190423916dc7d1f4c011b5c023f5df0c539340b77620e0a28614776cf6"


def test_golden_chain() -> None:
    links = grain_links(BASE.digest, np.arange(70, dtype=np.int32), 32)
    assert [link.hex()[:16] for link in links] == [
        "b1a4da87bd6b933b",
        "ada23f810f822d53",
        "89d43a45534bd930",
    ]


def test_the_chain_is_what_the_docs_say() -> None:
    tokens, link = [5, -1, 2**31 - 1], b"\x07" * 32
    expected = []
    for part in (tokens[:2], tokens[2:]):
        link = hashlib.sha256(link + struct.pack(f"<{len(part)}i", *part)).digest()
        expected.append(link)
    assert grain_links(b"\x07" * 32, np.array(tokens, np.int32), 2) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"weights": "x"},
        {"adapter": "x"},
        {"geometry": "h"},
        {"layers": (0, 1)},
        {"heads": (1, 2)},
        {"layout": b"x"},
        {"rope": "x"},
        {"chunk": (128, 32)},
        {"salt": "x"},
        {"tags": (("a", "b"),)},
        {"multimodal": ("x",)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_field_of_the_namespace_counts(change: dict) -> None:
    fields = {"model": "m", "geometry": "g"} | change
    assert Namespace(**fields).digest != BASE.digest


@pytest.mark.parametrize("model", ["", " ", None, 7])
def test_a_model_must_have_a_name(model: object) -> None:
    with pytest.raises(ConfigError, match=r"model=.*(pass model=|must be named)"):
        Namespace(model=model, geometry="g")  # type: ignore[arg-type]


def test_a_content_id_is_a_name() -> None:
    one, two = (Namespace(model="", weights=w, geometry="g") for w in "ab")
    assert one.digest != two.digest


def test_tags_cannot_be_shuffled_into_one_another() -> None:
    def digest(*tags: tuple[str, str]) -> bytes:
        return BASE.of(salt="", adapter="", tags=tags).digest

    assert len({digest(("a", "b")), digest(("ab", "")), digest(("", "ab")), digest()}) == 4
    assert (
        BASE.of(salt="x", adapter="", tags=()).digest
        != BASE.of(salt="", adapter="x", tags=()).digest
    )


@given(
    st.lists(st.tuples(st.text(), st.binary()), max_size=4),
    st.lists(st.tuples(st.text(), st.binary()), max_size=4),
)
def test_tlv_is_injective(a: list, b: list) -> None:
    assert (tlv(*a) == tlv(*b)) == (a == b)


def test_links_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import numpy as np; from tierloom.stages.kv.prefix import grain_links;"
        "from tierloom.stages.kv.namespace import Namespace;"
        "tokens = np.arange(64, dtype=np.int32);"
        "print(grain_links(Namespace(model='m').digest, tokens, 32)[-1].hex())"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(out) == 1


@given(st.integers(0, 700), st.booleans())
def test_a_prompt_is_cut_without_gaps(n: int, partial: bool) -> None:
    tokens = np.arange(n, dtype=np.int32)
    span = Span(b"".join(grain_links(b"s" * 32, tokens, 16)), b"s" * 32, n)
    pieces = chunks_of(span, size=64, grain=16, partial=partial)
    assert sum(p.tokens for p in pieces) == (n if partial else n // 64 * 64)
    links = grain_links(b"s" * 32, tokens, 16)
    for p in pieces:
        assert p.start == p.index * 64
        first = p.start // 16
        assert p.links == b"".join(links[first : first + -(-p.tokens // 16)])
        assert p.parent == (links[first - 1] if first else b"s" * 32)


@given(st.lists(st.integers(0, 90), max_size=6))
def test_a_chain_grows_to_what_hashing_at_once_gives(parts: list[int]) -> None:
    tokens = np.arange(sum(parts), dtype=np.int32)
    chain, known = Chain(b"s" * 32, 16), 0
    for part in parts:
        known += part
        chain.extend(tokens[chain.tokens : known])
    assert chain.links == grain_links(b"s" * 32, tokens[: known // 16 * 16], 16)
    assert chain.tokens == known // 16 * 16
    grains = len(chain.links)
    whole, rest = chain.span(0, grains), chain.span(grains // 2, grains, wanted=5)
    opening = chain.links[3] if grains > 3 else b"s" * 32
    links = b"".join(chain.links)
    assert whole == Span(links, b"s" * 32, grains * 16, 0, 0, b"s" * 32, opening)
    assert rest.parent == (chain.links[grains // 2 - 1] if grains // 2 else b"s" * 32)
    assert (rest.tokens, rest.wanted) == ((grains - grains // 2) * 16, 5)


@given(st.integers(1, 200), st.integers(0, 199))
def test_a_changed_token_changes_every_link_from_there_on(n: int, at: int) -> None:
    tokens = np.zeros(n, np.int32)
    other = tokens.copy()
    other[min(at, n - 1)] = 1
    a, b = grain_links(b"s" * 32, tokens, 16), grain_links(b"s" * 32, other, 16)
    same = min(at, n - 1) // 16
    assert a[:same] == b[:same]
    assert not set(a[same:]) & set(b[same:])


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (np.zeros((2, 2), np.int32), "1-D"),
        ([1.5, 2.0], "integers"),
        (["a"], "integers"),
        ([2**31], "32 bits"),
        (np.array([True, False]), "integers"),
    ],
)
def test_wrong_tokens_are_named(tokens: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        tokens_array(tokens)


def test_tokens_of_any_integer_type_are_the_same() -> None:
    torch = pytest.importorskip("torch")
    wanted = [3, 1, 2]
    for given_ in (
        wanted,
        tuple(wanted),
        np.array(wanted, np.uint16),
        torch.tensor(wanted),
        range(3, 0, -1),
    ):
        assert tokens_array(given_).dtype == np.int32
    assert tokens_array(torch.tensor(wanted)).tolist() == wanted
    assert tokens_array([]).size == 0
