"""TokenFormer's published form: names of its weights, and the sizes that were trained.

Published names, each followed by `.key_param_tokens` [N, D] or `.value_param_tokens` [N, D]:
`layers.L.{query, key, value, proj, ffn}`; beside them `word_embeddings.weight`,
`norm_f.{weight, bias}` and `output.weight`.

Source: TokenFormer, arXiv 2410.23168, table 6 and the released checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adaptive.blocks.pattention import Pattention, PattentionConfig
from adaptive.models.decoder.model import Decoder, DecoderConfig
from adaptive.ops.parameter_weights import Activation

_PUBLISHED = {
    "attention.query": "query",
    "attention.key": "key",
    "attention.value": "value",
    "attention.output": "proj",
    "ffn": "ffn",
}
_OUTSIDE = {
    "embedding.weight": "word_embeddings.weight",
    "norm.weight": "norm_f.weight",
    "norm.bias": "norm_f.bias",
    "output.weight": "output.weight",
}
# layers, width, heads; projections have as many parameter tokens as the width, feed-forwards four
# times as many.
_SIZES = {
    "150M": (12, 768, 12),
    "450M": (24, 1024, 16),
    "900M": (32, 1280, 16),
    "1.5B": (40, 1536, 16),
}


def tokenformer_config(size: str, *, vocab_size: int = 50304) -> DecoderConfig:
    """The configuration of a published size: "150M", "450M", "900M" or "1.5B".

    Raises:
        ValueError: for another name.
    """
    if size not in _SIZES:
        raise ValueError(f"size={size!r}: must be one of {', '.join(_SIZES)}")
    num_layers, dim, num_heads = _SIZES[size]
    pattention = PattentionConfig(tokens=dim, ffn_tokens=4 * dim)
    return _config(vocab_size, dim, num_layers, num_heads, pattention, max_seq_len=2048)


def from_tokenformer_state_dict(
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    activation: Activation = "l2_norm_gelu",
    max_seq_len: int = 2048,
) -> Decoder:
    """A decoder with published weights.

    Sizes are read off the tensors; the scale of every layer is √N unless a `.scale` beside the
    layer's tokens says otherwise (`tokenformer_state_dict` writes one for grown layers).

    Args:
        weights: tensors by published name, with or without a `weights.` in front.
        num_heads: query heads, which no tensor tells.
        activation: Θ of all layers.
        max_seq_len: longest sequence of the decoder.

    Returns:
        The decoder, in the dtype of the word embeddings, in training mode.

    Raises:
        ValueError: naming tensors that are missing, of the wrong shape or not known.
    """
    weights = {name.removeprefix("weights."): tensor for name, tensor in weights.items()}
    embedding = _get(weights, "word_embeddings.weight")
    vocab_size, dim = embedding.shape
    layers = {int(m[1]) for name in weights if (m := re.match(r"layers\.(\d+)\.", name))}
    num_layers = max(layers, default=-1) + 1
    if num_layers == 0 or len(layers) != num_layers:
        raise ValueError(f"layers {sorted(layers)}: must be numbered from 0 without a gap")

    def tokens(name: str) -> int:
        return _get(weights, f"layers.0.{name}.key_param_tokens").shape[0]

    pattention = PattentionConfig(
        tokens=tokens("query"),
        ffn_tokens=tokens("ffn"),
        output_tokens=None if tokens("proj") == tokens("query") else tokens("proj"),
        activation=activation,
    )
    config = _config(vocab_size, dim, num_layers, num_heads, pattention, max_seq_len=max_seq_len)
    with torch.device("meta"):
        model = Decoder(config)
    wanted = published_names(model)
    state, known = {}, set()
    for name, tensor in model.state_dict().items():
        published = wanted[name]
        known.add(published)
        if name.endswith(".scale"):
            count = _get(weights, published.replace(".scale", ".key_param_tokens")).shape[0]
            default = torch.tensor(_default_scale(activation, count), dtype=torch.float64)
            state[name] = weights.get(published, default).double().reshape(())
            continue
        state[name] = _get(weights, published)
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{published} of shape {list(state[name].shape)}: must be {list(tensor.shape)}"
            )
    if unknown := sorted(set(weights) - known):
        raise ValueError(f"{', '.join(unknown[:5])}: not a tensor of a TokenFormer language model")
    model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    return model.requires_grad_()


def tokenformer_state_dict(model: Decoder) -> dict[str, Tensor]:
    """The weights of a TokenFormer decoder under their published names, detached.

    A layer whose scale is not √N, as after growth, gets a `.scale` that public loaders do not
    read: they would compute another function.

    Raises:
        ValueError: if the decoder is not one that the names can describe: read back, it would
            compute another function.
    """
    config = model.config
    if model.mesh.tensor > 1 or model.mesh.expert > 1:
        raise ValueError(
            "this rank holds a part of the weights: load a checkpoint on one rank and save that"
        )
    if config.pattention is None or config.norm != "parameter_free" or config.tie_embeddings:
        raise ValueError(
            "this decoder: must have pattention, norm: parameter_free and untied embeddings"
        )
    if any(not method.sees_every_token for method in config.methods):
        raise ValueError("this decoder: routes tokens, which the published names cannot tell")
    _check_published(config)
    names, state = published_names(model), {}
    for name, tensor in model.state_dict().items():
        if name.endswith(".scale"):
            layer = model.get_submodule(name.removesuffix(".scale"))
            assert isinstance(layer, Pattention)
            if math.isclose(float(tensor), _default_scale(layer.activation, layer.num_tokens)):
                continue
        state[names[name]] = tensor.detach()
    return state


def published_names(model: Decoder) -> dict[str, str]:
    """Our name of every tensor in the state dict -> its published one."""
    names = dict(_OUTSIDE)
    for layer in range(model.config.num_layers):
        for ours, theirs in _PUBLISHED.items():
            for part, published in (
                ("key_tokens", "key_param_tokens"),
                ("value_tokens", "value_param_tokens"),
                ("scale", "scale"),
            ):
                names[f"layers.{layer}.{ours}.{part}"] = f"layers.{layer}.{theirs}.{published}"
    return names


def _check_published(config: DecoderConfig) -> None:
    """Raise ValueError for settings that no tensor tells and that readers take for granted."""
    assert config.pattention is not None
    pattention = replace(config.pattention, top_k=None, ffn_top_k=None)
    sizes = (config.vocab_size, config.dim, config.num_layers, config.num_heads)
    published = _config(*sizes, pattention, max_seq_len=config.max_seq_len)
    others = [method.name for method in config.methods if method.name != pattention.name]
    plain = ("rotary_fraction", "rope_base", "rope_scaling", "attention_bias", "qk_norm")
    for name in (*plain, *others):
        wanted = getattr(published, name)
        if getattr(config, name) != wanted:
            raise ValueError(f"{name}={getattr(config, name)}: must be {wanted} to be published")
    width = config.dim // config.num_heads
    if config.kv_heads != config.num_heads or config.head_dim not in (None, width):
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads}, head_dim={config.head_dim}: must be "
            f"{config.num_heads} heads of width {width} to be published"
        )
    if config.pattention != pattention:
        raise ValueError("top_k, ffn_top_k: must be null, all tokens take part, to be published")


def _config(
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    pattention: PattentionConfig,
    *,
    max_seq_len: int,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=max_seq_len,
        rotary_fraction=0.25,
        norm="parameter_free",
    ).with_method(pattention)


def _get(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"{name}: missing from the TokenFormer weights")
    return weights[name]


def _default_scale(activation: str, count: int) -> float:
    return 1.0 if activation == "softmax" else math.sqrt(count)
