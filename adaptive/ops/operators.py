"""The operators whose kernels multiply matrices: schema, shapes and cost, known without triton.

A FLOP counter made before a kernel is first used must know them, so they are declared when
`adaptive.ops` is imported. Their bodies import the kernels. Operators that multiply nothing are
declared beside their kernels.

Shape legend: N rows, E experts, I contracted width, O output width, A and B widths of the two sides
of a weight's gradient, Q packed queries, T packed keys, H query heads, G key-value heads, h head
width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptive.ops.kernels import SWIGLU
from parallel.flop_formulas import flop_formula


@torch.library.custom_op("adaptive::grouped_rows", mutates_args=())
def grouped_rows(
    a: Tensor,
    weight: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor | None,
    scales: Tensor | None,
    top_k: int,
    gather: bool,
    places: int,
    activation: int,
    transposed: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """`out[place(n)] = scale(n) * act(a[row(n)] @ weight[e]ᵀ)` for every row n of every expert e.

    Args:
        a: [rows, I]. With `gather`, row(n) = pairs[n] // top_k; else n.
        weight: [E, O, I], or [E, I, O] when `transposed`. With SwiGLU the gate half comes first.
        rows_E: int64 [E].
        pairs_N: int64 [N]; None where neither `gather` nor `places` asks for it.
        scales: float, indexed by pairs[n], or None.
        places: rows of the output, row n at pairs[n], zeros where no pair lands; 0: n at n.
        activation: NO_ACTIVATION, SWIGLU or (exact) GELU.
        keep_hidden: also return what came before the activation, [N, O]; else an empty tensor.
    """
    from adaptive.ops.kernels.grouped_linear import launch

    out, hidden = _grouped_outputs(
        a, weight, pairs_N, places=places, activation=activation, transposed=transposed,
        keep_hidden=keep_hidden,
    )  # fmt: skip
    launch(
        a, weight, rows_E, pairs_N, scales, out, hidden, top_k=top_k, gather=gather,
        scatter=places > 0, activation=activation, transposed=transposed, keep_hidden=keep_hidden,
    )  # fmt: skip
    return out, hidden


@grouped_rows.register_fake
def _(
    a: Tensor,
    weight: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor | None,
    scales: Tensor | None,
    top_k: int,
    gather: bool,
    places: int,
    activation: int,
    transposed: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    return _grouped_outputs(
        a, weight, pairs_N, places=places, activation=activation, transposed=transposed,
        keep_hidden=keep_hidden,
    )  # fmt: skip


def _grouped_outputs(
    a: Tensor,
    weight: Tensor,
    pairs_N: Tensor | None,
    *,
    places: int,
    activation: int,
    transposed: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    rows = a.shape[0] if pairs_N is None else pairs_N.shape[0]
    hidden_width = weight.shape[2 if transposed else 1]
    out_width = hidden_width // 2 if activation == SWIGLU else hidden_width
    hidden = a.new_empty(rows if keep_hidden else 0, hidden_width)
    return a.new_empty(places or rows, out_width), hidden


@flop_formula(torch.ops.adaptive.grouped_rows)
def _of_grouped_rows(
    a: list[int],
    weight: list[int],
    rows_E: list[int],
    pairs_N: list[int] | None,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * (a if pairs_N is None else pairs_N)[0] * weight[1] * weight[2]


@torch.library.custom_op("adaptive::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(
    a: Tensor,
    b: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor | None,
    top_k: int,
    gather_a: bool,
    gather_b: bool,
) -> Tensor:
    """[E, A, B]: `Σ a[row(n)] ⊗ b[row(n)]` over the rows n of each expert.

    Rows are those of `grouped_rows`: pairs[n] // top_k on a side that is gathered, else n.
    """
    from adaptive.ops.kernels.grouped_weight_gradient import launch

    out = a.new_empty(rows_E.shape[0], a.shape[1], b.shape[1])
    launch(a, b, rows_E, pairs_N, out, top_k=top_k, gather_a=gather_a, gather_b=gather_b)
    return out


@grouped_weight_gradient.register_fake
def _(
    a: Tensor,
    b: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor | None,
    top_k: int,
    gather_a: bool,
    gather_b: bool,
) -> Tensor:
    return a.new_empty(rows_E.shape[0], a.shape[1], b.shape[1])


@flop_formula(torch.ops.adaptive.grouped_weight_gradient)
def _of_weight_gradient(
    a: list[int], b: list[int], rows_E: list[int], pairs_N: list[int] | None, *_: Any, **__: Any
) -> int:
    return 2 * (a if pairs_N is None else pairs_N)[0] * a[1] * b[1]


@torch.library.custom_op("adaptive::varlen_attention", mutates_args=())
def attention_forward(
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    max_queries: int,
    max_keys: int,
    causal: int,
    part: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [Q, H, h] and log-sum-exp float32 [H, Q] (-inf where a query sees no key).

    `part`: the output will be merged with that of other keys, and is float32.
    """
    from adaptive.ops.kernels.varlen_attention import launch

    out, lse_HQ = _attention_outputs(q_QHh, part)
    launch(
        q_QHh, k_TGh, v_TGh, out, lse_HQ, q_starts, k_starts, q_positions, k_positions,
        max_queries=max_queries, max_keys=max_keys, causal=causal,
    )  # fmt: skip
    return out, lse_HQ


