"""The real SGLang on a CPU, with our storage backend and with our linker: answers are those of the
plain engine, and nothing that was stored is computed again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from real_engine import PAGE, Engine, hicache, linker, prompt

if TYPE_CHECKING:
    Answers = dict[str, Any]
