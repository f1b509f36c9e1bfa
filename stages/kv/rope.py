"""Rotary position embeddings: how fast each pair of K's channels turns, from a model's parameters.

Su et al., "RoFormer", arXiv 2104.09864; scaled as Hugging Face's `rope_parameters` say, by YaRN
(Peng et al., arXiv 2309.00071) and LongRoPE (Ding et al., arXiv 2402.13753) among others. What they
multiply sines and cosines by stays in K when it is turned on, so nobody needs to know it.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NONE: npt.NDArray[np.float32] = np.zeros(0, np.float32)
"""Nothing turns, or nobody knows how."""


def frequencies(parameters: str, dim: int) -> npt.NDArray[np.float32]:
    """Radians per token, float32 [half], of pairs (i, i + half) of a head of `dim` channels.

    `parameters`: JSON as `tierloom.open(rope=)` takes it; `rope_type` one of default, linear,
    llama3, yarn, and longrope whose factors do not depend on the prompt's length. Empty where it is
    anything else: K is then kept as it is turned, which costs bits, not truth.
    """
    try:
        found = json.loads(parameters) if parameters else {}
        freqs = _frequencies(found, dim) if isinstance(found, dict) else NONE
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return NONE
    return freqs if np.isfinite(freqs).all() else NONE


def _frequencies(p: dict[str, Any], dim: int) -> npt.NDArray[np.float32]:
    kind = p.get("rope_type", "default")
    plain = "rope_theta" in p and "mrope_section" not in p  # else positions are not the tokens'
    if not plain or kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        return NONE
    theta = float(p["rope_theta"])
    turned = int(dim * float(p.get("partial_rotary_factor", 1.0)))
    if not theta > 0 or turned < 2 or turned > dim or turned % 2:
        return NONE
    pairs = np.arange(0, turned, 2, dtype=np.float64) / turned
    freqs = theta**-pairs
    if kind == "linear":
        freqs /= float(p["factor"])
    elif kind == "llama3":
        freqs = _llama3(freqs, p)
    elif kind == "yarn":
        freqs = _yarn(freqs, p, turned)
    elif kind == "longrope":
        if p["short_factor"] != p["long_factor"]:
            return NONE
        freqs /= np.array(p["short_factor"], np.float64)
    return freqs.astype(np.float32)


def _llama3(freqs: npt.NDArray[np.float64], p: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Slow turns slower, quick ones as they were, and a slope between."""
    low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
    turns = float(p["original_max_position_embeddings"]) * freqs / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    slow: npt.NDArray[np.float64] = freqs / float(p["factor"])
    return (1 - share) * slow + share * freqs


def _yarn(freqs: npt.NDArray[np.float64], p: dict[str, Any], dim: int) -> npt.NDArray[np.float64]:
    """Pairs that turn often in the trained length as they were, rare ones slower, a ramp
    between."""
    theta, length = float(p["rope_theta"]), float(p["original_max_position_embeddings"])

    def pair(turns: float) -> float:
        """Which pair, as a fraction, makes so many turns in the trained length."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(float(p.get("beta_fast") or 32)), pair(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    slowed = np.clip((np.arange(len(freqs)) - low) / span, 0, 1)
    ramped: npt.NDArray[np.float64] = freqs * (slowed / float(p["factor"]) + 1 - slowed)
    return ramped


class Rotation(NamedTuple):
    """How a model turns K, layer by layer: enough to turn it on."""

    freqs: npt.NDArray[np.float64]
    """[kinds, half] radians per token; rows of fewer pairs end in zeros."""
    kind: npt.NDArray[np.int32]
    """[layers] which row turns a layer; -1: none does."""
    first: int = 0
    """First channel of a head that turns."""
    interleaved: bool = False
    """Pairs are channels 2i and 2i + 1 (GPT-J); else i and i + half (NeoX)."""


def rotation(
    parameters: str, dim: int, layers: int, *, interleaved: bool = False
) -> Rotation | None:
    """How K of heads of `dim` channels turns in all `layers` alike; None: that is not known.

    `parameters`: as for `frequencies`. Engines that have tables of their own read those instead.
    """
    freqs = frequencies(parameters, dim)
    if not len(freqs):
        return None
    kind = np.zeros(layers, np.int32)
    return Rotation(freqs.astype(np.float64)[None], kind, interleaved=interleaved)


def turns(
    rotation: Rotation, shifts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, float32 [shifts, kinds, half], of turning K on by so many positions."""
    angles = shifts[:, None, None].astype(np.float64) * rotation.freqs
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
