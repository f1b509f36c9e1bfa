"""What a blend costs on one prompt: the suffix read on top of a context that was put together.

Each piece's KV is captured really, behind what it stood behind, or alone; K is turned to its new
place; what a policy chooses is computed by the model itself (`selective.py`). Share = recomputed
token-layers / (layers x tokens of the context): a chosen token counts in every layer, a token that
the probe asks by as well, and a check layer costs all reused tokens in each layer before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from tierloom.adapters.quality.blend_sets import Prompt
from tierloom.adapters.quality.subject import Subject
from tierloom.adapters.transformers.model import with_cache
from tierloom.adapters.transformers.selective import Planes, Selective
from tierloom.stages.blend.policies import POLICIES, Amount, choose
from tierloom.stages.errors import LayoutError
from tierloom.stages.kv.rope import rotation

RANDOM = "random"
"""The control: as many tokens as the share allows, by chance. No policy of the product."""


class BlendArm(NamedTuple):
    """A policy with its amounts, and how pieces were captured."""

    policy: str
    heads: int = 0
    share: float = 0.0
    """Of reused tokens; of the whole context where the policy is `deviation`, as with the peer."""
    ceiling: float = 1.0
    near: float = 16
    alone: bool = False
    """Each piece was captured by itself, not behind a prompt."""
    layer: int = 1
    of: str = "k"


PEER = BlendArm("deviation", share=0.15)
"""CacheBlend's rule as the peer has it (arXiv 2405.16444): K deviation at layer 1, 15 %."""


class BlendCost(NamedTuple):
    kl: float
    """Nats, mean over the suffix."""
    share: float


def selective_of(subject: Subject) -> Selective:
    """Raises LayoutError for a model that cannot be blended."""
    turns = rotation(subject.rope, subject.shape.dim, subject.shape.layers)
    if turns is None:
        raise LayoutError("how the model turns its K is not known: it cannot be blended")
    return Selective(subject.model, subject.shape, turns)


@dataclass(slots=True)
class Case:
    """A prompt, computed once: the reference, and its pieces as they were captured."""

    subject: Subject
    selective: Selective
    prompt: Prompt
    ids: torch.Tensor = field(init=False)
    want: torch.Tensor = field(init=False)
    """Log-probabilities over the suffix, everything computed."""
    _captured: dict[bool, tuple[Planes, Planes]] = field(default_factory=dict)
    _exact: tuple[Planes, Planes] = field(init=False)
    _scores: dict[bool, npt.NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = torch.tensor(self.prompt.ids)
        cache = self._compute(self.prompt.ids)
        first = len(self.prompt.exact)
        self._exact = _cut(cache, 0, first)
        self.want = self._read(*_cut(cache, 0, len(self.ids)))

    def judge(self, arm: BlendArm) -> BlendCost:
        """KL and share of an arm. Deterministic."""
        work, layers = self.prompt.work, self.subject.shape.layers
        given_k, given_v = self._put_together(arm.alone)
        keys, values = [k.clone() for k in given_k], [v.clone() for v in given_v]
        scores, spent = None, 0
        n = work.tokens
        if arm.policy == RANDOM:
            scores = np.random.default_rng(0).random(n)
        elif POLICIES[arm.policy].needs == "scores":
            scores, spent = self._probed(arm.alone), self.prompt.asked * layers
        elif POLICIES[arm.policy].needs == "deviations":
            scores = self.selective.deviations(
                self.ids, keys, values, arm.layer, arm.of, work.exact
            )
            spent = (n - work.exact) * arm.layer
        rule, share = arm.policy, arm.share
        if rule == "deviation":
            share *= n / int(work.covered().sum())
        if rule == RANDOM:
            rule = "deviation"
        amount = Amount(arm.heads, min(1.0, share), arm.ceiling, arm.near)
        mask = choose(rule, work, amount, scores)
        spent += int(mask.sum()) * (layers - (arm.layer if arm.policy == "deviation" else 0))
        self.selective.recompute(self.ids, mask, keys, values)
        got = self._read(keys, values)
        kl = float((self.want.exp() * (self.want - got)).sum(-1).double().mean())
        return BlendCost(kl, spent / (layers * n))

    def without(self) -> float:
        """KL of the suffix read without any context."""
        got = self._read([], [])
        return float((self.want.exp() * (self.want - got)).sum(-1).double().mean())

    def _probed(self, alone: bool) -> npt.NDArray[np.float64]:
        if alone not in self._scores:
            asked = torch.tensor(self.prompt.suffix[: self.prompt.asked])
            self._scores[alone] = self.selective.scores(asked, *self._put_together(alone))
        return self._scores[alone]

    def _put_together(self, alone: bool) -> tuple[Planes, Planes]:
        """K at its new place and V of the whole context, `[1, heads, tokens, dim]`."""
        if alone not in self._captured:
            parts, at = [self._exact], len(self.prompt.exact)
            for piece in self.prompt.pieces:
                behind = [] if alone else piece.behind
                k, v = _cut(self._compute(behind + piece.ids), len(behind), None)
                parts.append((self.selective.turned(k, at - len(behind)), v))
                at += len(piece.ids)
            self._captured[alone] = tuple(
                [torch.cat([p[side][i] for p in parts], 2) for i in range(len(parts[0][0]))]
                for side in (0, 1)
            )  # type: ignore[assignment]
        return self._captured[alone]

    @torch.no_grad()
    def _compute(self, ids: list[int]) -> DynamicCache:
        cache = DynamicCache(config=self.subject.model.config)
        base = self.subject.model.base_model
        base(input_ids=torch.tensor([ids]), use_cache=True, **with_cache(base, cache))
        return cache

    @torch.no_grad()
    def _read(self, keys: Planes, values: Planes) -> torch.Tensor:
        cache = DynamicCache(config=self.subject.model.config)
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k, v, i)
        base = self.subject.model.base_model
        ids = torch.tensor([self.prompt.suffix])
        hidden = base(input_ids=ids, use_cache=True, **with_cache(base, cache))[0]
        head = self.subject.model.get_output_embeddings()
        logp: torch.Tensor = head(hidden[0]).log_softmax(-1)
        return logp


def _cut(cache: Any, first: int, last: int | None) -> tuple[Planes, Planes]:
    return (
        [x.keys[:, :, first:last] for x in cache.layers],
        [x.values[:, :, first:last] for x in cache.layers],
    )
