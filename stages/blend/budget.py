"""How many tokens a blend may compute."""

from __future__ import annotations
