"""Expert feed-forwards, permutation and grouped products against loops over tokens and experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptive.ops.expert_feed_forward as module
from adaptive.ops.expert_feed_forward import expert_feed_forward
from adaptive.ops.grouped_linear import _Loop, _torch_grouped, grouped_linear
from adaptive.ops.permute import permute, unpermute
from adaptive.routing.assignment import Assignment

TOKENS, WIDTH, HIDDEN, EXPERTS = 11, 6, 5, 4


def inputs(activation: str = "swiglu", *, top_k: int = 2, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    up_rows = 2 * HIDDEN if activation == "swiglu" else HIDDEN
    # Expert 3 gets nothing.
    index_TK = torch.rand(TOKENS, EXPERTS - 1).topk(top_k, -1).indices
    return {
        "x": torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True),
        "up": torch.randn(EXPERTS, up_rows, WIDTH, dtype=torch.float64, requires_grad=True),
        "down": torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=torch.float64, requires_grad=True),
        "weights": torch.rand(TOKENS, top_k, dtype=torch.float64, requires_grad=True),
        "index": index_TK,
    }


def token_by_token(given: dict[str, Any], activation: str, taken_TK: Tensor) -> Tensor:
    rows = []
    for t, x in enumerate(given["x"]):
        total = torch.zeros(WIDTH, dtype=x.dtype)
        for k, e in enumerate(given["index"][t].tolist()):
            if not taken_TK[t, k]:
                continue
            hidden = given["up"][e] @ x
            if activation == "swiglu":
                gate, up = hidden[:HIDDEN], hidden[HIDDEN:]
                hidden = gate * torch.sigmoid(gate) * up
            else:
                hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            total = total + given["weights"][t, k] * (given["down"][e] @ hidden)
        rows.append(total)
    return torch.stack(rows)


def computed(given: dict[str, Any], activation: str, taken_TK: Tensor | None) -> Tensor:
    assignment = Assignment.from_choices(given["index"], EXPERTS, taken_TK=taken_TK)
    return expert_feed_forward(
        given["x"],
        given["up"],
        given["down"],
        pairs_N=assignment.pairs,
        rows_per_expert_E=assignment.tokens_per_expert,
        weights_TK=given["weights"],
        top_k=given["index"].shape[1],
        activation=activation,
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("share_taken", [1.0, 0.5, 0.0])
def test_output_and_every_gradient_equal_a_loop_over_tokens(
    monkeypatch: pytest.MonkeyPatch, backend: str, activation: str, share_taken: float
) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", backend)
    monkeypatch.setattr(module, "CHUNK_ROWS", 3)  # several chunks an expert
    given = inputs(activation)
    taken_TK = torch.rand(TOKENS, 2) < share_taken
    out = computed(given, activation, None if share_taken == 1 else taken_TK)
    expected = token_by_token(given, activation, taken_TK)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    names = ["x", "up", "down", "weights"]
    if share_taken == 0:  # autograd leaves what was never used without a gradient
        expected = expected + 0 * sum(given[name].sum() for name in names)
    leaves = [given[name] for name in names]
    got = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for name, a, b in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_experts_without_tokens_get_zero_gradients_not_none(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", backend)
    given = inputs()
    computed(given, "swiglu", torch.zeros(TOKENS, 2, dtype=torch.bool)).sum().backward()
    for name in ("x", "up", "down", "weights"):
        assert torch.count_nonzero(given[name].grad) == 0, name


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_rows_that_round_a_shape_up_change_nothing(
    monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "torch")
    # 11 tokens: no expert's rows are a multiple of 16, and what memory held before is not a number.
    monkeypatch.setattr(module, "rounded_rows", lambda rows, _: -(-rows // 16) * 16)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    )
    given = inputs(activation)
    out = computed(given, activation, None)
    expected = token_by_token(given, activation, torch.ones(TOKENS, 2, dtype=torch.bool))
    torch.testing.assert_close(out, expected)
    leaves = [given[name] for name in ("x", "up", "down", "weights")]
    got = torch.autograd.grad(out.pow(2).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(expected.pow(2).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [("up", "down"), ("x", "weights")])
def test_frozen_inputs_cost_no_gradient(frozen: tuple[str, ...]) -> None:
    given = inputs()
    everything = computed(given, "swiglu", None)
    leaves = [n for n in ("x", "up", "down", "weights") if n not in frozen]
    wanted = torch.autograd.grad(everything.pow(2).sum(), [given[n] for n in leaves])
    for name in frozen:
        given[name].requires_grad_(False)
    got = torch.autograd.grad(
        computed(given, "swiglu", None).pow(2).sum(), [given[n] for n in leaves]
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_without_weights_pairs_are_summed() -> None:
    given = inputs()
    assignment = Assignment.from_choices(given["index"], EXPERTS)
    arguments = {"pairs_N": assignment.pairs, "rows_per_expert_E": assignment.tokens_per_expert}
    out = expert_feed_forward(given["x"], given["up"], given["down"], top_k=2, **arguments)
    given["weights"] = torch.ones(TOKENS, 2, dtype=torch.float64)
    torch.testing.assert_close(out, computed(given, "swiglu", None))


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_unpermute_undoes_permute(tokens: int, top_k: int, seed: int, some: bool) -> None:
    torch.manual_seed(seed)
    index = torch.rand(tokens, 4).topk(top_k, -1).indices
    taken = torch.rand(tokens, top_k) < 0.5 if some else None
    assignment = Assignment.from_choices(index, 4, taken_TK=taken)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    back = unpermute(permute(x, assignment.pairs, top_k), assignment.pairs, None, (tokens, top_k))
    times = torch.full((tokens,), top_k) if taken is None else taken.sum(1)
    torch.testing.assert_close(back, x * times[:, None])
    back.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, times[:, None].expand_as(x).double())


@pytest.mark.parametrize("function", [grouped_linear, _torch_grouped])
@pytest.mark.parametrize("rows", [[3, 0, 4], [0, 0, 0], [7, 0, 0]])
def test_grouped_linear_is_a_linear_layer_an_expert(function: Any, rows: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(rows)
    if function is _torch_grouped and total == 0:
        pytest.skip("grouped_mm of no rows: the block never asks a GPU for it")
    x = torch.randn(total, 8, requires_grad=True)
    weight = torch.randn(3, 4, 8, requires_grad=True)
    y = function(x, weight, torch.tensor(rows))
    pieces = [F.linear(a, w) for a, w in zip(x.split(rows), weight, strict=True)]
    expected = torch.cat(pieces)
    torch.testing.assert_close(y, expected)
    # y.sum() hands an expanded gradient back, which grouped_mm itself refuses.
    got = torch.autograd.grad(y.sum(), (x, weight))
    wanted = torch.autograd.grad(expected.sum(), (x, weight))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [permute, unpermute, expert_feed_forward])
def test_gradients_are_right_to_second_order_rounding(function: Any) -> None:
    given = inputs(top_k=2)
    assignment = Assignment.from_choices(given["index"], EXPERTS)
    pairs = assignment.pairs
    if function is permute:
        assert torch.autograd.gradcheck(lambda x: permute(x, pairs, 2), given["x"])
    elif function is unpermute:
        y = torch.randn(pairs.shape[0], WIDTH, dtype=torch.float64, requires_grad=True)
        shape = (TOKENS, 2)
        assert torch.autograd.gradcheck(
            lambda y, w: unpermute(y, pairs, w, shape), (y, given["weights"])
        )
    else:
        leaves = ("x", "up", "down", "weights")
        assert torch.autograd.gradcheck(
            lambda *values: computed(
                dict(zip(leaves, values, strict=True), index=given["index"]), "swiglu", None
            ),
            tuple(given[name] for name in leaves),
        )


def test_unknown_activation_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"activation='relu': must be one of swiglu, gelu"):
        computed(inputs(), "relu", None)


@pytest.mark.parametrize(("width", "out"), [(64, 36), (36, 64), (64, 100)])
def test_widths_that_grouped_mm_refuses_are_looped_over(
    width: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTIVE_BACKEND", raising=False)  # the kernel would take them
    torch.manual_seed(0)
    rows = torch.tensor([3, 0, 5])
    x = torch.randn(8, width).bfloat16().requires_grad_()
    weight = torch.randn(3, out, width).bfloat16().requires_grad_()
    grads = []
    for function in (_torch_grouped, _Loop.apply):
        y = function(x, weight, rows)
        grads.append([y, *torch.autograd.grad(y.float().square().sum(), (x, weight))])
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


def test_autocast_computes_in_its_dtype_on_every_backend() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 12, requires_grad=True), torch.randn(3, 7, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, torch.tensor([3, 0, 5]))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
