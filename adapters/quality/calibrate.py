"""`tierloom calibrate`: what `cachegen` should know of a model, learned from a few texts.

A prefill in float32 over texts that ship with Python gathers, for every channel, the mean of K
(before its position embedding) and V, how strongly queries look at K's channel, and how strongly
the projection after attention weighs V's. Steps go against those weights: an error costs the
model the same wherever it falls (rate-distortion with diagonal weights; CacheGen, arXiv 2310.07240,
gives finer steps to earlier layers by hand). What symbols then are left, is counted, and channels
that are alike share a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tierloom.adapters.demo.screen import screen_for
from tierloom.adapters.quality.subject import Subject
from tierloom.stages.codecs.cachegen import calibration as files
from tierloom.stages.codecs.cachegen.codebook import Codebook, fitted, standard
from tierloom.stages.codecs.cachegen.coder import FIRST
from tierloom.stages.errors import LayoutError, require
from tierloom.stages.kv.rope import frequencies
from tierloom.triton_kernels.cachegen.cpu import CENTER, SYMBOLS, turns

Floats = npt.NDArray[np.float32]
Factors = Mapping[str, tuple[float, float]]

TOKENS = 1024
"""Of each text, at most."""
FACTORS = {"high": (0.12, 0.145), "default": (0.32, 0.39), "small": (0.75, 0.90)}
"""Steps of K and V, as shares of the weighted deviation: of all layers' K, of each layer's V. Found
on these texts."""
TRANSFORMED = {"small": (0.75, 0.65)}
"""The same where heads are transformed first."""
_TURNS = 10
_ATTENTION = "tierloom_calibrate"
_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured of one model."""

    kv: list[Floats]
    """Per text, [2, layers, tokens, channels], K turned back, without a sequence's first tokens."""
    weights: Floats
    """[2, layers, channels]: what an error of 1 in this channel costs, in a unit of its plane's."""
    metric: Floats
    """[2, layers, heads, dim, dim]: what errors in a head's channels cost together, squared."""


def run_calibrate(model: str, out: Path | None, transform: bool) -> int:
    """Calibrate `model` (`smollm2` or a folder), and write the file. Raises ConfigError."""
    require("hf", "transformers")
    from tierloom.adapters.quality.subject import load_subject

    console = screen_for()
    with console.status(f"Loading {model}"):
        subject = load_subject(model)
    with console.status("Reading texts"):
        data = learned(observe(subject), subject, TRANSFORMED if transform else {})
    if out is None:
        out = files.calibrations_folder() / f"{subject.name}-{subject.weights[:12]}{files.SUFFIX}"
        out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_bytes(data)
    part.replace(out)
    found = files.read_calibration(out)
    console.print(f"{out}: calibration {found.id:016x} of {subject.name}, {len(data) >> 10} KiB")
    return 0


def learned(
    seen: Seen, subject: Subject, transformed: Factors = TRANSFORMED, factors: Factors = FACTORS
) -> bytes:
    """The file's bytes, of what was seen of this model. `transformed`: factors of those levels that
    get a transform of each head, where they stand instead of the others."""
    freqs = frequencies(subject.rope, subject.shape.dim)
    means, steps = measured(seen, factors)
    tabid = np.empty(steps.shape, np.uint8)
    tensors: dict[str, Any] = {"freqs": freqs, "means": means, "steps": steps, "tabid": tabid}
    if transformed:
        tensors["transforms"], size = transforms(seen, means)
    for i, level in enumerate(files.LEVELS):
        around = (kv - means[:, :, None] for kv in seen.kv)
        if level in transformed:
            around = (through(y, tensors["transforms"]) for y in around)
            steps[i] = _unit(seen, means) / size * np.array(transformed[level])[:, None, None]
        counts = sum(_counts(y, steps[i]) for y in around)
        tabid[i], tensors[f"tables.{level}"] = shared(np.asarray(counts), means.shape)
    return files.safetensors_bytes(tensors, {
        "dim": str(subject.shape.dim), "models": json.dumps(_fingerprints(subject)),
        "transformed": json.dumps(sorted(transformed)),
    })  # fmt: skip


