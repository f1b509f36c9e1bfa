"""What is wrong with a YAML file: every problem with its place, its cause and a cure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from tierloom.stages.errors import ConfigError
from tierloom.stages.options import masked


class Place(NamedTuple):
    """Position of a word of a YAML file. Lines and columns count from 1; 0: no such place."""

    file: str
    line: int = 0
    col: int = 0
    text: str = ""
    """The line itself."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. Prints as `file:line:col: path: message`, the source line, and the hint; what
    is in no file prints as `where it was said: path: message`."""

    file: str
    line: int
    col: int
    path: str
    """Dotted path of the part it is about; empty: the file as a whole."""
    message: str
    hint: str = ""
    text: str = ""
    """The source line."""

    def __str__(self) -> str:
        head = f"{Place(self.file, self.line, self.col)}: {self.path}{': ' if self.path else ''}"
        lines = [head + self.message]
        if self.text.strip():
            lines.append(f"    {self.text.strip()}")
        if self.hint:
            lines.append(f"    hint: {self.hint}")
        return "\n".join(lines)


class ConfigProblems(ConfigError):
    """A configuration that cannot be run, with all that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Findings:
    """Collects problems while a file is checked, so that all can be told at once."""

    def __init__(self) -> None:
        self._problems: dict[Problem, None] = {}

    def __len__(self) -> int:
        return len(self._problems)

    def add(self, at: Place, path: str, message: str, hint: str = "") -> None:
        """Note a problem, secrets masked; the same one is noted once."""
        words = map(masked, (message, hint, at.text))
        self._problems[Problem(*at[:3], path, *words)] = None

    def sorted(self) -> tuple[Problem, ...]:
        """The problems, file by file in reading order."""
        return tuple(sorted(self._problems, key=lambda p: (p.file, p.line, p.col)))

    def raise_all(self) -> None:
        """Raise ConfigProblems if there is any problem."""
        if self._problems:
            raise ConfigProblems(self.sorted())


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the known name that `word` was meant to be, or else all of them."""
    names = sorted(known)
    if close := get_close_matches(word, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else ""
