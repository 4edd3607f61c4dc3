"""pack_norm: take the chosen tokens out, together with their pre-norm.

Shape legend: T source tokens, R chosen tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from adaptive.ops.backend import Implementation, choose, refuses_triton, register
from adaptive.ops.pack import pack


def pack_norm(
    hidden_TD: Tensor,
    indices_R: Tensor,
    weight_D: Tensor | None = None,
    *,
    eps: float = 1e-6,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """`pack`, and the norm of what was packed, reading the chosen rows once.

    Args:
        hidden_TD: [tokens, width].
        indices_R: int64 [R], each row at most once. R may be 0.
        weight_D: multiplies the normed rows; None: ones.
        eps: added to the mean square.
        centered: LayerNorm, which subtracts the mean first; else RMSNorm.

    Returns:
        (packed [R, D], for the residual; normed [R, D], for the layer), in the dtype of `hidden`.
        Means are taken in float32.
    """
    return choose("pack_norm", hidden_TD).function(hidden_TD, indices_R, weight_D, eps, centered)


def _reference(
    hidden_TD: Tensor, indices_R: Tensor, weight_D: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    packed_RD = pack(hidden_TD, indices_R)
    shape = (packed_RD.shape[-1],)
    weight_D = None if weight_D is None else weight_D.to(packed_RD.dtype)
    if centered:
        return packed_RD, F.layer_norm(packed_RD, shape, weight_D, eps=eps)
    return packed_RD, F.rms_norm(packed_RD, shape, weight_D, eps)


def _kernel(
    hidden_TD: Tensor, indices_R: Tensor, weight_D: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    from adaptive.ops.kernels.pack_norm import pack_norm as kernel

    return kernel(hidden_TD, indices_R, weight_D, eps, centered)


def _refuses_kernel(hidden_TD: Tensor) -> str | None:
    if hidden_TD.dim() != 2 or hidden_TD.shape[1] > 16384:
        return f"shape {list(hidden_TD.shape)}: the kernel takes [T, D] with D at most 16384"
    return refuses_triton(hidden_TD)


register("pack_norm", Implementation("reference", _reference))
register("pack_norm", Implementation("triton", _kernel, _refuses_kernel))
