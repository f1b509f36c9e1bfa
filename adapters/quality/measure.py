"""The model's part of a quality measurement: reference, KV, and what a suffix costs on other KV.

The model runs in float32. Its KV is rounded to bf16 once, as an engine holds it, and that is what
codecs are given; what comes back is read as float32 again. The reference is the model's own full
recompute, never rounded: KV in bf16 that nothing else happened to is the noise floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from tierloom.adapters.quality.documents import Document, Sizes, documents
from tierloom.adapters.quality.score import Outcome, Score
from tierloom.adapters.quality.subject import Arm, Subject
from tierloom.adapters.transformers.model import with_cache


@dataclass(frozen=True, slots=True)
class Reference:
    """A document as the model reads it without any cache."""

    document: Document
    kv: torch.Tensor
    """bf16, `[2, layers, context, heads, dim]`, K as attention reads it (rotated)."""
    logp: tuple[torch.Tensor, ...]
    """Per span, float32 `[suffix, vocabulary]`: log-probabilities after each suffix token."""

    @property
    def ids(self) -> torch.Tensor:
        """The tokens whose KV is treated, int64."""
        return torch.tensor(self.document.ids[: self.kv.shape[2]])


def references(subject: Subject, sizes: Sizes, limit: int | None = None) -> list[Reference]:
    """The first `limit` documents (all where not said), each computed once."""
    sizes = sizes.upto(subject.positions)
    return [capture(subject, d) for d in documents(subject.encode, sizes)[:limit]]


@torch.no_grad()
def capture(subject: Subject, document: Document) -> Reference:
    """Run a document through the model in one piece."""
    cache = DynamicCache(config=subject.model.config)
    ids = torch.tensor([document.ids[:-1]])
    base = subject.model.base_model
    hidden = base(input_ids=ids, use_cache=True, **with_cache(base, cache))[0]
    head = subject.model.get_output_embeddings()
    logp = [head(hidden[0, n : n + s]).log_softmax(-1) for n, s in document.spans]
    return Reference(document, kv_of(cache, document.context), tuple(logp))


def kv_of(cache: Any, tokens: int) -> torch.Tensor:
    """The first `tokens` of a cache as `[2, layers, tokens, heads, dim]`, bf16."""
    planes = [[layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]]
    return torch.stack(
        [
            torch.stack([t[0, :, :tokens].transpose(0, 1).bfloat16() for t in plane])
            for plane in planes
        ]
    )


@torch.no_grad()
def read_on(subject: Subject, kv: torch.Tensor, suffix: list[int]) -> torch.Tensor:
    """Log-probabilities float32 `[suffix, vocabulary]` of a suffix read on top of `kv`."""
    cache = DynamicCache(config=subject.model.config)
    for i, (k, v) in enumerate(zip(kv[0], kv[1], strict=True)):
        plain = [t.float().transpose(0, 1).unsqueeze(0).contiguous() for t in (k, v)]
        cache.update(plain[0], plain[1], i)
    ids = torch.tensor([suffix])
    model = subject.model
    logits = model(input_ids=ids, use_cache=True, **with_cache(model, cache)).logits[0]
    logp: torch.Tensor = logits.log_softmax(-1)
    return logp


def score(subject: Subject, arm: Arm, captured: Iterable[Reference]) -> Score:
    """An arm on every document."""
    return Score(arm.name, tuple(measure(subject, arm, r) for r in captured))


def measure(subject: Subject, arm: Arm, reference: Reference) -> Outcome:
    """An arm on one document: treat its KV, read its suffixes on what came back, compare."""
    document = reference.document
    treated = arm.treat(reference.ids, reference.kv)
    exact = torch.equal(treated.kv.view(torch.int16), reference.kv.view(torch.int16))
    kls, more, same, spans = [], [], [], []
    nll, hit = [], []
    for (n, length), want in zip(document.spans, reference.logp, strict=True):
        got = read_on(subject, treated.kv[:, :, :n], document.ids[n : n + length])
        kl = (want.exp() * (want - got)).sum(-1).double().numpy()
        target = torch.tensor(document.ids[n + 1 : n + length + 1]).unsqueeze(1)
        kls.append(kl)
        spans.append((n, float(kl.mean())))
        more.append((want.gather(1, target) - got.gather(1, target)).mean().item())
        same.append((want.argmax(-1) == got.argmax(-1)).float().mean().item())
        for first, last in _inside(document, n, length):
            rows, value = slice(first - 1 - n, last - 1 - n), target[first - 1 - n : last - 1 - n]
            nll.append(-got[rows].gather(1, value).mean().item())
            hit.append(bool((got[rows].argmax(-1, keepdim=True) == value).all()))
    return Outcome(
        document.name, reference.kv.numel(), treated.stored, treated.payload, exact,
        np.concatenate(kls), float(np.mean(more)), float(np.mean(same)), tuple(spans),
        np.array(nll, np.float64), np.array(hit, np.float64),
    )  # fmt: skip


def _inside(document: Document, context: int, suffix: int) -> Iterator[tuple[int, int]]:
    """The values that are asked for in this span."""
    for first, last in document.values:
        if context < first and last <= context + suffix + 1:
            yield first, last
