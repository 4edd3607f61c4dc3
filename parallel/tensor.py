"""Tensor parallelism: layers split over the tensor axis, and the borders of their region.

Shape legend: T tokens, t this rank's share of them under sequence parallelism, D width,
V vocabulary, v this rank's share of it.

On one rank every function here is plain torch. Split layers draw their full weight and keep a
slice, so a model starts from the same weights however it is split.

The borders are ours and not megatron-core's because its own reduce in place, which changes a
tensor that somebody else may hold, and because routed tokens lie unevenly over the ranks, which
its layers refuse. Split weights carry megatron's marks (`tensor_model_parallel`,
`partition_dim`), which DeepSpeed's gradient norm and checkpoints read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.linear import Linear
from parallel.mesh import Mesh
from parallel.rows import (
    all_gather_rows,
    even_shards,
    gather_rows,
    reduce_scatter_rows,
)


def column_linear(
    in_features: int, out_features: int, *, mesh: Mesh, std: float = 0.02
) -> nn.Module:
    """A linear layer, no bias, whose outputs are split: [T, in] -> [T, out / tensor].

    To be called between `enter_tensor_region` and `leave_tensor_region`; communicates nothing.

    Raises:
        ValueError: if `out_features` is not a multiple of the tensor degree.
    """
    layer = _linear(in_features, out_features, std)
    layer.weight = split_parameter(layer.weight, 0, mesh=mesh, name="out_features")
    layer.out_features = layer.weight.shape[0]
    return layer


def row_linear(in_features: int, out_features: int, *, mesh: Mesh, std: float = 0.02) -> nn.Module:
    """A linear layer, no bias, whose inputs are split: [T, in / tensor] -> [T, out], a partial sum.

    `leave_tensor_region` completes the sum.

    Raises:
        ValueError: if `in_features` is not a multiple of the tensor degree.
    """
    layer = _linear(in_features, out_features, std)
    layer.weight = split_parameter(layer.weight, 1, mesh=mesh, name="in_features")
    layer.in_features = layer.weight.shape[1]
    return layer


class VocabEmbedding(nn.Module):
    """Token embedding whose rows are split over the tensor ranks.

    Forward: int64 [T] -> [T, D], or under sequence parallelism this rank's rows of it.

    Raises:
        ValueError: if the vocabulary is not a multiple of the tensor degree.
    """

    def __init__(self, vocab_size: int, dim: int, *, mesh: Mesh, std: float = 0.02) -> None:
        super().__init__()
        self.mesh = mesh
        weight_VD = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(weight_VD, std=std)
        self.weight = split_parameter(weight_VD, 0, mesh=mesh, name="vocab_size")

    def forward(self, ids_T: Tensor, *, shard_sizes: tuple[int, ...] | None = None) -> Tensor:
        if self.mesh.tensor == 1:
            return F.embedding(ids_T, self.weight)
        own_T = ids_T - self.mesh.tensor_rank * self.weight.shape[0]
        outside_T = (own_T < 0) | (own_T >= self.weight.shape[0])
        partial_TD = F.embedding(own_T.masked_fill(outside_T, 0), self.weight)
        partial_TD = partial_TD.masked_fill(outside_T[:, None], 0)
        return leave_tensor_region(partial_TD, self.mesh, shard_sizes=shard_sizes)


def split_parameter(
    full: Tensor, dim: int, *, mesh: Mesh, name: str = "size", stride: int = 1
) -> nn.Parameter:
    """This tensor rank's slice of a parameter, marked as one.

    Args:
        full: the whole parameter, or the tensor to make one of, drawn alike on every rank.
        dim: the dimension that is split.
        mesh: the mesh.
        name: what an error calls the size.
        stride: how many matrices lie one after the other in `dim`, each of which is split: 2 for
            gate and up projection in one.

    Raises:
        ValueError: if the dimension is not a multiple of the tensor degree.
    """
    if not isinstance(full, nn.Parameter):
        full = nn.Parameter(full)
    if mesh.tensor == 1:
        return full
    check_divides(name, full.shape[dim] // stride, mesh)
    parts = [part.chunk(mesh.tensor, dim)[mesh.tensor_rank] for part in full.chunk(stride, dim)]
    own = torch.cat(parts, dim).detach().clone()
    return mark_split(nn.Parameter(own, requires_grad=full.requires_grad), dim, stride=stride)


def mark_split(parameter: nn.Parameter, dim: int, *, stride: int = 1) -> nn.Parameter:
    """Tell norms and checkpoints that each tensor rank holds another slice along `dim`."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = stride  # type: ignore[attr-defined]
    return parameter


