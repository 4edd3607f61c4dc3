"""Tokens through their experts' feed-forwards and back, with no permuted copy of them.

The first product gathers tokens as it loads and applies the activation as it stores; the second
scales by the pair's weight and stores each row at its pair, so that a token's choices lie side by
side and are summed in order. The weight's gradient is `<grad act, act>`, which the activation's
backward has at hand: the experts' outputs are not kept.

Shape legend: T tokens, K choices a token, N taken pairs, E experts, D width, F feed-forward width,
H width of the first product (2F for SwiGLU, F for GELU).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.kernels.launching import cdiv, on_device, row_blocks
from adaptive.ops.kernels.permute import sum_pairs
from adaptive.ops.operators import (
    GELU,
    NO_ACTIVATION,
    SWIGLU,
    grouped_rows,
    grouped_weight_gradient,
)
from parallel.autocast import computing_dtype

# mypy: disable-error-code="no-untyped-def"

ACTIVATIONS = {"swiglu": SWIGLU, "gelu": GELU}


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


class _ExpertFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        pairs_N: Tensor,
        rows_E: Tensor,
        weights_TK: Tensor | None,
        top_k: int,
        activation: int,
    ) -> Tensor:
        pairs_N = pairs_N.contiguous()
        flat = None if weights_TK is None else weights_TK.reshape(-1).contiguous()
        keep = any(ctx.needs_input_grad)
        act_NF, hidden_NH = grouped_rows(
            x_TD, up_EHD, rows_E, pairs_N, None, top_k, True, 0, activation, False, keep
        )
        shape = (x_TD.shape[0], top_k)
        out_TD = _summed_rows(act_NF, down_EDF, rows_E, pairs_N, flat, shape, transposed=False)
        ctx.save_for_backward(x_TD, up_EHD, down_EDF, pairs_N, rows_E, flat, hidden_NH)
        ctx.top_k, ctx.activation = top_k, activation
        ctx.weights = None if weights_TK is None else (weights_TK.shape, weights_TK.dtype)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_EHD, down_EDF, pairs_N, rows_E, flat, hidden_NH = ctx.saved_tensors
        top_k, activation = ctx.top_k, ctx.activation
        grad_act_NF, _ = grouped_rows(
            grad_TD, down_EDF, rows_E, pairs_N, None, top_k, True, 0, NO_ACTIVATION, True, False
        )
        grad_hidden_NH, grad_flat = activation_backward(
            grad_act_NF, hidden_NH, pairs_N, flat, activation
        )
        act_NF = grad_act_NF
        grad_x = grad_up = grad_down = grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_down = grouped_weight_gradient(
                grad_TD, act_NF, rows_E, pairs_N, top_k, True, False
            )
        if ctx.needs_input_grad[1]:
            grad_up = grouped_weight_gradient(
                grad_hidden_NH, x_TD, rows_E, pairs_N, top_k, False, True
            )
        if ctx.needs_input_grad[0]:
            shape = (x_TD.shape[0], top_k)
            grad_x = _summed_rows(
                grad_hidden_NH, up_EHD, rows_E, pairs_N, None, shape, transposed=True
            )
        if ctx.weights is not None:
            shape, dtype = ctx.weights
            grad_weights = grad_flat.view(shape).to(dtype)
        return grad_x, grad_up, grad_down, None, None, grad_weights, None, None


def _summed_rows(
    rows_NI: Tensor,
    weight: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor,
    scales: Tensor | None,
    shape: tuple[int, int],
    *,
    transposed: bool,
) -> Tensor:
    """Every expert's product with its rows, scaled by pair, summed over each token's: [T, O]."""
    tokens, top_k = shape
    places = tokens * top_k
    # Experts that choose have a place for every token and expert, and fill few of them.
    scatter = places <= 2 * pairs_N.shape[0]
    out, _ = grouped_rows(
        rows_NI, weight, rows_E, pairs_N, scales, 1, False, places if scatter else 0,
        NO_ACTIVATION, transposed, False,
    )  # fmt: skip
    if not scatter:
        return sum_pairs(out, pairs_N, None, shape)
    # torch sums low precision in float32.
    return out if top_k == 1 else out.unflatten(0, shape).sum(1)


def expert_feed_forward(
    x_TD: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    pairs_N: Tensor,
    rows_E: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    activation: str,
) -> Tensor:
    """`adaptive.ops.expert_feed_forward.expert_feed_forward`."""
    dtype = computing_dtype(x_TD)
    x_TD, up_EHD, down_EDF = (t.to(dtype) for t in (x_TD, up_EHD, down_EDF))
    return _ExpertFeedForward.apply(
        x_TD, up_EHD, down_EDF, pairs_N, rows_E, weights_TK, top_k, ACTIVATIONS[activation]
    )
