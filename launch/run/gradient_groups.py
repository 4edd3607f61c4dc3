"""Gradient norms by part of a model: attention, feed-forward, router and norms of every layer.

Whoever holds a gradient, and however many times it is held, one all-reduce adds up all of them:
each rank gives its squares as shares of the ranks that hold the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.gradients import is_expert
from parallel.mesh import Mesh
from parallel.tensor import is_split

_ROUTERS = {"router", "predictor"}
_WRAPPERS = {"block"}
"""Modules that only hold a layer's own: `layers.1.block.attention` is the attention of layer 1."""

_ROW = 1 << 14


def gradient_group(name: str) -> str:
    """The part of a model that a parameter belongs to, by its name.

    `layers.7.block.attention.query.weight` is of `layers.7/attention`; what lies outside of layers
    of its first module: `embedding`.
    """
    found = re.match(r"(.*?\.\d+)\.(.+)", name)
    if found is None:
        return name.partition(".")[0]
    layer, rest = found[1], [part for part in found[2].split(".") if part not in _WRAPPERS]
    if _ROUTERS & set(rest):
        return f"{layer}/router"
    return f"{layer}/norm" if rest[0].endswith("_norm") else f"{layer}/{rest[0]}"


def gradient_norms(
    parameters: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, optimizer: Any
) -> dict[str, float]:
    """2-norms of the averaged gradient before clipping, by `gradient_group`. A collective.

    Args:
        parameters: of the model, by name.
        mesh: how the ranks share it.
        optimizer: DeepSpeed's, between the last backward of a step and the step.
    """
    trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
    groups = list(dict.fromkeys(gradient_group(name) for name in trained))
    if not groups:
        return {}
    device = next(iter(trained.values())).device
    where, squares, copies = [], [], []
    for name, parameter, own in own_gradients(trained.items(), optimizer):
        where.append(groups.index(gradient_group(name)))
        squares.append(_square(own).to(device))
        copies.append(_copies(parameter, mesh))
    sums = torch.zeros(len(groups), dtype=torch.float64, device=device)
    if squares:
        shares = torch.stack(squares) / torch.tensor(copies, device=device)
        sums.index_add_(0, torch.tensor(where, device=device), shares)
    if mesh.world > 1:
        dist.all_reduce(sums)
    scale = float(getattr(optimizer, "loss_scale", 1.0))
    return dict(zip(groups, (sums.sqrt() / scale).tolist(), strict=True))


def own_gradients(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Any
) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, parameter and what this rank holds of its averaged gradient, where it holds any."""
    parted = _in_partition(optimizer)
    for name, parameter in parameters:
        if parameter.requires_grad:
            own = _own_gradient(parameter) if parted is None else parted.get(id(parameter))
            if own is not None:
                yield name, parameter, own


def _square(own: Tensor) -> Tensor:
    """Sum of squares, float64: of rows in float32, which is ten times as fast and as good to 1e-7.

    Float32 alone is 1e-3 off on a CPU at 20 million numbers.
    """
    flat = own.flatten().float()
    even = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:even].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[even:])
    return rows.double().square().sum() + rest.double().square()


def _in_partition(optimizer: Any) -> dict[int, Tensor] | None:
    """By id of their parameter, what ZeRO 1 and 2 keep on this rank; None: found otherwise.

    These are the pairs that the optimizer's own norm is over. What its parameters say of their
    place among them is wrong with `round_robin_gradients`.
    """
    parameters = getattr(optimizer, "params_in_partition", None)
    if parameters is None or optimizer.cpu_offload:
        return None
    held = {}
    for group, gradients in optimizer.averaged_gradients.items():
        filled = (g for g in gradients if not getattr(g, "_zero_padding", False))
        # Behind the last parameter there may be padding.
        held |= {id(p): g for p, g in zip(parameters[group], filled, strict=False)}
    return held


def _own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a parameter's averaged gradient; None: nothing."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None if hasattr(parameter, "_hp_mapping") else parameter.grad
    index = parameter._index_in_param_group  # type: ignore[attr-defined]
    fragment: Tensor = mapping.get_lp_grad_fragment(index)
    own = mapping.lp_fragment_address
    if fragment.numel() > own.numel:  # its 16-bit optimizer keeps whole ones
        return fragment.flatten().narrow(0, own.start, own.numel)
    return fragment


def _copies(parameter: nn.Parameter, mesh: Mesh) -> float:
    """Ranks that hold the same numbers of a parameter's gradient."""
    slices = (mesh.tensor if is_split(parameter) else 1) * (
        mesh.expert if is_expert(parameter) else 1
    )
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        # ZeRO has parted it among those that hold the same weights.
        slices *= mesh.expert_data if is_expert(parameter) else mesh.replicas
    return mesh.world / slices
