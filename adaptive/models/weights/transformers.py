"""Decoders with the weights of `transformers` models: Llama, Qwen 2, Qwen 3 and Mixtral.

Names are those of their safetensors files; settings those of their config.json. Rotary pairs are
the same (rotate-half), so weights are copied as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptive.blocks.mixtral_weights import stacked
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.models.decoder.model import Decoder, DecoderConfig

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "mixtral")

_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.query.weight",
    "self_attn.k_proj.weight": "attention.key.weight",
    "self_attn.v_proj.weight": "attention.value.weight",
    "self_attn.o_proj.weight": "attention.output.weight",
    "self_attn.q_proj.bias": "attention.query_bias",
    "self_attn.k_proj.bias": "attention.key_bias",
    "self_attn.v_proj.bias": "attention.value_bias",
    "self_attn.q_norm.weight": "attention.query_norm.weight",
    "self_attn.k_norm.weight": "attention.key_norm.weight",
    "mlp.gate_proj.weight": "ffn.gate.weight",
    "mlp.up_proj.weight": "ffn.up.weight",
    "mlp.down_proj.weight": "ffn.down.weight",
}
_WHOLE = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_EXPERTS = ("block_sparse_moe.", "mlp.")
_SPARSE_OURS = {
    "gate.weight": "ffn.router.weight",
    "experts.gate_up_proj": "ffn.experts.gate_up_proj",
    "experts.down_proj": "ffn.experts.down_proj",
}
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_NEEDED_OF_EXPERTS = ("num_local_experts", "num_experts_per_tok")


def decoder_config(settings: Mapping[str, Any]) -> DecoderConfig:
    """The configuration of a decoder from a config.json.

    Raises:
        ValueError: names the setting that is missing or that our decoder cannot express.
    """
    kind = settings.get("model_type")
    if kind not in SUPPORTED:
        raise ValueError(f"model_type={kind!r}: must be one of {', '.join(SUPPORTED)}")
    for name in _NEEDED + _NEEDED_OF_EXPERTS * (kind == "mixtral"):
        if name not in settings:
            raise ValueError(f"{name}: missing from the settings")
    for name, plain in (("hidden_act", ("silu",)), ("mlp_bias", (False, None))):
        if settings.get(name, plain[0]) not in plain:
            raise ValueError(f"{name}={settings[name]!r}: must be {plain[0]!r}")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"rope_type={rope_type!r}: only default rotary embeddings are supported")
    windows = settings.get("use_sliding_window", kind in ("mistral", "mixtral"))
    length, window = settings.get("max_position_embeddings", 2048), settings.get("sliding_window")
    if windows and window is not None and window < length:
        # Within the window nothing differs.
        length = window
    heads, dim = settings["num_attention_heads"], settings["hidden_size"]
    head_dim = settings.get("head_dim")
    config = DecoderConfig(
        vocab_size=settings["vocab_size"],
        dim=dim,
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=None if head_dim in (None, dim // heads) else head_dim,
        ffn_dim=settings["intermediate_size"],
        max_seq_len=length,
        rope_base=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        attention_bias=settings.get("attention_bias", kind == "qwen2"),
        qk_norm=kind == "qwen3",
        tie_embeddings=settings.get("tie_word_embeddings", False),
        init_std=settings.get("initializer_range", 0.02),
    )
    if kind == "mixtral":
        if settings["num_experts_per_tok"] < 2:
            # There it has weight 1, whatever its probability, and no router learns.
            raise ValueError(
                f"num_experts_per_tok={settings['num_experts_per_tok']}: must be 2 or more, "
                "one expert a token has another weight there"
            )
        experts = MixtureOfExpertsConfig(
            num_experts=settings["num_local_experts"],
            top_k=settings["num_experts_per_tok"],
            balance_coefficient=settings.get("router_aux_loss_coef", 0.001),
            jitter=settings.get("router_jitter_noise", 0.0),
        )
        config = config.with_method(experts)
    return config


def from_transformers(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Weights under a decoder's names, as `Decoder.state_dict()` has them. Nothing is copied.

    Raises:
        ValueError: names the first tensor that is missing or that the decoder has no place for.
    """
    ours: dict[str, Tensor] = {}
    sparse: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name in _WHOLE:
            ours[_WHOLE[name]] = tensor
            continue
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers.") or not head.isdigit():
            raise ValueError(f"{name}: a decoder has no place for it")
        if rest in _LAYER:
            ours[f"layers.{head}.{_LAYER[rest]}"] = tensor
            continue
        prefix = next((p for p in _EXPERTS if rest.startswith(p)), None)
        if prefix is None:
            if rest.endswith("rotary_emb.inv_freq"):
                continue
            raise ValueError(f"{name}: a decoder has no place for it")
        sparse.setdefault(int(head), {})[rest.removeprefix(prefix)] = tensor
    for layer, part in sparse.items():
        for theirs, tensor in stacked(part).items():
            ours[f"layers.{layer}.{_SPARSE_OURS[theirs]}"] = tensor
    if config.tie_embeddings and "embedding.weight" in ours:
        ours["output.weight"] = ours["embedding.weight"]
    with torch.device("meta"):
        places = Decoder(config).state_dict()
    for name in places:
        if name not in ours:
            raise ValueError(f"{_theirs(name)}: missing from the weights")
    return ours


