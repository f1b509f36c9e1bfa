"""Graphs that blend, engines that are read quickly, and how K turns: by the formula."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from conftest import MEMORY, Engine

if TYPE_CHECKING:
    from conftest import Open

    from tierloom.stages.contract.ticket import Ticket

ROPE = '{"rope_theta": 10000.0}'


def blending(source: dict[str, Any] | None = None, **mend: Any) -> dict[str, Any]:
    """A graph that keeps text by content, finds it anywhere and blends."""
    made = copy.deepcopy(source or MEMORY)
    graphs = made["graphs"]
    graphs["store"]["stages"]["fresh"]["by"] = "content"
    stages = graphs["retrieve"]["stages"]
    stages["plan"] = {"use": "lookup", "want": "anywhere", "least": 32, "worth": "always"}
    mend = {"use": "blend", "policy": "none", "worth": "always", "least": 32, **mend}
    ids = list(stages)
    graphs["retrieve"]["stages"] = {
        id: stages.get(id, mend)
        for id in [*ids[: ids.index("plan") + 1], "mend", *ids[ids.index("plan") + 1 :]]
    }
    return made


def opened_with(opened: Open, source: dict[str, Any], engine: Engine, **options: Any) -> Any:
    return opened(source, engine, rope=ROPE, **options)


def turned(k: torch.Tensor, by: Any) -> torch.Tensor:
    """K [layers, tokens, heads, dim] moved on by so many positions: one number, or one a token,
    [tokens, 1, 1]."""
    half = k.shape[-1] // 2
    angle = by * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    a, b, c, s = k[..., :half], k[..., half:], angle.cos(), angle.sin()
    return torch.cat([a * c - b * s, b * c + a * s], -1)


class Captured:
    """What was stored, token by token. Each token id is in one place only, so that what comes back
    can be told from anything else."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._next = engine, 0
        self._slot = np.zeros(0, np.int64)
        self._position = np.zeros(0, np.int64)

    def text(self, n: int) -> np.ndarray:
        """Ids that nothing has had yet."""
        self._next += n
        grown = np.full(n, -1, np.int64)
        self._slot = np.concatenate([self._slot, grown])
        self._position = np.concatenate([self._position, grown])
        return np.arange(self._next - n, self._next, dtype=np.int32)

    def store(self, pipe: Any, ids: np.ndarray, at: np.ndarray, **names: Any) -> Any:
        self._slot[ids], self._position[ids] = at, np.arange(len(ids))
        return pipe.store(ids, self.engine.caches, at, **names).wait()

    def check(self, ticket: Ticket, prompt: np.ndarray, target: Engine, to: np.ndarray) -> int:
        """Of a blended retrieve that has ended: every token that the engine is not told to compute
        has its own row, turned; nothing beyond the prompt was written. Returns how many it has."""
        placed = np.ones(len(prompt), np.bool_)
        for a, b in ticket.compute():
            placed[a:b] = False
        (i,) = placed.nonzero()
        was, now = rows(self.engine, self._slot[prompt[i]]), rows(target, to[i])
        by = torch.from_numpy(i - self._position[prompt[i]]).double()[:, None, None]
        assert (self._slot[prompt[i]] >= 0).all()
        assert torch.equal(now[1], was[1]), "wrong V"
        assert not len(i) or (now[0] - turned(was[0], by)).abs().max() < 1e-4, "wrong K"
        rest = np.setdiff1d(np.arange(target.blocks * target.block), to)
        assert (rows(target, rest).float().view(torch.int32) == BLANK).all()
        return len(i)


BLANK = int(np.frombuffer(b"\xa5" * 4, np.int32)[0])


def rows(engine: Engine, slots: np.ndarray) -> torch.Tensor:
    """[kv, layers, tokens, heads, dim] in float64, of an engine of order 2BNHD in float32."""
    return torch.stack([c.flatten(1, 2)[:, slots] for c in engine.caches], 1).double()
