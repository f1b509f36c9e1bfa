"""A tiny random model of every causal LM class that transformers offers.

Sizes are written over a class's defaults by the names that its config has for them; what needs more
than that stands in `OWN`. Weights are so large that attention matters: a random model of the usual
scale says the same whatever its KV is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from .conftest import VOCAB, spread

LARGEST = 64 << 20
"""Parameters of the largest model that still counts as tiny."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embedding_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_inner", "ffn_hidden_size", "decoder_ffn_dim",
         "encoder_ffn_dim", "dim_ff", "d_ff", "dff"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
         "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_experts_per_tok", "moe_k",
         "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels"), 16),
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_group": 1, "topk_group": 1, "index_head_dim": 16, "index_n_heads": 2,
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "is_decoder": True,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "blenderbot": {"max_position_embeddings": 512},
    "codegen": {"rotary_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB},
    "gemma4_unified_text": {"use_bidirectional_attention": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32),
                 "attn_layers": ["local"] * 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a config needs in small besides `SIZES`."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, not a decoder": (name, {"is_decoder": False}) for name in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
        "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
        "xlm-roberta", "xlm-roberta-xl")},
    "big_bird, sparse": ("big_bird", {"attention_type": "block_sparse", "block_size": 4}),
    "bloom, no cache": ("bloom", {"use_cache": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma, bidirectional": ("gemma", {"use_bidirectional_attention": True}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, one after another": ("gpt_neox", {"use_parallel_residual": False}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, linear rope": ("llama", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, llama3 rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama, long rope": ("llama", {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}}),
    "llama, no cache": ("llama", {"use_cache": False}),
    "llama, yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mpt, no alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False}),
    "phi, a norm of q and k": ("phi", {"qk_layernorm": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 32,
                                "max_window_layers": 2}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "xlm, causal": ("xlm", {"causal": True}),
}  # fmt: skip
"""Other settings of a class: masks, positions and orders that its defaults do not have."""


REFUSED: dict[str, str] = {
    **dict.fromkeys((
        "afmoe", "axk2", "bailing_hybrid", "bamba", "beam", "cohere2", "cohere2_moe", "cwm",
        "deepseek_v32", "deepseek_v4", "dory", "exaone4", "exaone_moe", "falcon_h1", "falcon_mamba",
        "flint", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm_moe_dsa",
        "gpt_oss", "granite_swa", "granitemoe_swa", "granitemoehybrid", "hy_v4",
        "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "kolibri1",
        "lara_mini", "lfm2_moe", "lfm3", "llama4", "llama4_text", "mamba", "mamba2",
        "mimo_v2_flash", "minimax", "ministral", "mistral", "modernbert-decoder", "moshi",
        "nemotron_h", "olmo3", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "recurrent_gemma", "vaultgemma", "zamba", "zamba2", "zaya"
    ), "only full attention in every layer is supported"),
    **dict.fromkeys((
        "axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3",
        "sarvam_mla", "youtu"
    ), "only models whose K and V are alike are supported"),
    **dict.fromkeys((
        "fuyu", "gemma3", "gemma4_unified", "gemma4_unified_assistant", "got_ocr2",
        "moss_transcribe_diarize"
    ), "takes more than text"),
    **dict.fromkeys((
        "cpmant", "mllama", "openai-gpt", "reformer", "rwkv", "xlnet"
    ), "cached nothing of a token that was run through it"),
    **dict.fromkeys((
        "musicgen", "musicgen_melody", "prophetnet", "xlm", "xlstm"
    ), "fails if it is run with a cache"),
    **{name: "answers differently if" for name in VARIANTS if name.endswith("not a decoder")},
    "gemma, bidirectional": "attends to later tokens",
    "llama, dynamic rope": "rope_type dynamic",
    "llama, long rope": "rope_type longrope",
    "qwen2, window": "only full attention in every layer is supported",
    "xlm, causal": "answers differently if",
}  # fmt: skip
"""Why; all others are kept."""

UNBUILT = {
    "blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "gemma3n",
    "gemma3n_text", "gemma4", "gemma4_assistant", "qwen4_exp", "qwen4_exp_text",
}  # fmt: skip
"""Large even in small, or in need of something else: nothing is known of them here."""


def names() -> list[str]:
    """`model_type` of every config that `AutoModelForCausalLM` takes; their classes would take
    seconds to import. Of two names of a config, the latter is its own."""
    own = {CONFIG_MAPPING_NAMES[name]: name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return list(own.values())


def classes(name: str) -> tuple[type, type]:
    """(config class, model class) of a `model_type`."""
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        if config.model_type == name:
            return config, model[0] if isinstance(model, (tuple, list)) else model
    raise KeyError(name)


def small(cls: type, own: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A config of `cls` in small, its parts included."""
    usual = cls()
    options: dict[str, Any] = {}
    for part in getattr(cls, "sub_configs", {}):
        if isinstance(inner := getattr(usual, part, None), PreTrainedConfig):
            options[part] = small(type(inner))
    known = usual.to_dict().keys() | set(getattr(cls, "attribute_map", {}))
    options |= {k: v for k, v in SIZES.items() if k in known}
    return cls(**options | (own or {}))


def build(name: str) -> Any:
    """The model of a `model_type` or variant, in eval mode. Raises whatever its class does, and
    ValueError when it is not small."""
    name, own = VARIANTS.get(name, (name, {}))
    config_class, cls = classes(name)
    config = small(config_class, OWN.get(name, {}) | own)
    if not isinstance(config, cls.config_class):  # as AutoModelForCausalLM does it
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{name}: {count:,} parameters in small")
    torch.manual_seed(0)
    return spread(cls(config).eval())
