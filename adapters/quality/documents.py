"""What codecs are judged on: texts that are on every machine, cut into context and suffix.

A document is a run of tokens with one or more *spans*: the KV of a span's context is treated by a
codec, its suffix is read on top of what came back. Texts ship with Python (help topics, docstrings,
source) or with Debian (a licence, where it is there), or are generated; none is downloaded. Another
Python has other help texts: `Document.digest` says whether two figures are of the same tokens.

The texts that codecs may learn from (`calibration_texts`) are others, and the test of this file
holds that no 32 tokens in a row are in both.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierloom.stages.errors import InputError

Encoder = Callable[[str], list[int]]


TOPICS = ("formatstrings", "import", "compound", "debugger")
"""Help topics of Python (`pydoc_data.topics`) that are test documents."""
FILLER = "typesmapping"
"""The help topic between which needles lie."""
LEARN_TOPICS = ("string-methods", "types", "assignment", "comparisons")
LEARN_SOURCES = ("heapq", "bisect")
LICENCE = Path("/usr/share/common-licenses/GPL-3")
NEEDLES = 8
CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Kyoto", "Quito", "Perth", "Riga", "Accra",
    "Turin", "Hanoi", "Dakar", "Boston", "Malmo", "Tunis",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How documents are cut."""

    contexts: tuple[int, ...] = (512, 1024)
    """Tokens whose KV is treated; one span each."""
    suffix: int = 96
    """Tokens read on top of it, at least."""
    chunk: int = 256
    """Tokens of a stored object."""

    def upto(self, positions: int) -> Sizes:
        """What a model with `positions` can read. Raises InputError if that is nothing."""
        kept = tuple(n for n in self.contexts if n + self.suffix < positions)
        if not kept:
            raise InputError(
                f"the model reads {positions} tokens, the shortest document has "
                f"{min(self.contexts) + self.suffix + 1}: pass smaller Sizes"
            )
        return Sizes(contexts=kept, suffix=self.suffix, chunk=self.chunk)


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens, the spans in them, and where a needle's value is asked for."""

    name: str
    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    """(context, suffix) in tokens; a span's suffix follows its context. One more token follows."""
    values: tuple[tuple[int, int], ...] = ()
    """First and last + 1 position of each value in the suffix."""

    @property
    def context(self) -> int:
        """Tokens whose KV is treated: the longest span's context."""
        return max(n for n, _ in self.spans)

    @property
    def digest(self) -> str:
        """What tells two documents apart: sha256 of the ids as little-endian int32, 16 digits."""
        raw = array("i", self.ids)
        return hashlib.sha256(raw.tobytes()).hexdigest()[:16]


def documents(encode: Encoder, sizes: Sizes) -> list[Document]:
    """Every test document that is long enough in this tokenizer: ten with it all.

    `encode` turns text into ids, with what a prompt begins with (BOS) where the model has one.
    Raises InputError when there is none.
    """
    made = [d for name, text in texts().items() if (d := _cut(name, encode(text), sizes))]
    made += [d for n in sizes.contexts if (d := _needles(encode, n, sizes.suffix))]
    if not made:
        raise InputError("no document is long enough: pass smaller Sizes")
    return made


def texts() -> dict[str, str]:
    """Test texts by name."""
    helped = topics()
    found = {f"topic {name}": helped[name] for name in TOPICS if name in helped}
    found["docstrings"] = docstrings("statistics", "shutil", "textwrap")
    found["source"] = _source("textwrap")
    found["records"] = _records()
    if LICENCE.is_file():
        found["licence"] = LICENCE.read_text("utf-8")
    return {name: text for name, text in found.items() if text}


def calibration_texts() -> list[str]:
    """Texts to learn from: of the same kinds as the test texts, and disjoint from them."""
    helped = topics()
    found = [helped[name] for name in LEARN_TOPICS if name in helped]
    found += map(_source, LEARN_SOURCES)
    found += [docstrings("argparse", "configparser"), _records(seed=2)]
    return [text for text in found if text]


def _cut(name: str, ids: list[int], sizes: Sizes) -> Document | None:
    need = max(sizes.contexts) + sizes.suffix + 1
    spans = tuple((n, sizes.suffix) for n in sizes.contexts)
    return Document(name, ids[:need], spans) if len(ids) >= need else None


def _needles(encode: Encoder, context: int, suffix: int) -> Document | None:
    """Eight `key = value` facts spread over a context, all of them asked for in the suffix."""
    rng = random.Random(context)
    facts = [(city, rng.randrange(1000, 10000)) for city in rng.sample(CITIES, NEEDLES)]
    begin = encode("")  # what every prompt begins with

    def plain(text: str) -> list[int]:
        return encode(text)[len(begin) :]

    told = [plain(f"\nThe code of {city} is {code}.\n") for city, code in facts]
    filler = plain(topics().get(FILLER, "") or _records(seed=3))
    room = context - len(begin) - sum(map(len, told))
    if room < NEEDLES + 1 or len(filler) < room:
        return None
    ids, cuts = list(begin), [room * i // (NEEDLES + 1) for i in range(NEEDLES + 2)]
    for fact, at, end in zip(told, cuts, cuts[1:], strict=False):
        ids += filler[at:end] + fact
    ids += filler[cuts[-2] : room]
    values = []
    rng.shuffle(facts)
    for city, code in facts:
        ids += plain(f"\nThe code of {city} is")
        value = plain(f" {code}")
        values.append((len(ids), len(ids) + len(value)))
        ids += value + plain(".")
    ids += plain(_records(seed=4))[: max(0, suffix + 1 - (len(ids) - context))] or plain("\n")
    return Document(f"needles {context}", ids, ((context, len(ids) - context - 1),), tuple(values))


def topics() -> dict[str, str]:
    """Python's help topics."""
    found: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return found


def docstrings(*modules: str) -> str:
    """Docstrings of modules and their public names. Raises ImportError."""
    return "\n\n".join(doc for name in modules for doc in _docs_in(importlib.import_module(name)))


def _docs_in(module: Any) -> Iterator[str]:
    """The docstrings of a module and of its public names, in alphabetical order."""
    yield f"{module.__name__}\n\n{inspect.getdoc(module) or ''}"
    for name in sorted(getattr(module, "__all__", dir(module))):
        thing = getattr(module, name, None)
        home = getattr(thing, "__module__", None)
        if home == module.__name__ and callable(thing) and (doc := inspect.getdoc(thing)):
            yield f"{module.__name__}.{name}\n\n{doc}"


def _source(module: str) -> str:
    try:
        return inspect.getsource(importlib.import_module(module))
    except OSError:  # a Python without its sources
        return ""


def _records(seed: int = 1) -> str:
    """Lines of a table, as an export has them: 200 orders, the same on every machine."""
    rng = random.Random(seed)
    things = ("bolts", "cable", "paper", "lamps", "paint", "glass", "rope", "tiles")
    lines = ["order;day;city;item;pieces;price;state"]
    for n in range(200):
        city, thing = rng.choice(CITIES), rng.choice(things)
        state = rng.choice(("sent", "paid", "open", "returned"))
        price = f"{rng.randrange(100, 99999) / 100:.2f}"
        day = f"{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
        number = 1000 * seed + n
        lines.append(f"{number};{day};{city};{thing};{rng.randrange(1, 500)};{price};{state}")
    return "\n".join(lines) + "\n"