def _theirs(name: str) -> str:
    """The published name of one of ours; that of a stacked tensor of experts is ours."""
    names = {ours: theirs for theirs, ours in _WHOLE.items()}
    if name in names:
        return names[name]
    _, layer, rest = name.split(".", 2)
    names = {ours: theirs for theirs, ours in _LAYER.items()}
    return f"model.layers.{layer}.{names.get(rest, rest)}"


def mixtral_settings(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder that is a Mixtral model.

    Raises:
        ValueError: names what Mixtral cannot express.
    """
    experts = config.mixture_of_experts
    plain = DecoderConfig(
        vocab_size=config.vocab_size,
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        max_seq_len=config.max_seq_len,
        rope_base=config.rope_base,
        norm_eps=config.norm_eps,
        tie_embeddings=config.tie_embeddings,
        init_std=config.init_std,
        recompute=config.recompute,
    )
    if experts is None or plain.with_method(experts) != config:
        raise ValueError("a Mixtral model is a plain decoder with experts: this is another")
    allowed = MixtureOfExpertsConfig(
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        ffn_dim=experts.ffn_dim,
        jitter=experts.jitter,
        balance_coefficient=experts.balance_coefficient,
    )
    layers = list(range(config.num_layers))
    same = replace(
        experts, schedule="all", renormalize=None, freeze_router=False, freeze_experts=False
    )
    if same != allowed or experts.routed_layers(config.num_layers) != layers or experts.top_k < 2:
        raise ValueError(
            "a Mixtral model has experts in every layer, a linear router, softmax, top-k of 2 or "
            "more, renormalised weights and SwiGLU, without shared or idle experts or a capacity"
        )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_width if experts.ffn_dim is None else experts.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim // config.num_heads if config.head_dim is None else config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "sliding_window": None,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": experts.balance_coefficient,
        "router_jitter_noise": experts.jitter,
        "torch_dtype": "float32",
    }


def to_mixtral(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A decoder's weights under the names of published Mixtral files, one tensor an expert.

    Raises:
        ValueError: if the decoder is no Mixtral model, see `mixtral_settings`.
    """
    mixtral_settings(config)
    whole = {ours: theirs for theirs, ours in _WHOLE.items()}
    layer_names = {ours: theirs for theirs, ours in _LAYER.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in whole:
            if not (config.tie_embeddings and name == "output.weight"):
                out[whole[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        sparse = f"{prefix}block_sparse_moe."
        if rest == "ffn.router.weight":
            out[f"{sparse}gate.weight"] = tensor
        elif rest == "ffn.experts.down_proj":
            for expert, down in enumerate(tensor):
                out[f"{sparse}experts.{expert}.w2.weight"] = down
        elif rest == "ffn.experts.gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = torch.chunk(gate_up, 2)
                out[f"{sparse}experts.{expert}.w1.weight"] = gate
                out[f"{sparse}experts.{expert}.w3.weight"] = up
        else:
            out[prefix + layer_names[rest]] = tensor
    return out
