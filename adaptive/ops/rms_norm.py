"""rms_norm: `x / rms(x) * weight`.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.ops.backend import choose, register
from parallel.linear import plain_eager


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square (plus eps), times the weight.

    Args:
        x_TD: float [T, D].
        weight_D: [D], cast to the dtype of `x`.
        eps: added to the mean square.

    Returns:
        [T, D] in the dtype of `x`; the mean is taken in float32.

    Source: arXiv 1910.07467.
    """
    return choose("rms_norm", x_TD).function(x_TD, weight_D, eps)


def _reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD, (x_TD.shape[-1],), weight_D.to(x_TD.dtype), eps)


class _FewPasses(torch.autograd.Function):
    """The same in float32 on a CPU, in five passes over the tokens forward and backward.

    torch's own is a chain of operators, whose backward makes three to five times as many passes.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse_T1 = _inverse_rms(x_TD, eps)
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        ctx.eps = eps
        return (x_TD * inverse_T1).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Differentiated itself, it must see that the inverse depends on x.
            inverse_T1 = _inverse_rms(x_TD, ctx.eps)
        both_TD = grad_TD * x_TD
        weight_grad_D = both_TD.t() @ inverse_T1.squeeze(-1)
        toward_x_T1 = (both_TD @ weight_D)[:, None] * inverse_T1.pow(3) / -x_TD.shape[-1]
        return (
            torch.addcmul(grad_TD * weight_D * inverse_T1, x_TD, toward_x_T1),
            weight_grad_D,
            None,
        )


def _inverse_rms(x_TD: Tensor, eps: float) -> Tensor:
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
    return (norm_T1.square() / x_TD.shape[-1] + eps).rsqrt()


def _few_passes(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    # The norm of a module may be given [S, B, D].
    rows_TD = x_TD.reshape(-1, x_TD.shape[-1])
    return _FewPasses.apply(rows_TD, weight_D.to(x_TD.dtype), eps).view(x_TD.shape)


def _refuses_few_passes(x_TD: Tensor) -> str | None:
    if x_TD.device.type != "cpu" or x_TD.dtype != torch.float32:
        return "written for float32 on a CPU"
    return None


def _refuses_call(_: Tensor) -> str | None:
    return None if plain_eager() else "compiled, transformed or autocast"


register("rms_norm", "reference", _reference)
register("rms_norm", "torch", _few_passes, _refuses_few_passes, _refuses_call)
