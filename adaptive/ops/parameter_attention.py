"""Attention of tokens to parameter tokens: `Θ(x Kᵀ) V`, the product inside Pattention.

Shape legend: T tokens, D input width, N parameter tokens (those of this tensor rank), O output
width, K chosen parameter tokens, R rows of one block of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import (
    choose,
    refuses_triton,
    register,
    warn_once,
)
from adaptive.ops.parameter_weights import (
    THETA,
    ZERO_NORM,
    Activation,
    GroupSum,
    group_size,
    maximum_over,
    statistic_dtype,
)
from adaptive.routing.recompute import decide
from parallel.autocast import computing_dtype, without_autocast
from parallel.draws import first_of_batch
from parallel.linear import add_product, product, uses_onednn

# Scores of one block, in numbers a thread: 1 MiB of float32 stays in a core's second-level cache.
_CACHED_NUMBERS = 1 << 18
# Rows of one span, a matrix product at near full speed whose result is still in the last cache.
_SPAN_ROWS, _SAVING_ROWS, _GPU_FACTOR = 1024, 512, 8
# Rows that one seed of dropout serves; blocks are multiples, so every block size drops the same.
_SEEDED_ROWS = 64


@dataclass(frozen=True)
class _Options:
    """What a call asks for, beside its tensors. Fields as in `parameter_attention`.

    `first` is the number of the first row in a batch that is drawn for as a whole, else None.
    """

    activation: Activation
    top_k: int | None
    dropout: float
    seed: int
    shard: int
    save_memory: bool
    group: dist.ProcessGroup | None
    first: int | None


def parameter_attention(
    x_TD: Tensor,
    key_tokens_ND: Tensor,
    value_tokens_NO: Tensor,
    *,
    scale: Tensor | float,
    activation: Activation = "l2_norm_gelu",
    top_k: int | None = None,
    dropout: float = 0.0,
    save_memory: bool = False,
    group: dist.ProcessGroup | None = None,
    shard: int = 0,
) -> Tensor:
    """Weigh parameter values by how parameter keys score each token: `Θ(x Kᵀ) V`.

    With scores `a = x Kᵀ` (no 1/√D) and c = `scale`, the weights Θ(a) are
    `gelu(c a / ‖a‖₂)` ("l2_norm_gelu", the paper's), `c gelu(a) / ‖gelu(a)‖₂` ("gelu_l2_norm") or
    `c softmax(a)` ("softmax"); GeLU is the exact one. A row of scores that is zero throughout has
    no direction: its output is zero and so are its gradients.

    Cost: scores of T x N numbers are kept for the backward, as two linear layers of the same
    sizes keep what is between them. With `save_memory`, and where no gradient is asked for,
    scores exist for 512 tokens at a time only (4,096 on a GPU), and the backward computes them a
    second time: 7 matrix products instead of 6.

    Args:
        x_TD: [tokens, in], float.
        key_tokens_ND: [parameter tokens, in].
        value_tokens_NO: [parameter tokens, out].
        scale: c above, a number or a 0-dimensional tensor; no gradient. √N for the norms and 1
            for softmax are the usual ones. Growth must not change it.
        activation: Θ.
        top_k: only the `top_k` parameter tokens with the largest |Θ(a)| of each token take part;
            None: all. The norm spans all of them either way. `top_k = N` is the dense product.
        dropout: share of the weights zeroed, the others scaled up; 0 at evaluation.
        save_memory: see above. Has no effect on what `top_k` keeps.
        group: tensor ranks that hold the other parameter tokens. The norm then spans all of them,
            and each rank returns its part of the sum.
        shard: number of these tokens' shard, where ranks that are seeded alike share sequences:
            each draws a dropout of its own.

    Returns:
        [tokens, out] in the dtype of `x`.

    Raises:
        ValueError: for an unknown activation, or `top_k` beyond the number of parameter tokens.

    Source: TokenFormer, arXiv 2410.23168, section 3.2 and equation 9.
    """
    if activation not in THETA:
        raise ValueError(f"activation={activation!r}: must be one of {', '.join(THETA)}")
    total = key_tokens_ND.shape[0] * group_size(group)
    if top_k is not None and not 1 <= top_k <= total:
        raise ValueError(f"top_k={top_k}: must be between 1 and the {total} parameter tokens")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")
    dtype = computing_dtype(x_TD)
    x_TD, key_tokens_ND = x_TD.to(dtype), key_tokens_ND.to(dtype)
    value_tokens_NO = value_tokens_NO.to(dtype)
    seed = decide(lambda: int(torch.randint(2**31, (), device="cpu"))) if dropout else 0
    first = first_of_batch(x_TD.shape[0])
    # Without a backward there is nothing to keep scores for.
    save_memory = save_memory or not torch.is_grad_enabled()
    options = _Options(activation, top_k, dropout, seed, shard, save_memory, group, first)
    function = choose("parameter_attention", x_TD).function
    with without_autocast(x_TD.device.type):
        return function(x_TD, key_tokens_ND, value_tokens_NO, scale, options)


def _reference(
    x_TD: Tensor,
    key_tokens_ND: Tensor,
    value_tokens_NO: Tensor,
    scale: Tensor | float,
    options: _Options,
) -> Tensor:
    """The definition, differentiated by autograd."""
    scores_TN = x_TD @ key_tokens_ND.t()
    weights_TN = _reference_weights(scores_TN, scale, options)
    if options.dropout:
        weights_TN = weights_TN * _keep_mask(weights_TN, 0, options)
    if options.top_k is None:
        return weights_TN @ value_tokens_NO
    top_TK, chosen_TK = decide(lambda: _largest(weights_TN, options))
    top_weights_TK = weights_TN.gather(1, top_TK) * chosen_TK
    return F.embedding_bag(top_TK, value_tokens_NO, per_sample_weights=top_weights_TK, mode="sum")


def _reference_weights(scores_TN: Tensor, scale: Tensor | float, options: _Options) -> Tensor:
    if options.activation == "softmax":
        # Any shift leaves softmax unchanged, so the largest score needs no gradient.
        largest_T1 = maximum_over(scores_TN.detach().amax(1, keepdim=True), options.group)
        exponentials_TN = (scores_TN - largest_T1).exp()
        total_T1 = GroupSum.apply(exponentials_TN.sum(1, keepdim=True), options.group)
        return exponentials_TN * (scale / total_T1)
    norm_first = options.activation == "l2_norm_gelu"
    values_TN = scores_TN if norm_first else F.gelu(scores_TN)
    values_TN = values_TN.to(statistic_dtype(values_TN))
    squared_T1 = GroupSum.apply(values_TN.square().sum(1, keepdim=True), options.group)
    directed_T1 = squared_T1 > ZERO_NORM**2
    # Replaced before the root: its derivative at zero is infinite, and infinity times 0 is NaN.
    norm_T1 = torch.where(directed_T1, squared_T1, 1).sqrt()
    normed_TN = values_TN * torch.where(directed_T1, scale / norm_T1, 0)
    normed_TN = normed_TN.to(scores_TN.dtype)
    return F.gelu(normed_TN) if norm_first else normed_TN


def _largest(weights_TN: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Places int64 [T, K] of the largest |weights|, and 1 where they are among the largest of all.

    Under tensor parallelism the choice is global: a rank looks at its own best and at the best of
    the others, and a place counts when its rank in that order, ties by rank, is below `top_k`.
    """
    assert options.top_k is not None
    local = min(options.top_k, weights_TN.shape[1])
    best_TK, places_TK = weights_TN.abs().topk(local, dim=1)
    if group_size(options.group) == 1:
        return places_TK, torch.ones_like(best_TK)
    parts = [torch.empty_like(best_TK) for _ in range(group_size(options.group))]
    dist.all_gather(parts, best_TK.contiguous(), group=options.group)
    order = torch.cat(parts, 1).argsort(dim=1, descending=True, stable=True)
    winners = torch.zeros_like(order, dtype=best_TK.dtype)
    winners.scatter_(1, order[:, : options.top_k], 1)
    first = dist.get_rank(options.group) * local
    return places_TK, winners[:, first : first + local]


class _Blocked(torch.autograd.Function):
    """The same in closed form: a span of tokens a matrix product, a cached block elementwise."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, keys_ND: Tensor, values_NO: Tensor, scale: Tensor, options: _Options
    ) -> Tensor:
        tokens, width = x_TD.shape[0], keys_ND.shape[0]
        theta = THETA[options.activation]
        span, rows = _block_sizes(x_TD, width, options)
        kept = None if options.save_memory else product(x_TD, keys_ND.t())
        statistic_T1 = x_TD.new_empty(tokens, 1, dtype=statistic_dtype(x_TD))
        out_TO = x_TD.new_empty(tokens, values_NO.shape[1])
        buffer = x_TD.new_empty(min(span, tokens), width)
        scores = None if kept is not None or uses_onednn(x_TD) else torch.empty_like(buffer)
        for first, last in _stretches(0, tokens, span):
            scores_SN = _scores(x_TD, keys_ND, kept, scores, first, last)
            weights_SN = buffer[: last - first]
            for start, end in _stretches(first, last, rows):
                own = slice(start - first, end - first)
                statistic_R1 = theta.statistic(
                    scores_SN[own], weights_SN[own], scale, options.group
                )
                statistic_T1[start:end] = statistic_R1
                theta.prepare(scores_SN[own], statistic_R1, scale)
                theta.weights(scores_SN[own], statistic_R1, weights_SN[own])
                _drop(weights_SN[own], start, options)
            _product_into(out_TO[first:last], weights_SN, values_NO)
            del scores_SN
        ctx.save_for_backward(x_TD, keys_ND, values_NO, scale, kept, statistic_T1)
        ctx.options, ctx.sizes = options, (span, rows)
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, keys_ND, values_NO, scale, kept, statistic_T1 = ctx.saved_tensors
        options, (span, rows) = ctx.options, ctx.sizes
        theta = THETA[options.activation]
        tokens, width = x_TD.shape[0], keys_ND.shape[0]
        grad_TO = grad_TO.contiguous()
        grad_x_TD, grad_keys_ND, grad_values_NO = (
            torch.empty_like(leaf) if needed else None
            for leaf, needed in zip((x_TD, keys_ND, values_NO), ctx.needs_input_grad, strict=False)
        )
        buffer = x_TD.new_empty(min(span, tokens), width)
        scratch = x_TD.new_empty(min(rows, tokens), width)
        scores = None if kept is not None or uses_onednn(x_TD) else torch.empty_like(buffer)
        for first, last in _stretches(0, tokens, span):
            prepared_SN = _scores(x_TD, keys_ND, kept, scores, first, last)
            if kept is None:
                theta.prepare(prepared_SN, statistic_T1[first:last], scale)
            # One buffer: weights until the values have their gradient, gradients after that.
            buffer_SN, grad_SO = buffer[: last - first], grad_TO[first:last]
            blocks = [
                (start, slice(start - first, end - first), statistic_T1[start:end])
                for start, end in _stretches(first, last, rows)
            ]
            if grad_values_NO is not None:
                for start, own, statistic_R1 in blocks:
                    theta.weights(prepared_SN[own], statistic_R1, buffer_SN[own])
                    _drop(buffer_SN[own], start, options)
                _accumulate(grad_values_NO, buffer_SN.t(), grad_SO, fresh=first == 0)
            if grad_x_TD is None and grad_keys_ND is None:
                continue
            grad_SN = product(grad_SO, values_NO.t(), out=buffer_SN)
            for start, own, statistic_R1 in blocks:
                grad_RN = grad_SN[own]
                _drop(grad_RN, start, options)
                scratch_RN = scratch[: grad_RN.shape[0]]
                theta.backward(
                    grad_RN, prepared_SN[own], statistic_R1, scratch_RN, scale, options.group
                )
            if grad_keys_ND is not None:
                _accumulate(grad_keys_ND, grad_SN.t(), x_TD[first:last], fresh=first == 0)
            if grad_x_TD is not None:
                _product_into(grad_x_TD[first:last], grad_SN, keys_ND)
            # What a library allocated itself is free before the next span asks for as much.
            del prepared_SN, buffer_SN, grad_SN, grad_RN
        if tokens == 0:
            for grad in (grad_keys_ND, grad_values_NO):
                if grad is not None:
                    grad.zero_()
        return grad_x_TD, grad_keys_ND, grad_values_NO, None, None


def _blocked(
    x_TD: Tensor,
    key_tokens_ND: Tensor,
    value_tokens_NO: Tensor,
    scale: Tensor | float,
    options: _Options,
) -> Tensor:
    if options.top_k is not None:
        return _reference(x_TD, key_tokens_ND, value_tokens_NO, scale, options)
    if not isinstance(scale, Tensor):
        # `as_tensor` would copy from the host and wait.
        scale = torch.full((), scale, dtype=torch.float64, device=x_TD.device)
    scale = scale.to(x_TD.device, torch.float64)
    return _Blocked.apply(x_TD, key_tokens_ND, value_tokens_NO, scale, options)


def _scores(
    x_TD: Tensor,
    keys_ND: Tensor,
    kept: Tensor | None,
    buffer: Tensor | None,
    first: int,
    last: int,
) -> Tensor:
    """Scores of a span of tokens: those kept of all tokens, or computed, into a given buffer."""
    if kept is not None:
        return kept[first:last]
    out_SN = None if buffer is None else buffer[: last - first]
    return product(x_TD[first:last], keys_ND.t(), out=out_SN)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    if fresh:
        _product_into(total, left, right)
    else:
        add_product(total, left, right)


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    found = product(left, right, out=out)
    if found is not out:
        out.copy_(found)


def _stretches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive pieces of at most `size`."""
    for start in range(first, last, size):
        yield start, min(start + size, last)


def _drop(weights_RN: Tensor, start: int, options: _Options) -> None:
    """Dropout in place, of weights or of their gradient."""
    if options.dropout:
        weights_RN.mul_(_keep_mask(weights_RN, start, options))


def _keep_mask(weights_RN: Tensor, start: int, options: _Options) -> Tensor:
    """What dropout multiplies the rows from `start` on by; the same at every call."""
    # Other tensor ranks hold other parameter tokens, so they drop others.
    rank = dist.get_rank(options.group) if group_size(options.group) > 1 else 0
    generator = torch.Generator(weights_RN.device)
    mask_RN = torch.empty_like(weights_RN)
    if options.first is not None:
        return _part_of_mask(mask_RN, options.first + start, rank, generator, options)
    for at in range(0, mask_RN.shape[0], _SEEDED_ROWS):
        generator.manual_seed(_mixed(options.seed, options.shard, rank, start + at))
        mask_RN[at : at + _SEEDED_ROWS].bernoulli_(1 - options.dropout, generator=generator)
    return mask_RN.div_(1 - options.dropout)


def _part_of_mask(
    mask_RN: Tensor, first: int, rank: int, generator: torch.Generator, options: _Options
) -> Tensor:
    """The rows from `first` on, and this rank's columns, of a mask for everybody's."""
    rows, width = mask_RN.shape
    total = width * group_size(options.group)
    for at in range(first - first % _SEEDED_ROWS, first + rows, _SEEDED_ROWS):
        generator.manual_seed(_mixed(options.seed, options.shard, 0, at))
        drawn_SN = mask_RN.new_empty(_SEEDED_ROWS, total)
        drawn_SN.bernoulli_(1 - options.dropout, generator=generator)
        begin, end = max(at, first), min(at + _SEEDED_ROWS, first + rows)
        own_RN = drawn_SN[begin - at : end - at, rank * width : (rank + 1) * width]
        mask_RN[begin - first : end - first] = own_RN
    return mask_RN.div_(1 - options.dropout)


def _mixed(*numbers: int) -> int:
    """A seed that any change of any number changes in all bits: a CPU's generator takes 32 of them.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def _block_sizes(x_TD: Tensor, width: int, options: _Options) -> tuple[int, int]:
    """Rows of a span (one matrix product) and of a block (elementwise) in it."""
    on_cpu = x_TD.device.type == "cpu"
    span = _SAVING_ROWS if options.save_memory else _SPAN_ROWS
    if not on_cpu:
        # A GPU's launches are dearer than its cache misses.
        span *= _GPU_FACTOR
    if group_size(options.group) > 1:
        # One collective a span: all tokens in one where their scores are kept anyway.
        span = span if options.save_memory else max(x_TD.shape[0], 1)
    if not on_cpu or group_size(options.group) > 1:
        return span, span
    numbers = _CACHED_NUMBERS * torch.get_num_threads()
    stretches = numbers // max(width, 1) // _SEEDED_ROWS
    return span, min(span, max(1, stretches) * _SEEDED_ROWS)


def _kernel(
    x_TD: Tensor,
    key_tokens_ND: Tensor,
    value_tokens_NO: Tensor,
    scale: Tensor | float,
    options: _Options,
) -> Tensor:
    """Always in blocks of tokens: `save_memory` changes nothing."""
    if options.top_k is not None or options.dropout or options.activation == "softmax":
        reason = "the kernel has neither top_k, dropout nor softmax"
        warn_once("parameter_attention", "triton", reason)
        return _blocked(x_TD, key_tokens_ND, value_tokens_NO, scale, options)
    from adaptive.ops.kernels.parameter_attention import parameter_attention as kernel

    return kernel(
        x_TD,
        key_tokens_ND,
        value_tokens_NO,
        scale=scale,
        activation=options.activation,
        group=options.group,
    )


register("parameter_attention", "reference", _reference)
register("parameter_attention", "torch", _blocked)
register("parameter_attention", "triton", _kernel, refuses_triton)
