"""Which tokens of a prompt are computed, when the rest of it is made of KV kept elsewhere.

Three rules and what they can be made of: nothing; the first tokens behind every seam (Hu et al.,
"EPIC", arXiv 2410.15332), which later text attends to as to a beginning; those whose K or V at an
early layer differs most from what was loaded (Yao et al., "CacheBlend", arXiv 2405.16444); and
those that the question attends to most (as in ProphetKV, arXiv 2602.02579), the more the nearer
they are to a seam. Attention decides where questions are asked, heads where text runs on: `probe`
has both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.errors import ConfigError, InputError
from tierloom.stages.kv.text import Run

_FAR = 1 << 40
"""Tokens behind a seam where there is none."""

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating]


class Patchwork(NamedTuple):
    """A prompt's context as a blend finds it: an exact prefix, runs, and what nobody kept."""

    tokens: int
    """Of the context, the exact prefix included."""
    exact: int
    """Tokens of the exact prefix, which is never computed."""
    runs: Sequence[Run]
    """In rising order, none within another, all behind the exact prefix."""

    def covered(self) -> Mask:
        """[tokens] lies in a run. Raises InputError for runs that overlap or leave the context."""
        mask, end = np.zeros(self.tokens, np.bool_), self.exact
        for run in self.runs:
            if not end <= run.start < run.end <= self.tokens:
                raise InputError(
                    f"run of tokens {run.start} to {run.end} in a context of {self.tokens}, "
                    f"{end} of which are taken: pass runs in rising order that do not overlap"
                )
            end = run.end
            mask[run.start : end] = True
        return mask

    def heads(self, tokens: int) -> Mask:
        """[tokens] is one of the first `tokens` of a run with a seam."""
        mask = np.zeros(self.tokens, np.bool_)
        for run in self.runs:
            if run.seam:
                mask[run.start : min(run.start + tokens, run.end)] = True
        return mask

    def strangeness(self, near: float) -> npt.NDArray[np.float64]:
        """[tokens], 0 to 1: how much a token's KV may differ from what it would be here. Most at a
        seam: farther on, what a token attends to most has come along with it. `near`: tokens from
        a seam at which it is half as much."""
        since = np.zeros(self.tokens)
        seam = -_FAR
        for run in self.runs:
            seam = run.start if run.seam else seam
            since[run.start : run.end] = np.arange(run.start, run.end) - seam
        strange: npt.NDArray[np.float64] = 1 / (1 + since / near)
        return strange


class Amount(NamedTuple):
    """How much a policy may choose."""

    heads: int
    """Tokens behind every seam."""
    share: float
    """Of the tokens that runs cover: what is chosen by score, besides heads."""
    ceiling: float = 1.0
    """Of the tokens that runs cover: heads and what is chosen by score together. Heads are
    computed even where they alone are more."""
    near: float = 16
    """Tokens from a seam at which attention paid to a token counts half as much as at the seam."""


class Policy(NamedTuple):
    """A rule, and what an engine must bring for it."""

    needs: Literal["nothing", "deviations", "scores"]
    """`deviations`: [tokens], the squared difference of fresh and loaded K, V or both at a check
    layer. `scores`: [tokens], the share of attention that the prompt's last tokens pay to each
    token's loaded, turned K: maximum over heads, mean over layers."""
    headed: bool
    """Computes heads."""


POLICIES = {
    "none": Policy("nothing", headed=False),
    "heads": Policy("nothing", headed=True),
    "deviation": Policy("deviations", headed=False),
    "probe": Policy("scores", headed=True),
}


def policy_of(name: str) -> Policy:
    """Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} of blend: it is one of {', '.join(POLICIES)}")
    return POLICIES[name]


def choose(name: str, work: Patchwork, amount: Amount, scores: Scores | None = None) -> Mask:
    """[tokens] is computed: what no run covers, and what policy `name` takes of what runs cover.

    Tokens that no run covers count into no share. Of equal scores the earlier token is taken; one
    that is no number counts as the lowest. The same arguments give the same mask. Raises
    ConfigError for an unknown policy, InputError where it lacks the scores that it needs.
    """
    policy = policy_of(name)
    covered = work.covered()
    mask = work.heads(amount.heads) if policy.headed else np.zeros(work.tokens, np.bool_)
    if policy.needs != "nothing":
        if scores is None or scores.shape != (work.tokens,):
            found = "none" if scores is None else str(scores.shape)
            raise InputError(
                f"policy {name} of blend needs {policy.needs} [{work.tokens}]: it got {found}"
            )
        if policy.needs == "scores":
            scores = scores * work.strangeness(amount.near)
        mask[_highest(scores, covered & ~mask, _room(amount, covered, mask))] = True
    mask |= ~covered
    mask[: work.exact] = False
    return mask


def stretches(mask: Mask) -> list[tuple[int, int]]:
    """Runs of True in `mask` as (first, last + 1), in rising order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _room(amount: Amount, covered: Mask, heads: Mask) -> int:
    """Tokens that may be chosen by score. Rounded down."""
    total = int(covered.sum())
    left = _part(amount.ceiling, total) - int(heads.sum())
    return max(0, min(_part(amount.share, total), left))


def _part(share: float, total: int) -> int:
    return math.floor(share * total + 1e-9)


def _highest(scores: Scores, among: Mask, count: int) -> npt.NDArray[np.intp]:
    at = np.flatnonzero(among)
    found = np.nan_to_num(scores[at].astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return at[np.argsort(-found, kind="stable")[:count]]
