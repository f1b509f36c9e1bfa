"""Values of LMCache's options, read as LMCache reads them. Each reader raises ValueError, or
TypeError, for what nobody can have meant."""

from __future__ import annotations

import math
from typing import Any

import yaml

from tierloom.pipeline.config.problems import nearest

POLICIES = ("fifo", "lfu", "lru", "mru")
_FLAGS = {"true": True, "1": True} | dict.fromkeys(("false", "0", "no", "off", "none", ""), False)


def read_flag(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _FLAGS:
        hint = nearest(word, ("true", "false"))
        raise ValueError(f"{value!r} is not true or false, and LMCache takes it for false; {hint}")
    return _FLAGS[word]


def read_count(value: Any) -> int:
    """1 or more."""
    number = read_number(value)
    if number < 1 or number != int(number):
        raise ValueError(f"wants a whole number above 0, got {value!r}")
    return int(number)


def read_whole(value: Any) -> int:
    """0 or more."""
    return 0 if read_number(value) == 0 else read_count(value)


def read_number(value: Any) -> float:
    """0 or more."""
    try:
        number = float(value)
    except (ValueError, TypeError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError(f"wants a number, got {value!r}")
    return number


def read_policy(value: Any) -> str:
    policy = str(value).strip().lower()
    if policy not in POLICIES:
        raise ValueError(f"no such policy: {value!r}; {nearest(policy, POLICIES)}")
    return policy


def read_folders(value: Any) -> list[str]:
    """Paths, or `file:///PATH`."""
    found = [word.removeprefix("file://") for word in read_words(value)]
    for path in found:
        if not path.startswith(("/", "~", ".")) and ":" in path:
            rest = path.rpartition(":")[2].lstrip("/")
            raise ValueError(f"neither a path nor file:///PATH: {path!r}; did you mean '/{rest}'?")
    return found


def read_words(value: Any) -> list[str]:
    whole = value if isinstance(value, list) else str(value).split(",")
    return [word for item in whole if (word := str(item).strip())]


def read_table(value: Any) -> dict[str, Any]:
    table = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise ValueError(f"no mapping: {value!r}")  # noqa: TRY004 (the one error of all readers)
    return {str(k): v for k, v in table.items()}


def read_ports(value: Any) -> list[int]:
    return [int(word) for word in read_words(value)]


def read_share(value: Any) -> float:
    """The largest of a number, or of several."""
    found = max(float(word) for word in read_words(value))
    if not 0 < found <= 1:
        raise ValueError(f"no share of the tokens: {value!r}")
    return found
