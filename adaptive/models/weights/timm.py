"""timm's names for the weights of a vision transformer, both ways.

Queries, keys and values are one layer `attn.qkv`, patches a convolution, and the class token a row
in front of the positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive.models.vision.model import VisionConfig, VisionTransformer

_OUTSIDE = {"patch_embedding": "patch_embed.proj", "norm": "norm", "head": "head"}
_IN_LAYER = {
    "attention_norm": "norm1",
    "attention.output": "attn.proj",
    "ffn_norm": "norm2",
    "ffn.up": "mlp.fc1",
    "ffn.down": "mlp.fc2",
}
_QKV = ("query", "key", "value")


def from_timm(weights: Mapping[str, Tensor], *, num_heads: int) -> VisionTransformer:
    """The model of a timm checkpoint (`vit_*_patch*`); sizes come from the tensors' shapes.

    Args:
        weights: tensors by timm's names; each must be used, and none may be missing.
        num_heads: what the shapes do not tell.

    Raises:
        ValueError: for a missing or unknown name, or a shape that does not fit.
    """
    for name in ("patch_embed.proj.weight", "head.weight"):
        if name not in weights:
            raise ValueError(f"{name}: is missing from a timm vision transformer")
    dim, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    pooled = "norm.weight" not in weights and "fc_norm.weight" in weights
    prefix = "cls_token" in weights
    learned = "pos_embed" in weights
    if not learned:
        raise ValueError("pos_embed: is missing from a timm vision transformer")
    tokens = weights["pos_embed"].shape[1] - int(prefix)
    side = round(tokens**0.5)
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    config = VisionConfig(
        image_size=side * patch_size,
        channels=channels,
        patch_size=patch_size,
        num_classes=weights["head.weight"].shape[0],
        dim=dim,
        num_layers=len(layers),
        num_heads=num_heads,
        ffn_dim=weights["blocks.0.mlp.fc1.weight"].shape[0] if layers else None,
        pooling="class_token" if prefix else "mean",
    )
    if prefix and pooled:
        raise ValueError(
            "fc_norm.weight: a class token beside a mean over tokens is not served: give a "
            "checkpoint with global_pool=token, or without class token"
        )
    model = VisionTransformer(config)
    ours = model.state_dict()
    renamed = {name.replace("fc_norm.", "norm."): value for name, value in weights.items()}
    names = _names(config)
    for name in sorted({theirs for theirs, _ in names.values()} ^ renamed.keys()):
        fault = "is unknown in" if name in renamed else "is missing from"
        raise ValueError(f"{name}: {fault} a timm vision transformer of {config.num_layers} layers")
    for name, (theirs, part) in names.items():
        value = renamed[theirs]
        value = value if part is None else value.chunk(3)[part]
        if value.numel() != ours[name].numel():
            raise ValueError(
                f"{theirs} of shape {list(renamed[theirs].shape)}: gives {list(value.shape)}, the "
                f"model has {list(ours[name].shape)}"
            )
        ours[name] = value.reshape(ours[name].shape)
    model.load_state_dict(ours)
    return model


def to_timm(model: VisionTransformer) -> dict[str, Tensor]:
    """The model's weights by timm's names, copied to the CPU.

    Raises:
        ValueError: for 2-D rotary positions, which timm's plain models do not have, or for a part
            of a model that tensor ranks share.
    """
    config = model.config
    if config.positions != "learned":
        raise ValueError(f"positions={config.positions}: timm's plain models have learned ones")
    if model.mesh.tensor > 1:
        raise ValueError(f"tensor={model.mesh.tensor}: must be 1, a rank holds a part of the model")
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    parts: dict[str, list[Tensor]] = {}
    for name, (theirs, _) in _names(config).items():
        parts.setdefault(theirs, []).append(ours[name])
    made = {name: torch.cat(values) for name, values in parts.items()}
    made["patch_embed.proj.weight"] = made["patch_embed.proj.weight"].unflatten(
        1, (config.channels, config.patch_size, config.patch_size)
    )
    made["pos_embed"] = made["pos_embed"][None]
    if config.prefix:
        made["cls_token"] = made["cls_token"][None, None]
    else:
        for kind in ("weight", "bias"):
            made[f"fc_norm.{kind}"] = made.pop(f"norm.{kind}")
    return {name: value.clone() for name, value in made.items()}


def _names(config: VisionConfig) -> dict[str, tuple[str, int | None]]:
    """Our name -> timm's (norm for fc_norm), and which third of it (queries, keys, values)."""
    names: dict[str, tuple[str, int | None]] = {"positions": ("pos_embed", None)}
    modules: dict[str, tuple[str, int | None]] = {}
    if config.prefix:
        names["class_token"] = ("cls_token", None)
    modules.update({ours: (theirs, None) for ours, theirs in _OUTSIDE.items()})
    for layer in range(config.num_layers):
        for ours, theirs in _IN_LAYER.items():
            modules[f"layers.{layer}.{ours}"] = (f"blocks.{layer}.{theirs}", None)
        for part, ours in enumerate(_QKV):
            modules[f"layers.{layer}.attention.{ours}"] = (f"blocks.{layer}.attn.qkv", part)
    for ours, (theirs, third) in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = (f"{theirs}.{kind}", third)
    return names