@attention_forward.register_fake
def _(
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    max_queries: int,
    max_keys: int,
    causal: int,
    part: bool = False,
) -> tuple[Tensor, Tensor]:
    return _attention_outputs(q_QHh, part)


def _attention_outputs(q_QHh: Tensor, part: bool) -> tuple[Tensor, Tensor]:
    queries, heads, _ = q_QHh.shape
    dtype = torch.float32 if part else q_QHh.dtype
    out = q_QHh.new_empty(q_QHh.shape, dtype=dtype)
    return out, q_QHh.new_empty(heads, queries, dtype=torch.float32)


@torch.library.custom_op("adaptive::varlen_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    out: Tensor | None,
    lse_HQ: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    max_queries: int,
    max_keys: int,
    causal: int,
    delta_HQ: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Of a part, where `lse` is that of all keys: `out` is None, `delta` (the sum of out times its
    gradient, float32 [H, Q]) is of all keys too, and the gradients, to be summed, are float32.
    """
    from adaptive.ops.kernels.varlen_attention_backward import launch

    grads = _attention_gradients(q_QHh, k_TGh, v_TGh, part=delta_HQ is not None)
    launch(
        grad_out, grad_lse, q_QHh, k_TGh, v_TGh, out, lse_HQ, grads, q_starts, k_starts,
        q_positions, k_positions, max_queries=max_queries, max_keys=max_keys, causal=causal,
        delta_HQ=delta_HQ,
    )  # fmt: skip
    return grads


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    out: Tensor | None,
    lse_HQ: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    max_queries: int,
    max_keys: int,
    causal: int,
    delta_HQ: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_gradients(q_QHh, k_TGh, v_TGh, part=delta_HQ is not None)


def _attention_gradients(*tensors: Tensor, part: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if part else tensors[0].dtype
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=dtype) for x in tensors)
    return grad_q, grad_k, grad_v


def _square(q_QHh: Tensor, q_starts: Tensor, k_starts: Tensor) -> int:
    """Operations of one product, causal or not, as torch counts attention. Reads lengths back."""
    pairs = (q_starts.diff().long() * k_starts.diff()).sum().item()
    return 2 * int(pairs) * q_QHh.shape[1] * q_QHh.shape[2]


@flop_formula(torch.ops.adaptive.varlen_attention, raw=True)
def _of_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * _square(q, q_starts, k_starts)


@flop_formula(torch.ops.adaptive.varlen_attention_backward, raw=True)
def _of_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    return 5 * _square(q, q_starts, k_starts)