@torch.no_grad()
def observe(subject: Subject) -> Seen:
    """Run the texts through the model. Leaves it in float32. Raises LayoutError for what has no K
    and V, or does not show its queries."""
    from transformers import AttentionInterface, DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from tierloom.adapters.quality.documents import calibration_texts
    from tierloom.adapters.quality.measure import kv_of
    from tierloom.adapters.transformers.model import with_cache

    shape, model = subject.shape, subject.model
    queries = np.zeros((shape.layers, shape.heads, shape.dim))
    listened = np.broadcast_to(np.eye(shape.dim), (*queries.shape, shape.dim)).copy()

    def attention(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        layer = int(module.layer_idx)
        square = query.double().square().mean((0, 2))  # [query heads, dim]
        queries[layer] += square.reshape(shape.heads, -1, shape.dim).mean(1).numpy()
        for name in _PROJECTIONS:
            weight = getattr(getattr(module, name, None), "weight", None)
            if weight is not None and weight.shape[1] == square.numel():
                cut = weight.double().T.reshape(shape.heads, -1, shape.dim, len(weight))
                listened[layer] = (cut @ cut.mT).mean(1).numpy()
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register(_ATTENTION, attention)
    freqs = frequencies(subject.rope, shape.dim)
    before, kept = model.config._attn_implementation, []
    model.set_attn_implementation(_ATTENTION)
    try:
        for text in calibration_texts():
            ids = subject.encode(text)[: min(TOKENS, subject.positions - 1)]
            if len(ids) > 2 * FIRST:
                cache = DynamicCache(config=model.config)
                base = model.base_model
                base(input_ids=torch.tensor([ids]), use_cache=True, **with_cache(base, cache))
                kept.append(turned_back(kv_of(cache, len(ids)).float().numpy(), freqs))
    finally:
        model.set_attn_implementation(before)
    if not kept or not queries.any():
        raise LayoutError("the model's attention showed no queries: it cannot be calibrated")
    half = len(freqs)
    both = (queries[..., :half] + queries[..., half : 2 * half]) / 2  # turning mixes the two
    queries[..., :half] = queries[..., half : 2 * half] = both
    metric = np.stack([queries[..., None] * np.eye(shape.dim), listened])
    weights = np.sqrt(np.diagonal(metric, 0, 3, 4).reshape(2, shape.layers, -1))
    weights = np.maximum(weights, 1e-3 * weights.max(2, keepdims=True))
    return Seen(kept, weights.astype(np.float32), metric.astype(np.float32))


def turned_back(kv: Floats, freqs: Floats) -> Floats:
    """`kv` [2, layers, tokens, heads, dim] as `Seen.kv` has it."""
    half = len(freqs)
    cos, sin = (t[:, None] for t in turns(0, kv.shape[2], freqs))
    a, b = kv[0, ..., :half].copy(), kv[0, ..., half : 2 * half].copy()
    kv[0, ..., :half] = a * cos + b * sin
    kv[0, ..., half : 2 * half] = b * cos - a * sin
    return kv[:, :, FIRST:].reshape(2, kv.shape[1], kv.shape[2] - FIRST, -1)


def measured(seen: Seen, factors: Factors) -> tuple[Floats, Floats]:
    """Means [2, layers, channels] and steps [levels, 2, layers, channels]."""
    total = sum(kv.shape[2] for kv in seen.kv)
    means = sum(kv.sum(2, dtype=np.float64) for kv in seen.kv) / total
    unit = _unit(seen, means) / seen.weights
    steps = np.stack([np.array(factors[n])[:, None, None] * unit for n in files.LEVELS])
    return means.astype(np.float32), steps.astype(np.float32)


def _unit(seen: Seen, means: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Weighted deviations around the means, [2, layers, 1]: of all layers' K, of each one's V."""
    total = sum(kv.shape[2] for kv in seen.kv)
    spread = sum(np.square(kv - means[:, :, None]).sum(2) for kv in seen.kv) / total
    weighted = np.maximum(np.sqrt((spread * np.square(seen.weights)).mean(2, keepdims=True)), 1e-20)
    weighted[0] = np.exp(np.log(weighted[0]).mean())  # what K errs adds to logits, in any layer
    found: npt.NDArray[np.float64] = weighted
    return found


def transforms(
    seen: Seen, means: Floats
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float64]]:
    """For each head the matrix that makes coefficients of its channels, [2, layers, heads, dim,
    dim]: uncorrelated, and an error of 1 in any of them costs the model the same (principal
    components in the metric of what reads them: queries K, the projection after attention V).
    And how much that is, [2, layers, 1], which keeps the matrices within float16."""
    dim = seen.metric.shape[-1]
    value, vector = np.linalg.eigh(seen.metric.astype(np.float64))
    root = np.sqrt(np.maximum(value, 1e-6 * value[..., -1:]))
    half = (vector * root[..., None, :]) @ vector.swapaxes(-1, -2)
    covariance = np.zeros(half.shape)
    for kv in seen.kv:
        y = (kv - means[:, :, None]).reshape(*kv.shape[:3], -1, dim).transpose(0, 1, 3, 2, 4)
        covariance += y.swapaxes(-1, -2) @ y
    basis = np.linalg.eigh(half @ covariance @ half)[1]
    found = basis.swapaxes(-1, -2) @ half
    size = np.abs(found).max((2, 3, 4))[..., None]
    return (found / size[..., None, None]).astype(np.float16), size


def through(y: Floats, matrices: npt.NDArray[np.float16]) -> Floats:
    """Coefficients [2, layers, tokens, channels] of what lies around the means."""
    heads = y.reshape(*y.shape[:3], *matrices.shape[2:4]).transpose(0, 1, 3, 2, 4)
    made = heads @ matrices.astype(np.float32).swapaxes(-1, -2)
    return made.transpose(0, 1, 3, 2, 4).reshape(y.shape)


def _counts(around: Floats, steps: Floats) -> npt.NDArray[np.int64]:
    """How often each symbol comes, [2 * layers * channels, SYMBOLS]; what is far off escapes."""
    q = np.rint(around / steps[:, :, None]).transpose(0, 1, 3, 2)
    symbols = (np.clip(q, -CENTER, CENTER).astype(np.int64) + CENTER) % SYMBOLS
    rows = symbols.reshape(-1, symbols.shape[3])
    at = np.arange(len(rows))[:, None] * SYMBOLS + rows
    return np.bincount(at.ravel(), minlength=len(rows) * SYMBOLS).reshape(-1, SYMBOLS)


def shared(
    counts: npt.NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Tables' numbers of `shape`, and at most 64 tables [tables, SYMBOLS]: each channel goes to the
    table that codes it shortest, each table becomes what its channels need (Lloyd). It begins with
    the standard tables, and integers decide: the same counts give the same tables."""
    costs = standard().costs
    freq = np.zeros((0, SYMBOLS), np.uint16)
    for _ in range(_TURNS):
        chosen = (counts.astype(np.float64) @ costs.T.astype(np.float64)).argmin(1)
        used, tabid = np.unique(chosen, return_inverse=True)
        freq = fitted(np.stack([counts[chosen == k].sum(0) for k in used]))
        costs = Codebook.of(freq).costs
    return tabid.reshape(shape).astype(np.uint8), freq


def _fingerprints(subject: Subject) -> list[str]:
    """Of the weights' files, by which any engine finds it; of the weights in float32, and as they
    were kept, by which transformers finds it where there are no files: these tell dtypes apart."""
    from tierloom.adapters.transformers.model import fingerprint, weight_files

    found = [name for name in (weight_files(subject.model), subject.weights) if name]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(w, w.to(dtype).float()) for w in subject.model.state_dict().values()):
            exact = [b.clone() for b in subject.model.buffers()]  # RoPE's are no part of the state
            found.append(fingerprint(subject.model.to(dtype)))
            subject.model.float()
            for buffer, was in zip(subject.model.buffers(), exact, strict=True):
                buffer.copy_(was)
    return found
