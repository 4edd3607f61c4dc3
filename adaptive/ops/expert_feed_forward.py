"""expert_feed_forward: tokens through their experts' feed-forwards and back, in one op.

Shape legend: T tokens, K choices a token, N taken pairs, E experts, D width, F feed-forward width,
H width of the first product (2F for SwiGLU, F for GELU), R rows of one chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, refuses_triton, register
from adaptive.ops.grouped_linear import grouped_linear
from adaptive.ops.kernels import GELU, NO_ACTIVATION, SWIGLU
from adaptive.ops.operators import grouped_rows, grouped_weight_gradient
from adaptive.ops.permute import pair_weights, permute, unpermute
from parallel.autocast import computing_dtype, without_autocast
from parallel.linear import add_product, product, rounded_rows

Activation = Literal["swiglu", "gelu"]
_CODES = {"swiglu": SWIGLU, "gelu": GELU}
CHUNK_ROWS = 1024
"""Rows computed at a time on a CPU: what lies between the two products then stays in its cache."""


def expert_feed_forward(
    x_TD: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    pairs_N: Tensor,
    rows_per_expert_E: Tensor,
    weights_TK: Tensor | None = None,
    top_k: int = 1,
    activation: Activation = "swiglu",
) -> Tensor:
    """`out[t] = Σ weights[t, k] * down[e] act(up[e] x[t])` over the taken pairs (t, k) of token t.

    `act` is `silu(gate) * up`, the gate half first, or the exact GELU.

    Args:
        x_TD: [T, D].
        up_EHD: [E, H, D]; down_EDF: [E, D, F].
        pairs_N: int64 [N], the taken pairs `t * top_k + k`, expert after expert.
        rows_per_expert_E: int64 [E], pairs of each expert; sums to N. On a CPU, and only there,
            read back to the host.
        weights_TK: [T, K] or None (ones), differentiable.
        top_k: K.
        activation: "swiglu" or "gelu".

    Returns:
        [T, D]; zeros where a token has no taken pair. An expert without rows gets zero gradients.
    """
    check_activation(activation)
    dtype = computing_dtype(x_TD)
    x_TD, up_EHD, down_EDF = (t.to(dtype) for t in (x_TD, up_EHD, down_EDF))
    function = choose("expert_feed_forward", x_TD).function
    with without_autocast(x_TD.device.type):
        return function(
            x_TD, up_EHD, down_EDF, pairs_N, rows_per_expert_E, weights_TK, top_k, activation
        )


def check_activation(activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(
            f"activation={activation!r}: must be one of {', '.join(get_args(Activation))}"
        )


def activate(hidden_NH: Tensor, activation: Activation) -> Tensor:
    """[N, H] -> [N, F]."""
    if activation == "gelu":
        return F.gelu(hidden_NH)
    gate_NF, up_NF = hidden_NH.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def _composed(
    x_TD: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    pairs_N: Tensor,
    rows_E: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    activation: Activation,
) -> Tensor:
    x_ND = permute(x_TD, pairs_N, top_k)
    act_NF = activate(grouped_linear(x_ND, up_EHD, rows_E), activation)
    y_ND = grouped_linear(act_NF, down_EDF, rows_E)
    return unpermute(y_ND, pairs_N, weights_TK, (x_TD.shape[0], top_k))


class _Chunked(torch.autograd.Function):
    """A few rows of one expert at a time, from the gathered tokens to the output and back.

    Saves the tokens, the first product and, where pairs are weighted, the experts' outputs: the
    gradient of a pair's weight is `<grad, output>`. The gathered tokens and the activations are
    made again, chunk by chunk. Nothing of N rows is allocated but what is saved, in pieces: the C
    library maps a piece of more than 32 MB anew each time, and touching fresh pages costs as much
    as a product.
    """

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
        activation: Activation,
    ) -> Tensor:
        chunks, sources, weights = _chunked(x_TD, pairs_N, rows_E, weights_TK, top_k)
        ups, downs = up_EHD.unbind(), down_EDF.unbind()
        rounded = [rounded_rows(count, downs[expert]) for expert, count in chunks]
        longest = max(rounded, default=0)
        rows_buffer = x_TD.new_empty(longest, x_TD.shape[1])
        act_buffer = x_TD.new_empty(longest, down_EDF.shape[2])
        out_TD = torch.zeros_like(x_TD)
        products, outputs = [], []
        keeps_outputs = weights_TK is not None and ctx.needs_input_grad[5]
        for (expert, count), rows, source_R, weights_R1 in zip(
            chunks, rounded, sources, weights, strict=True
        ):
            x_RD = _gather(x_TD, source_R, rows_buffer[:rows])
            hidden_RH = product(x_RD, ups[expert].t())
            act_RF, _ = _activate_into(hidden_RH, activation, act_buffer[:rows], None)
            place = None if keeps_outputs else x_RD
            y_RD = product(act_RF, downs[expert].t(), out=place)[:count]
            if keeps_outputs:
                outputs.append(y_RD)
            if weights_R1 is not None:
                y_RD = torch.mul(y_RD, weights_R1, out=x_RD[:count])
            out_TD.index_add_(0, source_R, y_RD)
            products.append(hidden_RH)
        saved = (x_TD, up_EHD, down_EDF, pairs_N, rows_E, weights_TK)
        ctx.save_for_backward(*saved, *products, *outputs)
        ctx.top_k, ctx.activation = top_k, activation
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_EHD, down_EDF, pairs_N, rows_E, weights_TK, *kept = ctx.saved_tensors
        chunks, sources, weights = _chunked(x_TD, pairs_N, rows_E, weights_TK, ctx.top_k)
        products, outputs = kept[: len(chunks)], kept[len(chunks) :] or [None] * len(chunks)
        ups, downs, grad_TD = up_EHD.unbind(), down_EDF.unbind(), grad_TD.contiguous()
        grad_x = torch.zeros_like(x_TD) if ctx.needs_input_grad[0] else None
        grad_up = _GradientOf(up_EHD, chunks) if ctx.needs_input_grad[1] else None
        grad_down = _GradientOf(down_EDF, chunks) if ctx.needs_input_grad[2] else None
        per_pair = []
        longest = max((len(hidden) for hidden in products), default=0)
        widths = (*[x_TD.shape[1]] * 2, up_EHD.shape[1], *[down_EDF.shape[2]] * 3)
        buffers = [x_TD.new_empty(longest, width) for width in widths]
        for (expert, count), source_R, weights_R1, hidden_RH, y_RD in zip(
            chunks, sources, weights, products, outputs, strict=True
        ):
            # Rounded up as in forward; the rows beyond `count` are zero in every factor.
            rows, scratch, grad_hidden, act, silu, grad_act = (
                buffer[: len(hidden_RH)] for buffer in buffers
            )
            act_RF, silu_RF = _activate_into(hidden_RH, ctx.activation, act, silu)
            grad_RD = _gather(grad_TD, source_R, rows)
            if y_RD is not None:
                products_RD = torch.mul(grad_RD[:count], y_RD, out=scratch[:count])
                per_pair.append(products_RD.sum(-1, dtype=_wide(products_RD)))
            if weights_R1 is not None:
                grad_RD[:count].mul_(weights_R1)
            grad_act_RF = product(grad_RD, downs[expert], out=grad_act)
            if grad_down is not None:
                grad_down.add_product(expert, grad_RD.t(), act_RF)
            grad_hidden_RH = _activation_gradient(
                grad_act_RF, hidden_RH, ctx.activation, grad_hidden, silu_RF
            )
            if grad_up is not None:
                x_RD = _gather(x_TD, source_R, rows)
                grad_up.add_product(expert, grad_hidden_RH.t(), x_RD)
            if grad_x is not None:
                grad_x_RD = product(grad_hidden_RH, ups[expert], out=rows)
                grad_x.index_add_(0, source_R, grad_x_RD[:count])
        grad_weights = None
        if ctx.needs_input_grad[5]:
            grad_weights = torch.zeros_like(weights_TK)
            if per_pair:
                grad_weights.view(-1)[pairs_N] = torch.cat(per_pair).to(weights_TK.dtype)
        return (
            grad_x,
            None if grad_up is None else grad_up.total,
            None if grad_down is None else grad_down.total,
            None,
            None,
            grad_weights,
            None,
            None,
        )


Chunk = tuple[int, int]
"""(expert, number of its next rows)."""


def _chunked(
    x_TD: Tensor, pairs_N: Tensor, rows_E: Tensor, weights_TK: Tensor | None, top_k: int
) -> tuple[list[Chunk], Sequence[Tensor], Sequence[Tensor | None]]:
    """The chunks, and for each its tokens and its weights [R, 1]. Reads the counts back."""
    chunks = []
    for expert, count in enumerate(rows_E.tolist()):
        parts = -(-count // CHUNK_ROWS)
        # Of even size: a chunk of a few rows costs as many calls as a full one.
        bounds = [count * part // parts for part in range(parts)] + [count]
        chunks += [(expert, stop - start) for start, stop in itertools.pairwise(bounds) if parts]
    counts = [count for _, count in chunks]
    source_N = pairs_N if top_k == 1 else pairs_N // top_k
    if weights_TK is None:
        return chunks, source_N.split(counts), [None] * len(chunks)
    weights_N1 = pair_weights(weights_TK, pairs_N, x_TD)
    return chunks, source_N.split(counts), weights_N1.split(counts)


def _gather(source_TD: Tensor, index_R: Tensor, out_RD: Tensor) -> Tensor:
    """The rows of `index`, and zeros in what `out` has beyond them."""
    count = len(index_R)
    torch.index_select(source_TD, 0, index_R, out=out_RD[:count])
    if count < len(out_RD):
        out_RD[count:].zero_()
    return out_RD


class _GradientOf:
    """The gradient of stacked weights, summed over chunks; zero for experts without any."""

    def __init__(self, weight_EOI: Tensor, chunks: list[Chunk]) -> None:
        self.total = torch.empty_like(weight_EOI)
        self._of_expert = self.total.unbind()
        for expert in set(range(weight_EOI.shape[0])) - {expert for expert, _ in chunks}:
            self._of_expert[expert].zero_()
        self._started: set[int] = set()

    def add_product(self, expert: int, left: Tensor, right: Tensor) -> None:
        total = self._of_expert[expert]
        if expert in self._started:
            add_product(total, left, right)
        else:
            found = product(left, right, out=total)
            if found is not total:
                total.copy_(found)
            self._started.add(expert)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _activate_into(
    hidden_RH: Tensor, activation: Activation, out_RF: Tensor, silu_RF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The activations, written into `out_RF`, and silu(gate), into `silu_RF` if that is given."""
    if activation == "gelu":
        return torch.ops.aten.gelu.out(hidden_RH, out=out_RF), None
    gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
    silu_RF = out_RF if silu_RF is None else silu_RF
    torch.ops.aten.silu.out(gate_RF, out=silu_RF)
    return torch.mul(silu_RF, up_RF, out=out_RF), silu_RF


