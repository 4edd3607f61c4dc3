"""The backward of the activation between the two products of experts' feed-forwards.

Shape legend: T tokens, K choices a token, N taken pairs, E experts, D width, F feed-forward width,
H width of the first product (2F for SwiGLU, F for GELU).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive.ops.kernels.launching import cdiv, on_device, row_blocks

# mypy: disable-error-code="no-untyped-def"


@triton.jit(do_not_specialize=["rows"])
def _activation_backward(
    grad_act,
    hidden,
    pairs,
    scales,
    grad_hidden,
    grad_scales,
    rows,
    width,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # In place: the gradient of the activation becomes scale * act, which the weight gradient of
    # the second product wants.
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(pairs + r, mask=r < rows, other=0)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scales + pair, mask=r < rows, other=0).to(tl.float32)
    scale = scale[:, None]
    row = r.to(tl.int64)[:, None]
    hidden_width = width * 2 if ACTIVATION == 1 else width
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        f = start + tl.arange(0, COLUMNS)[None, :]
        inside = (r < rows)[:, None] & (f < width)
        at = row * hidden_width + f
        gate = tl.load(hidden + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad_act + row * width + f, mask=inside, other=0).to(tl.float32)
        if ACTIVATION == 1:
            up = tl.load(hidden + at + width, mask=inside, other=0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            act = silu * up
            slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(grad_hidden + at, g * scale * up * slope, mask=inside)
            tl.store(grad_hidden + at + width, g * scale * silu, mask=inside)
        else:
            normal = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
            act = gate * normal
            slope = normal + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
            tl.store(grad_hidden + at, g * scale * slope, mask=inside)
        dot += act * g
        tl.store(grad_act + row * width + f, act * scale, mask=inside)
    if SCALED:
        tl.store(grad_scales + pair, tl.sum(dot, 1), mask=r < rows)


@torch.library.custom_op("adaptive::expert_activation_backward", mutates_args={"grad_act_NF"})
def activation_backward(
    grad_act_NF: Tensor,
    hidden_NH: Tensor,
    pairs_N: Tensor,
    weights: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """(gradient of the first product, float32 gradient of the weights by pair).

    `grad_act`, the gradient of act before the weight, becomes `weight * act`.
    """
    rows, width = grad_act_NF.shape
    grad_hidden = torch.empty_like(hidden_NH)
    grad_weights = hidden_NH.new_zeros(0 if weights is None else weights.numel()).float()
    if grad_act_NF.numel():
        block, columns = row_blocks(rows, width, 2048)
        with on_device(hidden_NH):
            _activation_backward[(cdiv(rows, block),)](
                grad_act_NF,
                hidden_NH,
                pairs_N,
                weights,
                grad_hidden,
                grad_weights,
                rows,
                width,
                SCALED=weights is not None,
                ACTIVATION=activation,
                ROWS=block,
                COLUMNS=columns,
            )
    return grad_hidden, grad_weights


@activation_backward.register_fake
def _(
    grad_act_NF: Tensor,
    hidden_NH: Tensor,
    pairs_N: Tensor,
    weights: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    count = 0 if weights is None else weights.numel()
    return torch.empty_like(hidden_NH), hidden_NH.new_empty(count, dtype=torch.float32)
