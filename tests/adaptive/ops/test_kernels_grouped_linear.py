"""The grouped linear and expert feed-forward kernels against a loop over tokens and experts."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive.ops import grouped_linear as op
from adaptive.ops.expert_feed_forward import KernelExpertFeedForward
from adaptive.ops.grouped_linear import KernelGroupedLinear
from adaptive.ops.kernels.grouped_tiles import rows_class
from parallel.flop_formulas import torch_flop_counter
from tests.adaptive.ops.kernel_checks import (
    COMPILED,
    DEVICE,
    DTYPES,
    assert_within_twice_the_reference_error,
    draw,
)

grouped_linear, expert_feed_forward = KernelGroupedLinear.apply, KernelExpertFeedForward.apply

# Rows of each expert: none at all, one, uneven with empty ones, everything to the last.
LOADS = [[0, 0], [1], [3, 0, 37, 17], [0, 0, 40]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", [*LOADS, pytest.param([300, 0, 129, 1], marks=COMPILED)])
def test_every_expert_multiplies_its_own_rows(load: list[int], dtype: torch.dtype) -> None:
    rows = torch.tensor(load, device=DEVICE)
    x, weight = draw(sum(load), 19), draw(len(load), 21, 19, seed=1)

    def loop(x, weight):
        parts = [part @ w.T for part, w in zip(x.split(load), weight, strict=True)]
        return torch.cat(parts)

    assert_within_twice_the_reference_error(
        lambda x, w: grouped_linear(x, w, rows), loop, [x, weight], dtype
    )


def pairs_by_expert(expert_index: torch.Tensor, experts: int, taken: torch.Tensor):
    """(taken pairs expert after expert, rows of each expert)."""
    ids = torch.where(taken, expert_index, experts).flatten()
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=experts + 1)[:experts]
    return order[: int(counts.sum())], counts


def loop_over_tokens(x, up, down, weights, expert_index, taken, activation):
    out = []
    for t, token in enumerate(x):
        total = torch.zeros_like(token)
        for k, expert in enumerate(expert_index[t].tolist()):
            if not taken[t, k]:
                continue
            hidden = up[expert] @ token
            if activation == "swiglu":
                gate, linear = hidden.chunk(2)
                act = F.silu(gate) * linear
            else:
                act = F.gelu(hidden)
            weight = 1 if weights is None else weights[t, k]
            total = total + weight * (down[expert] @ act)
        out.append(total)
    # What no token used takes part with zero, so that each input has a gradient.
    unused = up.sum() + down.sum() + (0 if weights is None else weights.sum())
    return (torch.stack(out) if out else x) + 0 * unused


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "activation", "dtype", "routing"),
    [
        (0, 2, 3, "swiglu", torch.float32, "spread"),
        (1, 1, 1, "swiglu", torch.float32, "spread"),
        (21, 2, 5, "swiglu", torch.float32, "spread"),
        (21, 2, 5, "swiglu", torch.bfloat16, "spread"),
        (21, 1, 4, "gelu", torch.float32, "spread"),
        (19, 2, 3, "swiglu", torch.float32, "one"),
        (19, 3, 4, "gelu", torch.float32, "dropped"),
        (23, 5, 5, "swiglu", torch.float32, "few"),
        (23, 5, 5, "gelu", torch.bfloat16, "few"),
        pytest.param(300, 2, 5, "swiglu", torch.bfloat16, "spread", marks=COMPILED),
        pytest.param(300, 2, 5, "swiglu", torch.float32, "dropped", marks=COMPILED),
    ],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_tokens_go_through_their_experts_and_back(
    tokens, top_k, experts, activation, dtype, routing, weighted
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    expert_index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    taken = torch.ones(tokens, top_k, dtype=torch.bool)
    if routing == "one":
        expert_index = torch.full_like(expert_index, experts - 1)
    if routing == "dropped":
        taken = torch.rand(tokens, top_k, generator=generator) > 0.4
    if routing == "few":
        # As experts that choose: a place for every token and expert, most of them empty.
        taken = torch.rand(tokens, top_k, generator=generator) > 0.8
        assert 0 < taken.sum() * 2 < tokens * top_k
    pairs, rows = (x.to(DEVICE) for x in pairs_by_expert(expert_index, experts, taken))
    width, ffn = 9, 18
    hidden = 2 * ffn if activation == "swiglu" else ffn
    inputs = [
        draw(tokens, width),
        draw(experts, hidden, width, seed=1) / 3,
        draw(experts, width, ffn, seed=2) / 4,
    ]
    inputs += [draw(tokens, top_k, seed=3).sigmoid()] * weighted

    def kernel(x, up, down, weights=None):
        return expert_feed_forward(x, up, down, pairs, rows, weights, top_k, activation)

    def loop(x, up, down, weights=None):
        return loop_over_tokens(x, up, down, weights, expert_index, taken, activation)

    assert_within_twice_the_reference_error(kernel, loop, inputs, dtype)


def test_nothing_is_kept_for_a_backward_that_will_not_come() -> None:
    rows, pairs = torch.tensor([2, 1], device=DEVICE), torch.tensor([0, 2, 1], device=DEVICE)
    x, up, down = draw(3, 4), draw(2, 8, 4), draw(2, 4, 4)
    out = expert_feed_forward(x, up, down, pairs, rows, None, 1, "swiglu")
    tracked = expert_feed_forward(x.requires_grad_(), up, down, pairs, rows, None, 1, "swiglu")
    assert torch.equal(out, tracked)
    assert not out.requires_grad
    assert any(t is not None and t.shape == (3, 8) for t in tracked.grad_fn.saved_tensors)


def test_one_autotuning_serves_a_class_of_shapes() -> None:
    assert rows_class(8 * 1000, 8) == rows_class(8 * 600, 8)
    assert rows_class(8 * 1000, 8) != rows_class(8 * 100, 8)
    assert rows_class(0, 8) == rows_class(3, 8)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "triton")
    x, weight = draw(6, 5).requires_grad_(), draw(2, 4, 5, seed=1).requires_grad_()
    rows = torch.tensor([4, 2], device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = op.grouped_linear(x, weight, rows)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    expected = torch.cat([x[:4] @ weight[0].T, x[4:] @ weight[1].T])
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.02)


def test_torch_counts_the_operations_of_the_kernels() -> None:
    rows = torch.tensor([3, 0, 4], device=DEVICE)
    x, weight = draw(7, 5).requires_grad_(), draw(3, 6, 5, seed=1).requires_grad_()
    with torch_flop_counter(display=False) as counter:
        grouped_linear(x, weight, rows).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 5 * 6


def test_counts_and_pairs_may_be_strided() -> None:
    load = [3, 0, 5]
    spread = torch.tensor([[n, 99] for n in load], device=DEVICE)[:, 0]
    x, weight = draw(8, 6), draw(3, 4, 6, seed=1).requires_grad_()
    out = grouped_linear(x, weight, spread)
    parts = [part @ w.T for part, w in zip(x.split(load), weight, strict=True)]
    torch.testing.assert_close(out, torch.cat(parts))
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    torch.testing.assert_close(gradient[2], x[3:].sum(0).expand(4, -1))


def test_experts_that_choose_allocate_no_place_for_every_token_and_expert() -> None:
    tokens, experts, width = 64, 16, 8
    pairs = (torch.arange(experts) * experts + torch.arange(experts)).to(DEVICE)
    rows = torch.ones(experts, dtype=torch.int64, device=DEVICE)
    x, up, down = draw(tokens, width), draw(experts, 12, width), draw(experts, width, 6)
    leaves = [t.requires_grad_() for t in (x, up, down)]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        out = expert_feed_forward(x, up, down, pairs, rows, None, experts, "swiglu")
        torch.autograd.grad(out.sum(), leaves)
    assert largest < tokens * experts * width


@pytest.mark.parametrize("switch", ["legacy", "newer"])
def test_tf32_is_read_however_it_was_set(switch: str) -> None:
    code = f"""
import torch
from adaptive.ops.kernels.launching import dot_precision
from parallel.flop_formulas import torch_flop_counter
assert dot_precision(torch.float32) == "ieee"
if {switch!r} == "legacy":
    torch.backends.cuda.matmul.allow_tf32 = True
else:
    torch.backends.fp32_precision = "tf32"
assert dot_precision(torch.float32) == "tf32"
assert dot_precision(torch.bfloat16) == "ieee"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