def is_split(parameter: Tensor) -> bool:
    """Whether each tensor rank holds another slice of the parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def check_divides(name: str, size: int, mesh: Mesh) -> None:
    """Raise ValueError, naming valid tensor degrees, unless the tensor degree divides `size`."""
    if size % mesh.tensor:
        fits = [str(n) for n in range(1, mesh.world + 1) if size % n == 0 and mesh.world % n == 0]
        raise ValueError(
            f"{name}={size}: must be a multiple of tensor={mesh.tensor}; "
            f"tensor may be {', '.join(fits)}"
        )


def enter_tensor_region(
    x_TD: Tensor, mesh: Mesh, *, shard_sizes: tuple[int, ...] | None = None
) -> Tensor:
    """Give every tensor rank all tokens; backward sums the gradients of the ranks.

    Args:
        x_TD: [T, D], or this rank's rows of it under sequence parallelism.
        mesh: the mesh.
        shard_sizes: rows of each shard under sequence parallelism; None for an even split.
    """
    if mesh.tensor_group is None:
        return x_TD
    if not mesh.sequence_parallel:
        return _Copy.apply(x_TD, mesh.tensor_group)
    even = (x_TD.shape[0],) * mesh.tensor
    sizes = even if shard_sizes is None else mesh.tensor_sizes(shard_sizes)
    return gather_rows(x_TD, mesh.tensor_group, sizes)


def leave_tensor_region(
    x_TD: Tensor, mesh: Mesh, *, shard_sizes: tuple[int, ...] | None = None
) -> Tensor:
    """Sum partial results over the tensor ranks; under sequence parallelism keep own rows only."""
    if mesh.tensor_group is None:
        return x_TD
    if not mesh.sequence_parallel:
        return _Sum.apply(x_TD, mesh.tensor_group)
    even = even_shards(x_TD.shape[0], mesh.tensor)
    sizes = even if shard_sizes is None else mesh.tensor_sizes(shard_sizes)
    return _ReduceScatterRows.apply(x_TD, mesh.tensor_group, sizes)


def replicated(weight: Tensor, mesh: Mesh) -> Tensor:
    """A weight that every tensor rank holds whole and applies to its own tokens only.

    The identity forward; backward sums the gradient over the tensor ranks under sequence
    parallelism, where each has seen other tokens. To be called where the weight is used, outside
    split regions: norms, routers, predictors.
    """
    if mesh.tensor_group is None or not mesh.sequence_parallel:
        return weight
    return _Copy.apply(weight, mesh.tensor_group)


def replicated_in_region(weight: Tensor, mesh: Mesh) -> Tensor:
    """A weight that every tensor rank holds whole and applies to its own heads or channels only.

    Like `replicated`, for use inside a split region, with or without sequence parallelism.
    """
    return weight if mesh.tensor_group is None else _Copy.apply(weight, mesh.tensor_group)


def sum_over_tensor(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum of every tensor rank's `x`; every rank's gradient is that of the whole sum.

    For a number that all tensor ranks go on to use in *different* computations (a norm over
    split features): backward sums what they make of it.
    """
    return x if mesh.tensor_group is None else _SumBoth.apply(x, mesh.tensor_group)


def gather_columns(x_Tv: Tensor, mesh: Mesh) -> Tensor:
    """Join results that are split over the last dimension: [T, v] -> [T, V] on every rank.

    For what is the same computation on every rank afterwards: backward keeps own columns.
    """
    return x_Tv if mesh.tensor_group is None else _GatherColumns.apply(x_Tv, mesh)


def gather_shards(
    x_tD: Tensor, mesh: Mesh, *, shard_sizes: tuple[int, ...] | None = None
) -> Tensor:
    """Every shard's rows under sequence parallelism: [t, D] -> [T, D] on every tensor rank.

    For what is the same computation on every rank afterwards: backward keeps own rows.
    """
    if mesh.tensor_group is None or not mesh.sequence_parallel:
        return x_tD
    even = (x_tD.shape[0],) * mesh.tensor
    sizes = even if shard_sizes is None else mesh.tensor_sizes(shard_sizes)
    return _GatherShards.apply(x_tD, mesh, sizes)


def _linear(in_features: int, out_features: int, std: float) -> nn.Linear:
    # On the meta device first, so that random numbers are drawn once. Not `skip_init`, which would
    # allocate on the CPU under `torch.device("meta")` and cannot under FakeTensorMode.
    layer = Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(out_features, in_features))
    nn.init.normal_(layer.weight, std=std)
    return layer


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Out of place: the caller's tensor may be held by somebody else."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return reduce_scatter_rows(x_TD, group, sizes)

    @staticmethod
    def backward(ctx: Any, grad_tD: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_rows(grad_tD, ctx.group, ctx.sizes), None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Tv: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        assert mesh.tensor_group is not None
        parts = all_gather_rows(x_Tv, mesh.tensor_group, (x_Tv.shape[0],) * mesh.tensor)
        return parts.view(mesh.tensor, *x_Tv.shape).transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor, None]:
        return grad_TV.chunk(ctx.mesh.tensor, -1)[ctx.mesh.tensor_rank].contiguous(), None


class _GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, mesh: Mesh, sizes: tuple[int, ...]) -> Tensor:
        ctx.rank, ctx.sizes = mesh.tensor_rank, sizes
        assert mesh.tensor_group is not None
        return all_gather_rows(x_tD, mesh.tensor_group, sizes)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return grad_TD.split(list(ctx.sizes))[ctx.rank].contiguous(), None, None
