"""One way to declare options: a frozen, keyword-only dataclass with one doc line per field.

The YAML checker, `tierloom explain`, the JSON schema and the docs all read these classes. Sizes
and times are written with units (`64 GiB`, `150 ms`) and typed `Size` and `Seconds`; a `Share` may
be written `7 %`, and a `Rate` is written `2 GiB/s`.
"""

from __future__ import annotations

import ast
import errno
import inspect
import itertools
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Annotated, Any

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_USERINFO = re.compile(r"(://)[^\s'\"]*@")
_SECRET = re.compile(
    r"(?<![\w/.-])([\w-]*(?:(?:passw(?:or)?d|secret|credential)[\w-]*|(?:access|account|api)_?key|token))"
    r"(?<!_env)(?<!_file)(['\"]?\s*[:=]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s,}&#]+)",
    re.IGNORECASE,
)
_CAUSES = tuple({os.strerror(number) for number in errno.errorcode})
_MODE = re.compile(r"^\s*0?(7[0-7][0-7])\s*$")
_SHARE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*$")
_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")


def parse_size(text: str | int) -> int:
    """'64 GiB' -> bytes. A bare number is bytes. Raises ValueError."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    m = _NUMBER.match(text) if isinstance(text, str) else None
    unit = (m[2].upper() or "B") if m else ""
    if m is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write one as in '64 GiB' or '500 MB'")
    return int(float(m[1]) * _UNITS[unit])


def parse_rate(text: str | int) -> int:
    """'2 GiB/s' -> bytes per second. Only 0 needs no unit. Raises ValueError."""
    if text == 0 or (isinstance(text, str) and text.strip() == "0"):
        return 0
    if not isinstance(text, str) or not text.rstrip().endswith("/s"):
        raise ValueError(f"{text!r} is not a rate; write one as in '2 GiB/s'")
    return parse_size(text.rstrip().removesuffix("/s").rstrip())


def parse_seconds(text: str | float) -> float:
    """'150 ms' -> seconds. Only 0 needs no unit: a bare number may be meant as milliseconds, as
    other programs have it. Raises ValueError."""
    bare = isinstance(text, (int, float)) and not isinstance(text, bool)
    m = _NUMBER.match(str(text)) if bare or isinstance(text, str) else None
    if m is not None and not m[2]:
        if float(m[1]):
            raise ValueError(f"{text!r} has no unit; write '{m[1]} ms' or '{m[1]} s'")
        return 0.0
    if m is None or m[2].lower() not in _TIMES:
        raise ValueError(f"{text!r} is not a time; write one as in '150 ms' or '24 h'")
    return float(m[1]) * _TIMES[m[2].lower()]


def parse_share(text: str | float) -> float:
    """'7 %' or 0.07 -> 0.07. Raises ValueError."""
    share = -1.0
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        share = float(text)
    elif isinstance(text, str) and (m := _SHARE.match(text)):
        share = float(m[1]) / (100 if m[2] else 1)
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} is not a share; write one as in '7 %' or 0.07")
    return share


def parse_mode(text: str | int) -> str:
    """770 or '0770' -> '0770': who may use a folder, in octal as chmod takes it. Raises
    ValueError."""
    m = _MODE.match(str(text)) if type(text) in (str, int) else None
    if m is None:
        raise ValueError(
            f"{text!r} is not a mode; write one as in 0770: the owner needs all rights"
        )
    return f"0{m[1]}"


def seconds_text(seconds: float) -> str:
    """Seconds as one writes them: '150 ms'."""
    return f"{seconds:g} s" if seconds >= 1 or not seconds else f"{seconds * 1e3:g} ms"


Size = Annotated[int, parse_size]
"""Bytes, written with a unit."""
Seconds = Annotated[float, parse_seconds]
"""Seconds, written with a unit."""
Rate = Annotated[int, parse_rate]
"""Bytes per second, written with a unit; 0: no limit."""
Mode = Annotated[str, parse_mode]
"""Permissions of a folder, in octal digits."""
Share = Annotated[float, parse_share]
"""A part of a whole, from 0 to 1; also written in per cent."""


def masked(text: str) -> str:
    """The text as it may be printed: without the user and password of a URL, and without the
    values of what is called a password, secret, key or token. Causes are no secrets: a file that
    is called so may be missing. What is no text, as paths may be, is written as `\\udcff`."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _SECRET.sub(_without_value, _USERINFO.sub(r"\1***@", text))


def _without_value(found: re.Match[str]) -> str:
    if found.string.startswith(_CAUSES, found.end(2)):
        return found[0]
    return f"{found[1]}{found[2]}***"


def _source_of(cls: type[Any]) -> list[ast.stmt]:
    """What a class's body has: of one in a module's own level out of the module, parsed once."""
    module = sys.modules[cls.__module__]
    found = _classes(module).get(cls.__qualname__)
    if found is None:
        found = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(found, ast.ClassDef)
    return found.body


@lru_cache(64)
def _classes(module: ModuleType) -> dict[str, ast.stmt]:
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # it has no file
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def field_docs(options: type[Any]) -> dict[str, str]:
    """The doc line under each field of an options class, read from its source."""
    docs: dict[str, str] = {}
    for cls in reversed(options.__mro__[:-1]):
        body = _source_of(cls)
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = str(after.value.value)
    return docs


@dataclass(frozen=True, kw_only=True, slots=True)
class NoOptions:
    """No options."""
