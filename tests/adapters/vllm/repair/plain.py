"""A Llama in plain torch that computes chosen tokens over given K and V: knows nothing of vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

KV = list[torch.Tensor]


class Plain:
    """float32; weights by their names in the file."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.layers = config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self.freqs = theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        self.w: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    self.w[name] = weights.get_tensor(name).float()

    def prefill(self, ids: torch.Tensor) -> tuple[KV, KV]:
        """K, as turned, and V of each layer: [tokens, KV heads, channels]."""
        shape = (len(ids), self.kv_heads, self.dim)
        k, v = ([torch.zeros(shape) for _ in range(self.layers)] for _ in range(2))
        self.repair(ids, k, v, torch.arange(len(ids)))
        return k, v

    def repair(self, ids: torch.Tensor, k: KV, v: KV, chosen: torch.Tensor) -> KV:
        """Compute tokens `chosen` (rising) over the rows of `k` and `v`, which are replaced there.

        Returns the queries of each layer: [chosen, heads, channels].
        """
        hidden, queries = self.w["model.embed_tokens.weight"][ids[chosen]], []
        for i in range(self.layers):
            name = f"model.layers.{i}."
            x = self.norm(hidden, name + "input_layernorm")
            q, fresh_k, fresh_v = (
                (x @ self.w[f"{name}self_attn.{p}_proj.weight"].T).view(len(chosen), -1, self.dim)
                for p in "qkv"
            )
            k[i][chosen], v[i][chosen] = self.turn(fresh_k, chosen), fresh_v
            queries.append(self.turn(q, chosen))
            weights = self.attention(queries[i], k[i], chosen)
            each = self.heads // self.kv_heads
            seen = torch.einsum("hqn,nhd->qhd", weights, v[i].repeat_interleave(each, 1))
            hidden = hidden + seen.flatten(1) @ self.w[name + "self_attn.o_proj.weight"].T
            x = self.norm(hidden, name + "post_attention_layernorm")
            gate = torch.nn.functional.silu(x @ self.w[name + "mlp.gate_proj.weight"].T)
            up = x @ self.w[name + "mlp.up_proj.weight"].T
            hidden = hidden + (gate * up) @ self.w[name + "mlp.down_proj.weight"].T
        return queries

    def attention(self, q: torch.Tensor, k: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[heads, queries, keys]: the softmax of each query over the keys up to its place."""
        keys = k.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = torch.einsum("qhd,nhd->hqn", q, keys) * self.dim**-0.5
        later = torch.arange(len(k))[None] > at[:, None]
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.w[name + ".weight"]

    def turn(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angles = at.double()[:, None, None] * self.freqs
        cos, sin = angles.cos().float(), angles.sin().float()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
