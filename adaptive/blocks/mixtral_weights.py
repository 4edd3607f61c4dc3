"""A Mixtral layer's weights in a mixture of experts, and out of one.

    gate.weight               [E, D]       router.weight
    experts.gate_up_proj      [E, 2F, D]   experts.gate_up_proj, the gate half first
    experts.down_proj         [E, D, F]    experts.down_proj

Published files have one tensor an expert: `experts.{e}.w1` (gate), `w3` (up) and `w2` (down), each
`.weight`. Both forms are read; the first is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.gradients import part
from parallel.mesh import Mesh

_NAMES = {
    "gate.weight": "router.weight",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}


def stacked(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights with experts stacked, whichever form they came in.

    Raises:
        ValueError: names the first tensor that is missing.
    """
    if "experts.0.w1.weight" in weights:
        experts = range(sum(name.endswith(".w1.weight") for name in weights))
        ups, downs = [], []
        for e in experts:
            parts = [f"experts.{e}.{which}.weight" for which in ("w1", "w3", "w2")]
            gate, up, down = (_get(weights, name) for name in parts)
            ups.append(torch.cat([gate, up]))
            downs.append(down)
        weights = {
            "gate.weight": _get(weights, "gate.weight"),
            "experts.gate_up_proj": torch.stack(ups),
            "experts.down_proj": torch.stack(downs),
        }
    return {name: _get(weights, name) for name in _NAMES}


def mixtral_sizes(weights: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """(experts, width, feed-forward width)."""
    weights = stacked(weights)
    num_experts, dim = weights["gate.weight"].shape
    return num_experts, dim, weights["experts.down_proj"].shape[2]


def load_mixtral_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a layer's weights into a block, each rank its part.

    Raises:
        ValueError: names the first tensor whose shape does not fit.
    """
    own, mesh = dict(block.named_parameters()), _mesh(block)
    with torch.no_grad():
        for theirs, whole in stacked(weights).items():
            parameter = own[_NAMES[theirs]]
            slice_ = part(whole, parameter, mesh)
            if slice_.shape != parameter.shape:
                raise ValueError(
                    f"{theirs} of shape {list(whole.shape)}: this rank's part must be "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(slice_)


def mixtral_weights(block: Any) -> dict[str, Tensor]:
    """The weights of a MixtureOfExperts under Mixtral's names, detached.

    Raises:
        ValueError: if it weighs experts otherwise or has other parameters, or this rank holds only
            a part of them.
    """
    if block.gate != "softmax" or not block.renormalize:
        raise ValueError("a Mixtral layer renormalises the softmax of its scores; this does not")
    own, mesh = dict(block.named_parameters()), _mesh(block)
    others = sorted(set(own) ^ set(_NAMES.values()))
    if others:
        raise ValueError(f"{others[0]}: a Mixtral layer has {', '.join(_NAMES.values())} alone")
    if mesh.expert > 1 or mesh.tensor > 1:
        raise ValueError(
            "this rank holds a part of the experts: load a checkpoint on one rank and save that"
        )
    return {theirs: own[ours].detach() for theirs, ours in _NAMES.items()}


def _mesh(block: nn.Module) -> Mesh:
    mesh = block.mesh
    assert isinstance(mesh, Mesh)
    return mesh


def _get(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"{name}: missing from the Mixtral weights")
    return weights[name]
