"""A linear layer through the library that our own CPU ops choose: the like-for-like baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptive.ops.matrix_product import product


class _OurProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return product(grad, weight), product(grad.t(), x)


def linear_by_our_products(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` on [tokens, in], its three products by adaptive/ops/matrix_product.py."""
    return _OurProducts.apply(x, weight)
