"""Gradients across ranks: averages, the global norm, clipping, and whole tensors from slices.

A parameter is one of three kinds. *Replicated*: every rank holds all of it. *Split*
(`parallel.tensor.is_split`): each tensor rank holds a slice along `partition_dim`. *Expert*
(`is_expert`): each expert rank holds other experts along dimension 0, possibly split as well.

DeepSpeed does this for a run that it trains. What is here serves plain training loops and the
parity check, and corrects DeepSpeed's norm where experts are spread.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.rows import all_gather_rows
from parallel.tensor import is_split


def is_expert(parameter: Tensor) -> bool:
    """Whether expert ranks hold other experts. The mark is DeepSpeed's and megatron's."""
    return not getattr(parameter, "allreduce", True)


def average_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Average gradients over the replicas of a mesh, in place, as DeepSpeed does.

    Experts are summed over the ranks that hold them and divided by all replicas: tokens of every
    replica have reached them. A parameter without a gradient counts as zero.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        group = mesh.expert_data_group if is_expert(parameter) else mesh.batch_group
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= mesh.replicas


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The 2-norm of the whole model's gradient, each slice counted once. A collective.

    Returns:
        A float32 scalar, the same on every rank (float64 for float64 gradients).
    """
    kinds: dict[tuple[bool, bool], list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        # Also of what this rank has none: its share of a sum must lie where the others' does.
        device = parameter.device
        if parameter.grad is not None:
            kind = (is_split(parameter), is_expert(parameter))
            kinds.setdefault(kind, []).append(parameter.grad)
    # In one order on every rank, and also where a rank has none of a kind.
    total: Tensor | None = None
    for split, expert in ((False, False), (True, False), (False, True), (True, True)):
        grads = kinds.get((split, expert), [])
        square = _square(grads, device)
        for needed, group in ((split, mesh.tensor_group), (expert, mesh.expert_group)):
            if needed and group is not None:
                dist.all_reduce(square, group=group)
        total = square if total is None else total + square
    assert total is not None
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, mesh: Mesh) -> Tensor:
    """Scale gradients in place so that the global norm is at most `max_norm`; return the norm."""
    parameters = list(parameters)
    norm = gradient_norm(parameters, mesh)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= factor.to(parameter.grad.dtype)
    return norm


def whole(slice_: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """The whole tensor whose slice this rank holds: a parameter, its gradient or its moment.

    A collective over the axes that the parameter is split over; every rank gets the result.

    Args:
        slice_: shaped as `parameter`.
        parameter: carries the marks.
        mesh: the mesh.
    """
    out = slice_.detach()
    if is_split(parameter) and mesh.tensor_group is not None:
        dim: int = parameter.partition_dim  # type: ignore[attr-defined]
        stride: int = getattr(parameter, "partition_stride", 1)
        parts = out.chunk(stride, dim)
        whole_parts = [_joined(part, dim, mesh.tensor_group, mesh.tensor) for part in parts]
        out = torch.cat(whole_parts, dim)
    if is_expert(parameter) and mesh.expert_group is not None:
        out = _joined(out, 0, mesh.expert_group, mesh.expert)
    return out


def part(whole_: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """This rank's slice of a whole tensor: what `whole` undoes. A view where that is possible."""
    out = whole_
    if is_expert(parameter) and mesh.expert > 1:
        out = out.chunk(mesh.expert, 0)[mesh.expert_rank]
    if is_split(parameter) and mesh.tensor > 1:
        dim: int = parameter.partition_dim  # type: ignore[attr-defined]
        stride: int = getattr(parameter, "partition_stride", 1)
        own = [piece.chunk(mesh.tensor, dim)[mesh.tensor_rank] for piece in out.chunk(stride, dim)]
        out = own[0] if stride == 1 else torch.cat(own, dim)
    return out


def _joined(slice_: Tensor, dim: int, group: dist.ProcessGroup, ranks: int) -> Tensor:
    rows = slice_.movedim(dim, 0).contiguous()
    return all_gather_rows(rows, group, (rows.shape[0],) * ranks).movedim(0, dim).contiguous()


def _square(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares, accumulated in float64: summation order must not show in a norm."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([grad.double().square().sum() for grad in grads]).sum()