def _activation_gradient(
    grad_act_RF: Tensor,
    hidden_RH: Tensor,
    activation: Activation,
    out_RH: Tensor,
    silu_RF: Tensor | None,
) -> Tensor:
    """The gradient of the first product, written into `out_RH`; overwrites `grad_act_RF`."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad_act_RF, hidden_RH, grad_input=out_RH)
    gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
    grad_gate_RF, grad_up_RF = out_RH.chunk(2, dim=-1)
    assert silu_RF is not None
    torch.mul(grad_act_RF, silu_RF, out=grad_up_RF)
    grad_act_RF.mul_(up_RF)
    torch.ops.aten.silu_backward.grad_input(grad_act_RF, gate_RF, grad_input=grad_gate_RF)
    return out_RH


def _refuses_chunked(x_TD: Tensor) -> str | None:
    if x_TD.device.type != "cpu":
        return "chunks fit a CPU's cache; here two grouped products are faster"
    return None


class KernelExpertFeedForward(torch.autograd.Function):
    """Two grouped products by kernels, with no permuted copy of the tokens.

    The first gathers tokens as it loads and applies the activation as it stores; the second scales
    by the pair's weight and stores each row at its pair, so that a token's choices lie side by
    side and are summed in order. The weight's gradient is `<grad act, act>`, which the activation's
    backward has at hand: the experts' outputs are not kept.
    """

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
        activation: Activation,
    ) -> Tensor:
        pairs_N = pairs_N.contiguous()
        flat = None if weights_TK is None else weights_TK.reshape(-1).contiguous()
        code, keep = _CODES[activation], any(ctx.needs_input_grad)
        act_NF, hidden_NH = grouped_rows(
            x_TD, up_EHD, rows_E, pairs_N, None, top_k, True, 0, code, False, keep
        )
        shape = (x_TD.shape[0], top_k)
        out_TD = _summed_rows(act_NF, down_EDF, rows_E, pairs_N, flat, shape, transposed=False)
        ctx.save_for_backward(x_TD, up_EHD, down_EDF, pairs_N, rows_E, flat, hidden_NH)
        ctx.top_k, ctx.code = top_k, code
        ctx.weights = None if weights_TK is None else (weights_TK.shape, weights_TK.dtype)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_EHD, down_EDF, pairs_N, rows_E, flat, hidden_NH = ctx.saved_tensors
        from adaptive.ops.kernels.expert_feed_forward import activation_backward

        top_k = ctx.top_k
        grad_act_NF, _ = grouped_rows(
            grad_TD, down_EDF, rows_E, pairs_N, None, top_k, True, 0, NO_ACTIVATION, True, False
        )
        grad_hidden_NH, grad_flat = activation_backward(
            grad_act_NF, hidden_NH, pairs_N, flat, ctx.code
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
        from adaptive.ops.kernels.permute import sum_pairs

        return sum_pairs(out, pairs_N, None, shape)
    # torch sums low precision in float32.
    return out if top_k == 1 else out.unflatten(0, shape).sum(1)


register("expert_feed_forward", "reference", _composed)
register("expert_feed_forward", "torch", _Chunked.apply, _refuses_chunked)
register("expert_feed_forward", "triton", KernelExpertFeedForward.apply, refuses_triton)
