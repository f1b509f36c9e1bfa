"""KV without a model: tensors as an engine has them, filled by number, compared byte by byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tierloom.adapters.made_up.kv_groups import KVGroup
from tierloom.stages.errors import ConfigError
from tierloom.stages.kv.geometry import DTYPES
from tierloom.stages.kv.layout import KVLayout

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 2_654_435_761
"""Of Knuth's multiplicative hash: neighboring numbers are far apart in the noise."""


class MadeUpKV:
    """The caches of one group, one tensor per layer: [2, blocks, tokens, heads, dim], or
    [blocks, tokens, dim] of a latent. Prompts have numbers; tokens and KV follow from them.
    """

    def __init__(self, group: KVGroup, device: str = "cpu", seed: int = 0) -> None:
        """`device`: cpu or cuda. `seed`: of the tokens and of all KV. Raises ConfigError."""
        if device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: no GPU that torch can use; write --device cpu")
        self.group, self._seed = group, seed
        inner = (group.heads, group.dim) if group.kv == 2 else (group.dim,)
        shape = (*(2,) * (group.kv - 1), group.blocks, group.block_tokens, *inner)
        random = torch.Generator().manual_seed(seed)
        if group.dtype in ("int8", "uint8"):
            low = torch.iinfo(getattr(torch, group.dtype)).min
            noise = torch.randint(low, low + 256, shape, generator=random, dtype=torch.int16)
        else:
            noise = torch.randn(shape, generator=random)
        noise = noise.to(getattr(torch, group.dtype)).to(device)
        self.caches = [torch.zeros_like(noise) for _ in range(group.layers)]
        self.layout = KVLayout.from_tensors(self.caches, order="2BNHD" if group.kv == 2 else "MLA")
        self._word = _BITS[DTYPES[group.dtype]]
        self._noise = noise.view(self._word).flatten()

    def tokens(self, number: int, count: int) -> npt.NDArray[np.int32]:
        """The first `count` token ids of a prompt, int32."""
        random = np.random.default_rng([self._seed & (1 << 63) - 1, number])
        return random.integers(0, 32_000, count).astype(np.int32)

    def fill(self, number: int) -> None:
        """Have the KV of a prompt in the caches."""
        for i, layer in enumerate(self.caches):
            layer.view(self._word).copy_(self._made(number, i))

    def blank(self) -> None:
        """Zero the caches, so that what is in them next was brought back."""
        for layer in self.caches:
            layer.view(self._word).zero_()

    def difference(self, number: int, tokens: int) -> str:
        """Where the first byte is that differs from what was made up, among the first `tokens`
        tokens; empty: none does."""
        for i, layer in enumerate(self.caches):
            made, came = self._rows(self._made(number, i)), self._rows(layer.view(self._word))
            made, came = made[:, :tokens].contiguous(), came[:, :tokens].contiguous()
            if torch.equal(made, came):
                continue
            made, came = made.view(torch.uint8), came.view(torch.uint8)
            at = [int(n) for n in (made != came).nonzero()[0]]
            plane, token, head, byte = at
            what = ("K", "V")[plane] if self.group.kv == 2 else "latent"
            block, row = divmod(token, self.group.block_tokens)
            off = int((made != came).sum())
            return (
                f"layer {i}, {what}, token {token} (block {block}, row {row}), head {head}, byte "
                f"{byte}: {int(came[tuple(at)]):#04x} came, {int(made[tuple(at)]):#04x} was "
                f"stored; {off} bytes of this layer differ"
            )
        return ""

    def error(self, number: int, tokens: int) -> float:
        """How far off the first `tokens` tokens are: norm of the difference by the KV's norm."""
        off = whole = 0.0
        dtype = self.caches[0].dtype
        for i, layer in enumerate(self.caches):
            made = self._rows(self._made(number, i))[:, :tokens].contiguous().view(dtype).float()
            came = self._rows(layer.view(self._word))[:, :tokens].contiguous().view(dtype).float()
            off, whole = (
                off + float((made - came).square().sum()),
                whole + float(made.square().sum()),
            )
        return float((off / max(whole, 1e-30)) ** 0.5)

    def _made(self, number: int, layer: int) -> torch.Tensor:
        shift = (number * self.group.layers + layer + 1) * _PRIME % self._noise.numel()
        return torch.roll(self._noise, shift).view(self.caches[0].shape)

    def _rows(self, layer: torch.Tensor) -> torch.Tensor:
        """[planes, tokens, heads, dim] of a layer's bits."""
        group = self.group
        return layer.reshape(group.kv, group.tokens, group.heads, group.dim)
