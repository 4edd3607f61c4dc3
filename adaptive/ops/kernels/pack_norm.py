"""pack with the pre-norm: the chosen rows are read once, and leave as they are and normed.

Shape legend: T source tokens, R chosen rows, D width, P programs of the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.kernels.launching import INTERPRETED, contiguous_rows, next_power_of_2, on_device
from adaptive.ops.kernels.pack import gather_rows, invert_index

# mypy: disable-error-code="no-untyped-def"

PROGRAMS = 4 if INTERPRETED else 512
"""Of the backward: each sums the weight's gradient over its rows, a few to a multiprocessor."""


@triton.jit
def _forward(
    hidden,
    index,
    weight,
    packed,
    normed,
    centers,
    scales,
    width,
    hidden_stride,
    eps,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    place = tl.load(index + row).to(tl.int64)
    x = tl.load(hidden + place * hidden_stride + d, mask=inside, other=0)
    tl.store(packed + row * width + d, x, mask=inside)
    y = x.to(tl.float32)
    if CENTERED:
        center = tl.sum(y, 0) / width
        tl.store(centers + row, center)
        y = tl.where(inside, y - center, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(y * y, 0) / width + eps)
    tl.store(scales + row, scale)
    y *= scale
    if weight is not None:
        y *= tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * width + d, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    packed,
    grad_packed,
    grad_normed,
    weight,
    centers,
    scales,
    grad_rows,
    grad_weights,
    rows,
    width,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    inside = d < width
    if weight is not None:
        w = tl.load(weight + d, mask=inside, other=0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(r, tl.int64) * width + d
        scale = tl.load(scales + r)
        x = tl.load(packed + at, mask=inside, other=0).to(tl.float32)
        if CENTERED:
            x = tl.where(inside, x - tl.load(centers + r), 0.0)
        x *= scale
        g = tl.load(grad_normed + at, mask=inside, other=0).to(tl.float32)
        if weight is not None:
            total += g * x
            g *= w
        along = g - x * (tl.sum(g * x, 0) / width)
        if CENTERED:
            along -= tl.sum(g, 0) / width
        along = along * scale + tl.load(grad_packed + at, mask=inside, other=0).to(tl.float32)
        tl.store(grad_rows + at, along, mask=inside)
    if weight is not None:
        tl.store(grad_weights + tl.program_id(0).to(tl.int64) * width + d, total, mask=inside)


@torch.library.custom_op("adaptive::pack_norm", mutates_args=())
def pack_norm_forward(
    hidden_TD: Tensor, index_R: Tensor, weight_D: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed, normed, centers (empty unless centered) and scales, float32 [R]."""
    hidden_TD = contiguous_rows(hidden_TD)
    rows, width = index_R.shape[0], hidden_TD.shape[1]
    packed_RD, normed_RD = (hidden_TD.new_empty(rows, width) for _ in range(2))
    centers = hidden_TD.new_empty(rows if centered else 0, dtype=torch.float32)
    scales = hidden_TD.new_empty(rows, dtype=torch.float32)
    if packed_RD.numel():
        block = max(16, next_power_of_2(width))
        with on_device(hidden_TD):
            _forward[(rows,)](
                hidden_TD,
                index_R.contiguous(),
                None if weight_D is None else weight_D.contiguous(),
                packed_RD,
                normed_RD,
                centers,
                scales,
                width,
                hidden_TD.stride(0),
                eps,
                CENTERED=centered,
                BLOCK=block,
                num_warps=8 if block > 2048 else 4,
            )
    return packed_RD, normed_RD, centers, scales


@pack_norm_forward.register_fake
def _(
    hidden_TD: Tensor, index_R: Tensor, weight_D: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = index_R.shape[0], hidden_TD.shape[1]
    centers = hidden_TD.new_empty(rows if centered else 0, dtype=torch.float32)
    scales = hidden_TD.new_empty(rows, dtype=torch.float32)
    return hidden_TD.new_empty(rows, width), hidden_TD.new_empty(rows, width), centers, scales


@torch.library.custom_op("adaptive::pack_norm_backward", mutates_args=())
def pack_norm_backward(
    packed_RD: Tensor,
    grad_packed: Tensor,
    grad_normed: Tensor,
    weight_D: Tensor | None,
    centers: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight (float32 [P, D], to be summed; empty without one)."""
    rows, width = packed_RD.shape
    programs = min(rows, PROGRAMS)
    grad_rows = torch.empty_like(packed_RD)
    parts = packed_RD.new_empty(programs if weight_D is not None else 0, width, dtype=torch.float32)
    if packed_RD.numel():
        block = max(16, next_power_of_2(width))
        with on_device(packed_RD):
            _backward[(programs,)](
                packed_RD,
                grad_packed.contiguous(),
                grad_normed.contiguous(),
                None if weight_D is None else weight_D.contiguous(),
                centers,
                scales,
                grad_rows,
                parts,
                rows,
                width,
                CENTERED=centers.numel() > 0,
                BLOCK=block,
                num_warps=8 if block > 2048 else 4,
            )
    return grad_rows, parts


@pack_norm_backward.register_fake
def _(
    packed_RD: Tensor,
    grad_packed: Tensor,
    grad_normed: Tensor,
    weight_D: Tensor | None,
    centers: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    programs = 0 if weight_D is None else min(packed_RD.shape[0], PROGRAMS)
    parts = packed_RD.new_empty(programs, packed_RD.shape[1], dtype=torch.float32)
    return torch.empty_like(packed_RD), parts


class _PackNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        indices_R: Tensor,
        weight_D: Tensor | None,
        eps: float,
        centered: bool,
    ) -> tuple[Tensor, Tensor]:
        packed_RD, normed_RD, centers, scales = pack_norm_forward(
            hidden_TD, indices_R, weight_D, eps, centered
        )
        ctx.save_for_backward(packed_RD, indices_R, weight_D, centers, scales)
        ctx.tokens = hidden_TD.shape[0]
        return packed_RD, normed_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_packed: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        packed_RD, indices_R, weight_D, centers, scales = ctx.saved_tensors
        grad_rows, parts = pack_norm_backward(
            packed_RD, grad_packed, grad_normed, weight_D, centers, scales
        )
        grad_hidden = gather_rows(grad_rows, invert_index(indices_R, ctx.tokens))
        grad_weight = None if weight_D is None else parts.sum(0).to(weight_D.dtype)
        return grad_hidden, None, grad_weight, None, None


def pack_norm(
    hidden_TD: Tensor, indices_R: Tensor, weight_D: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """`adaptive.ops.pack_norm.pack_norm`."""
    return _PackNorm.apply(hidden_TD, indices_R, weight_D, eps, centered)
