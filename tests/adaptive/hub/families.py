"""Tiny models of transformers with random weights, of the families that adapt is held to."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, WIDTH, WINDOW = 61, 16, 5

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Qwen3": _HEADS,
    "Gemma": _HEADS,
    "Gemma2": _HEADS | {"sliding_window": WINDOW},
    "Gemma3": _HEADS | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "GPT2": {"n_positions": 64},
    "Olmo": {},
    "Olmo2": {},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": _HEADS | _EXPERTS | {"num_experts": 3},
}


STRANGERS: dict[str, dict[str, Any]] = {
    "StableLm": {},
    "Starcoder2": {},
    "Cohere": {},
    "Glm": {"head_dim": 8},
    "Granite": {},
    "Falcon": {},
    "GPTNeoX": {},
    "Phi": {},
    "Nemotron": {},
    "SmolLM3": {},
    "DeepseekV3": {
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
"""Of families that nothing in the library names."""

DEPTHS: list[tuple[str, dict[str, Any]]] = [
    ("mixture_of_depths", {"capacity": 0.5}),
    ("skip_layer", {}),
    ("skip_layer", {"keys": "all"}),
    ("early_exit", {}),
    ("early_exit", {"keys": "all"}),
    ("mixture_of_depths", {"capacity": 0.5, "keys": "all"}),
]
"""Methods that choose tokens for whole layers, and their options."""


FEED_FORWARDS: list[tuple[str, dict[str, Any]]] = [
    ("mixture_of_experts", {"num_experts": 3}),
    ("adaptive_computation", {"num_learners": 2}),
    ("sized_feed_forward", {"small_ffn_dim": 5}),
]


def tiny(family: str, attention: str = "sdpa", *, seed: int = 0, **options: Any) -> Any:
    """Four tiny layers."""
    torch.manual_seed(seed)
    name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    given = _SHARED | FAMILIES.get(family, {}) | options
    config = getattr(transformers, name)(attn_implementation=attention, **given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def trained(model: Any) -> Any:
    """Routers as training leaves them: they choose some tokens, and weigh what they chose."""
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".routing." in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7, generator=draw)
    return model


def some_ids(batch: int = 1, length: int = 14, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
