"""The official SPRINT checkpoints' naming, both ways.

Blocks are called `encoder_blocks.N`, `middle_blocks.N`, `decoder_blocks.N`; the fusion is
`renoise_linear`; q, k and v are one linear layer; the SwiGLU layers are `fc1_g`, `fc1_x`, `fc2`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive.models.diffusion.model import DiffusionConfig, DiffusionTransformer

_PARTS = {"encoder": "encoder_blocks", "middle": "middle_blocks", "decoder": "decoder_blocks"}

# Ours -> theirs, for whole modules with a weight and a bias.
_OUTSIDE = {
    "patch_embedding": "x_embedder.proj",
    "time_embedding.up": "t_embedder.mlp.0",
    "time_embedding.down": "t_embedder.mlp.2",
    "head.modulation.linear": "final_layer.adaLN_modulation.1",
    "head.linear": "final_layer.linear",
    "trunk.fusion": "renoise_linear",
}
_IN_BLOCK = {
    "modulation.linear": "adaLN_modulation.1",
    "attention.output": "attn.proj",
}
_FFN = {
    "gelu": {"ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2"},
    "swiglu": {"ffn.gate": "mlp.fc1_g", "ffn.up": "mlp.fc1_x", "ffn.down": "mlp.fc2"},
}
_MASK = "trunk.fusion.mask_token"


def from_sprint_state_dict(
    weights: Mapping[str, Tensor], *, num_heads: int, image_size: int, patch_size: int
) -> DiffusionTransformer:
    """The model of an official checkpoint; other sizes come from the tensors' shapes.

    Args:
        weights: tensors by their official names.
        num_heads, image_size, patch_size: what the shapes do not tell.

    Raises:
        ValueError: for a missing or unknown name, or a shape that does not fit.
    """
    config = _config_of(weights, num_heads, image_size, patch_size)
    names = _names(config)
    expected = {theirs for theirs, _ in names.values()}
    for name in sorted(expected ^ weights.keys()):
        fault = "is missing from" if name in expected else "is unknown in"
        raise ValueError(f"{name}: {fault} a SPRINT checkpoint of {_depths(config)} blocks")
    model = DiffusionTransformer(config)
    ours = model.state_dict()
    for name, (theirs, part) in names.items():
        value = weights[theirs]
        if part is not None:
            value = value.chunk(3)[part]
        if name == _MASK:
            value = value.flatten()
        if value.shape != ours[name].shape:
            raise ValueError(
                f"{theirs} of shape {list(weights[theirs].shape)}: gives {list(value.shape)}, "
                f"the model has {list(ours[name].shape)}"
            )
        ours[name] = value
    model.load_state_dict(ours)
    return model


def sprint_state_dict(model: DiffusionTransformer) -> dict[str, Tensor]:
    """The model's weights by their official names, copied to the CPU.

    Raises:
        ValueError: for a setting that the names cannot tell: read back, the model would compute
            another function. For a part of a model that tensor ranks share.
    """
    if model.mesh.tensor > 1:
        raise ValueError(
            "this rank holds a part of the weights: load a checkpoint on one rank and save that"
        )
    for name, official in (("paths", "both"), ("rope_base", 10000.0)):
        if getattr(model.config, name) != official:
            raise ValueError(
                f"{name}={getattr(model.config, name)}: must be {official} in a SPRINT checkpoint"
            )
    state = model.state_dict()
    parts: dict[str, list[Tensor]] = {}
    for name, (theirs, _) in _names(model.config).items():
        parts.setdefault(theirs, []).append(state[name].detach().cpu())
    weights = {theirs: torch.cat(values) for theirs, values in parts.items()}
    weights["mask_token"] = weights["mask_token"].view(1, 1, -1)
    return weights


def _names(config: DiffusionConfig) -> dict[str, tuple[str, int | None]]:
    """Our name -> the official one, and which third of it (for q, k, v)."""
    names: dict[str, tuple[str, int | None]] = {
        _MASK: ("mask_token", None),
        "label_embedding.weight": ("y_embedder.embedding_table.weight", None),
    }
    for ours, theirs in _OUTSIDE.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = (f"{theirs}.{kind}", None)
    for part, depth in zip(_PARTS, _depths(config), strict=True):
        for index in range(depth):
            ours, theirs = f"trunk.{part}.{index}", f"{_PARTS[part]}.{index}"
            for kind in ("weight", "bias"):
                for third, projection in enumerate(("query", "key", "value")):
                    name = f"{ours}.attention.{projection}.{kind}"
                    names[name] = (f"{theirs}.attn.qkv.{kind}", third)
                for inside, official in {**_IN_BLOCK, **_FFN[config.ffn]}.items():
                    names[f"{ours}.{inside}.{kind}"] = (f"{theirs}.{official}.{kind}", None)
            if config.qk_norm:
                for norm, official in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                    name = f"{ours}.attention.{norm}.weight"
                    names[name] = (f"{theirs}.attn.{official}.weight", None)
    return names


def _depths(config: DiffusionConfig) -> tuple[int, int, int]:
    return config.encoder_depth, config.middle_depth, config.decoder_depth


def _config_of(
    weights: Mapping[str, Tensor], num_heads: int, image_size: int, patch_size: int
) -> DiffusionConfig:
    for name in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight"):
        if name not in weights:
            raise ValueError(f"{name}: is missing from a SPRINT checkpoint")
    dim, patch_dim = weights["x_embedder.proj.weight"].shape
    encoder, middle, decoder = (
        1 + max((int(n.split(".")[1]) for n in weights if n.startswith(f"{part}.")), default=-1)
        for part in _PARTS.values()
    )
    swiglu = any(".mlp.fc1_g." in name for name in weights)
    up = ".mlp.fc1_g.weight" if swiglu else ".mlp.fc1.weight"
    # What share training kept is not told either: the paper's, where the grid has its cells.
    keep = DiffusionConfig.keep if image_size // patch_size % 2 == 0 else 1.0
    widths = [value.shape[0] for name, value in weights.items() if name.endswith(up)]
    return DiffusionConfig(
        image_size=image_size,
        channels=patch_dim // patch_size**2,
        patch_size=patch_size,
        num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        dim=dim,
        num_heads=num_heads,
        encoder_depth=encoder,
        middle_depth=middle,
        decoder_depth=decoder,
        ffn="swiglu" if swiglu else "gelu",
        ffn_dim=widths[0] if widths else None,
        keep=keep,
        qk_norm=any(name.endswith(".attn.q_norm.weight") for name in weights),
    )
