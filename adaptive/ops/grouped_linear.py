"""grouped_linear: one linear layer an expert, over rows that lie expert after expert.

Shape legend: N rows, E experts, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, refuses_triton, register
from adaptive.ops.kernels import NO_ACTIVATION
from adaptive.ops.operators import grouped_rows, grouped_weight_gradient
from parallel.autocast import computing_dtype, without_autocast


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, rows_per_expert_E: Tensor) -> Tensor:
    """`y[rows of e] = x[rows of e] @ weight[e].T` for every expert.

    Args:
        x_NI: [N, I], the rows of expert 0, then those of expert 1, …
        weight_EOI: [E, O, I], laid out as torch's Linear.
        rows_per_expert_E: int64 [E], sums to N; entries may be 0.

    Returns:
        [N, O]. An expert without rows gets a zero gradient. The reference reads `rows_per_expert`
        back to the host; "torch" does not.
    """
    dtype = computing_dtype(x_NI)
    x_NI, weight_EOI = x_NI.to(dtype), weight_EOI.to(dtype)
    function = choose("grouped_linear", x_NI).function
    with without_autocast(x_NI.device.type):
        return function(x_NI, weight_EOI, rows_per_expert_E)


class _Loop(torch.autograd.Function):
    """A product an expert, written into its place."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, rows_E: Tensor) -> Tensor:
        counts = rows_E.tolist()
        ctx.save_for_backward(x_NI, weight_EOI)
        ctx.counts = counts
        out = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
        for expert, (x, y) in enumerate(zip(x_NI.split(counts), out.split(counts), strict=True)):
            torch.mm(x, weight_EOI[expert].t(), out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NI, weight_EOI = ctx.saved_tensors
        grad_x = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOI) if ctx.needs_input_grad[1] else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start := start + count)
            if grad_x is not None:
                torch.mm(grad_NO[rows], weight_EOI[expert], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad_NO[rows].t(), x_NI[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _torch_grouped(x_NI: Tensor, weight_EOI: Tensor, rows_E: Tensor) -> Tensor:
    if any(_unaligned(width) for width in weight_EOI.shape[1:]) or _unaligned(x_NI.stride(0)):
        return (KernelGroupedLinear if refuses_triton(x_NI) is None else _Loop).apply(
            x_NI, weight_EOI, rows_E
        )
    offsets_E = rows_E.cumsum(0, dtype=torch.int32)
    out_NO = F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=offsets_E)
    return _ContiguousGradient.apply(out_NO)


class _ContiguousGradient(torch.autograd.Function):
    """grouped_mm's backward refuses an expanded gradient, as that of `y.sum()` is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _refuses_grouped_mm(x_NI: Tensor) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if x_NI.device.type == "cpu":
        return "on a CPU the loop is faster (benchmarks/moe_layer.py)"
    if x_NI.device.type != "cuda":
        return f"the tensor is on {x_NI.device.type}, not on a GPU"
    capability = torch.cuda.get_device_properties(x_NI.device).major
    if x_NI.dtype != torch.bfloat16 or capability not in (9, 10):
        return "outside bfloat16 on compute capability 9 and 10 grouped_mm loops over the experts"
    return None


def _unaligned(bfloat16_values: int) -> bool:
    """grouped_mm and its backward take rows of a multiple of 16 bytes."""
    return bfloat16_values % 8 != 0


# Row n is loaded from n and stored to n.
_IN_ORDER = (None, None, 1, False, 0, NO_ACTIVATION)


class KernelGroupedLinear(torch.autograd.Function):
    """All experts' products in one launch."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, rows_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI, rows_E)
        return grouped_rows(x_NI, weight_EOI, rows_E, *_IN_ORDER, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NI, weight_EOI, rows_E = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x, _ = grouped_rows(grad_NO, weight_EOI, rows_E, *_IN_ORDER, True, False)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_gradient(grad_NO, x_NI, rows_E, None, 1, False, False)
        return grad_x, grad_weight, None


register("grouped_linear", "reference", _Loop.apply)
register("grouped_linear", "triton", KernelGroupedLinear.apply, refuses_triton)
register("grouped_linear", "torch", _torch_grouped, _refuses_grouped_mm)
