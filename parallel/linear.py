"""Linear layers whose float32 products on a CPU run through the faster of torch's libraries.

Everywhere else, and wherever torch does something with a call that it cannot do with this one
(compilation, autocast, transforms of torch.func), they are `torch.nn.functional.linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.eager import plain_eager
from parallel.matrix_product import by_onednn, product, worth_compiling

_COMING_BACK = 16
"""Rows up to which every count, and above which only multiples of it, are compiled for: others, as
skipping leaves them, rarely come back."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, as `torch.nn.functional.linear`.

    Args:
        x: [..., in].
        weight_OI: [out, in].
        bias_O: [out] or None.

    Returns:
        [..., out].
    """
    rows = x.numel() // max(x.shape[-1], 1)
    coming_back = rows < _COMING_BACK or rows % _COMING_BACK == 0
    if not coming_back or not worth_compiling(rows, weight_OI) or not _plain(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    # A slice of a wider weight is copied: a thousandth of the products' time, and oneDNN wants it.
    weight_OI = weight_OI.contiguous()
    x_TI = x if x.dim() == 2 else x.reshape(rows, x.shape[-1])
    kept_TI = _Keep.apply(x_TI, weight_OI)
    if kept_TI.grad_fn is not None:
        out_TO = _Linear.apply(kept_TI, weight_OI, bias_O, kept_TI.grad_fn, x.requires_grad)
    elif bias_O is not None and bias_O.requires_grad and torch.is_grad_enabled():
        out_TO = product(x_TI, weight_OI.t()) + bias_O
    else:
        out_TO = product(x_TI, weight_OI.t(), bias=bias_O)
    return out_TO if x.dim() == 2 else out_TO.view(*x.shape[:-1], weight_OI.shape[0])


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _plain(x: Tensor, weight_OI: Tensor) -> bool:
    return by_onednn(x) and by_onednn(weight_OI) and plain_eager()


class _Keep(torch.autograd.Function):
    """`x` itself; saves what the products' gradients need before they are computed.

    A recomputed forward stops when it has saved what the first one saved. torch's own layers save
    their input and then multiply, so the last product of a checkpointed block is never repeated;
    a Function saves after it has computed. Hence two: this one saves, the next computes.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.set_materialize_grads(False)
        return x_TI.view_as(x_TI)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor | None) -> tuple[Tensor | None, None]:
        return grad_TI, None


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias`. `keeper` is the node of `_Keep` and has the two saved."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, keeper: Any, for_x: bool
    ) -> Tensor:
        ctx.keeper, ctx.for_x = keeper, for_x
        return product(x_TI, weight_OI.t(), bias=bias_O)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.keeper.saved_tensors
        _, for_weight, for_bias, *_ = ctx.needs_input_grad
        return (
            _product(grad_TO, weight_OI) if ctx.for_x else None,
            _product(grad_TO.t(), x_TI) if for_weight else None,
            grad_TO.sum(0) if for_bias else None,
            None,
            None,
        )


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`a @ b`, recorded where a backward is itself differentiated."""
    return _Product.apply(a_MK, b_KN) if torch.is_grad_enabled() else product(a_MK, b_KN)


class _Product(torch.autograd.Function):
    """`a @ b`, its own derivative's derivative: gradients of gradients are asked for too."""

    @staticmethod
    def forward(ctx: Any, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        ctx.save_for_backward(a_MK, b_KN)
        return product(a_MK, b_KN)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        a_MK, b_KN = ctx.saved_tensors
        for_a, for_b = ctx.needs_input_grad
        return (
            _product(grad_MN, b_KN.t()) if for_a else None,
            _product(a_MK.t(), grad_MN) if for_b else None,
        )
