"""Token ids of a text, by the tokenizer files that the controller was given. No engine is imported,
and `tokenizers` only where a text comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tierloom.stages.errors import ConfigError, InputError, MissingPackage

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokens:
    """One tokenizer for each model, read when it is asked for first."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """`files`: by model, `tokenizer.json` or the folder with it. Raises ConfigError."""
        self._files = {model: _file(model, path) for model, path in files.items()}
        self._read: dict[str, Tokenizer] = {}

    def tokens(self, model: str, text: str) -> list[int]:
        """With what the tokenizer puts around a text, as engines do. Raises InputError."""
        if model not in self._files:
            known = ", ".join(self._files) or "none"
            raise InputError(
                f"model {model!r:.200} has no tokenizer here (known: {known}): pass tokens, or "
                "start the controller with --tokenizer MODEL=FILE"
            )
        if model not in self._read:
            try:
                from tokenizers import Tokenizer
            except ImportError:
                raise MissingPackage("tokenizers", "hf", ", or pass tokens") from None
            self._read[model] = Tokenizer.from_file(str(self._files[model]))
        return list(self._read[model].encode(text).ids)


def _file(model: str, path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"--tokenizer {model}={path}: no tokenizer.json there")
    return file
