"""Small random models, written as files.

Their attention is sharp (see `_sharpen`): with vLLM's dummy weights the next token hardly depends
on what came before the last one, and a wrong KV cache would go unnoticed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 512


def llama(folder: Path, seed: int = 0) -> Path:
    """4 layers, 4 query and 2 KV heads of 32 channels; 2 KiB of KV per token in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return _write(folder, LlamaForCausalLM, config, seed)


def gemma(folder: Path) -> Path:
    """Full and sliding-window attention in turns: two KV groups in vLLM."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=8192,
        query_pre_attn_scalar=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _write(folder, Gemma3ForCausalLM, config, seed=0)


def lora(folder: Path, base: Path, seed: int) -> Path:
    """A random adapter of the query and value projections of `llama`, strong enough to be seen."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    width, rank = config["hidden_size"], 8
    outs = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in outs.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            a = torch.randn(rank, width, generator=random) / width**0.5
            b = torch.randn(heads * config["head_dim"], rank, generator=random)
            tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(outs),
        "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def _write(folder: Path, kind: Any, config: Any, seed: int) -> Path:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = kind(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _sharpen(name, weight, random, tied=bool(config.tie_word_embeddings))
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    """A word per token, `w7` for 7: a server wants to write what came out as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _sharpen(name: str, weight: Any, random: Any, *, tied: bool) -> None:
    """Weights for which a prompt's every part counts.

    Channels of a normed input are about 1, so a row of standard deviation s / sqrt(width) gives
    outputs of s. Queries and keys of 1.6 make scores of standard deviation 2.5: the softmax picks a
    few tokens out of thousands, and these are other ones in every layer and at every step. Tied
    embeddings are kept small, or a model would only say again what it has heard last.
    """
    import torch

    if weight.dim() < 2:
        return  # norms stay as they are
    s = {"q_proj": 1.6, "k_proj": 1.6, "v_proj": 1.0, "o_proj": 2.0, "embed": 0.02 if tied else 1.0}
    scale = next((v for k, v in s.items() if k in name), 1.0)
    width = 1 if "embed" in name else weight.shape[-1]
    weight.copy_(torch.randn(weight.shape, generator=random) * (scale / width**0.5))
