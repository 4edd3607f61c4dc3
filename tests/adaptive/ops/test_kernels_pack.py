"""The pack, combine, permute and unpermute kernels against their definitions."""

import pytest
import torch

from adaptive.ops.kernels.pack import combine, combine_, pack
from adaptive.ops.kernels.permute import permute, unpermute
from adaptive.ops.pack import combine_ as op_combine_
from tests.adaptive.ops.kernel_checks import (
    COMPILED,
    DEVICE,
    DTYPES,
    assert_within_twice_the_reference_error,
    draw,
)

# (tokens, chosen, width): nothing, one, no multiple of any block, more than one column block.
SIZES = [
    (0, 0, 8),
    (3, 0, 5),
    (1, 1, 1),
    (37, 11, 33),
    (70, 70, 16),
    (5, 3, 4100),
    pytest.param(3000, 1700, 1024, marks=COMPILED),
]


def chosen_rows(tokens: int, chosen: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    order = torch.randperm(tokens, generator=generator)[:chosen]
    return order.sort().values.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "chosen", "width"), SIZES)
def test_pack_gathers_rows_and_returns_their_gradients(tokens, chosen, width, dtype) -> None:
    index = chosen_rows(tokens, chosen)
    hidden = draw(tokens, width, dtype=dtype)
    assert torch.equal(pack(hidden, index), hidden[index])
    assert_within_twice_the_reference_error(
        lambda x: pack(x, index), lambda x: x[index], [hidden], dtype
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "chosen", "width"), SIZES)
def test_combine_adds_weighted_updates(tokens, chosen, width, dtype, weighted) -> None:
    index = chosen_rows(tokens, chosen)
    inputs = [draw(tokens, width), draw(chosen, width, seed=1)]
    inputs += [draw(chosen, seed=2)] * weighted

    def reference(hidden, update, weights=None):
        added = update if weights is None else update * weights[:, None]
        return hidden.index_add(0, index, added)

    def kernel(hidden, update, weights=None):
        return combine(hidden, update, index, weights)

    assert_within_twice_the_reference_error(kernel, reference, inputs, dtype)
    in_place = combine_(inputs[0].clone(), inputs[1], index, inputs[2] if weighted else None)
    assert torch.equal(in_place, kernel(*inputs))


def test_rows_that_were_not_chosen_keep_every_bit() -> None:
    odd = torch.tensor([[-0.0, 0.0], [float("inf"), float("nan")], [1.0, 2.0]], device=DEVICE)
    out = combine(odd, torch.ones(1, 2, device=DEVICE), torch.tensor([2], device=DEVICE))
    assert torch.equal(out[:2].view(torch.int32), odd[:2].view(torch.int32))
    assert out[2].tolist() == [2.0, 3.0]


IN_PLACE = pytest.mark.parametrize("combine_", [combine_, op_combine_])


@IN_PLACE
def test_combine_in_place_writes_the_residual_and_keeps_gradients(combine_) -> None:
    index = chosen_rows(9, 4)
    leaf, update = draw(9, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    hidden = leaf * 2
    out = combine_(hidden, update, index)
    assert out.data_ptr() == hidden.data_ptr()
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert torch.equal(update.grad, torch.ones_like(update))


@IN_PLACE
def test_combine_in_place_refuses_to_destroy_what_a_gradient_needs(combine_) -> None:
    hidden = draw(9, 6).requires_grad_() * 1
    loss = (hidden * hidden).sum()
    combine_(hidden, draw(4, 6), chosen_rows(9, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pack_has_a_second_derivative() -> None:
    index = chosen_rows(6, 3)
    x = draw(6, 4).requires_grad_()
    (first,) = torch.autograd.grad((pack(x, index) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    expected = torch.zeros_like(x).index_copy(0, index, 6 * x.detach()[index])
    torch.testing.assert_close(second, expected)


def pairs_by_expert(tokens: int, top_k: int, experts: int, one: bool = False) -> torch.Tensor:
    """Pairs `token * top_k + choice`, expert after expert."""
    generator = torch.Generator().manual_seed(tokens + top_k)
    ids = torch.randint(experts, (tokens * top_k,), generator=generator)
    if one:
        ids.fill_(experts - 1)
    return ids.argsort(stable=True).to(DEVICE)


def sum_of_pairs(rows, pairs, weights, tokens: int, top_k: int) -> torch.Tensor:
    if weights is not None:
        rows = rows * weights.flatten()[pairs][:, None]
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, pairs // top_k, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "taken", "one"),
    [(0, 2, 0, False), (1, 1, 1, False), (19, 3, 57, False), (19, 2, 38, True), (19, 2, 25, False)],
)
def test_permute_and_unpermute_are_a_weighted_top_k_sum(tokens, top_k, taken, one, dtype) -> None:
    pairs = pairs_by_expert(tokens, top_k, 5, one)[:taken]
    hidden, weights = draw(tokens, 33), draw(tokens, top_k, seed=3)
    assert_within_twice_the_reference_error(
        lambda x: permute(x, pairs, top_k), lambda x: x[pairs // top_k], [hidden], dtype
    )
    rows = draw(taken, 33, seed=4)
    assert_within_twice_the_reference_error(
        lambda y, w: unpermute(y, pairs, w, (tokens, top_k)),
        lambda y, w: sum_of_pairs(y, pairs, w, tokens, top_k),
        [rows, weights],
        dtype,
    )
    assert_within_twice_the_reference_error(
        lambda y: unpermute(y, pairs, None, (tokens, top_k)),
        lambda y: sum_of_pairs(y, pairs, None, tokens, top_k),
        [rows],
        dtype,
    )


def test_pairs_not_taken_add_nothing_and_get_no_gradient() -> None:
    pairs = torch.tensor([0, 5, 4], device=DEVICE)
    rows, weights = draw(3, 5).requires_grad_(), draw(3, 2).requires_grad_()
    out = unpermute(rows, pairs, weights, (3, 2))
    assert torch.equal(out[1], torch.zeros(5, device=DEVICE))
    torch.testing.assert_close(out[0], rows[0] * weights[0, 0])
    out.sum().backward()
    assert torch.equal(weights.grad.flatten()[1:4], torch.zeros(3, device=DEVICE))


def test_combine_in_place_takes_any_strides() -> None:
    hidden, update = draw(8, 5).t().contiguous().t(), draw(3, 5)
    assert hidden.stride(1) != 1
    expected = hidden.clone()
    index = chosen_rows(8, 3)
    expected[index] += update
    got = combine_(hidden, update, index)
    assert got.data_ptr() == hidden.data_ptr()
    torch.testing.assert_close(hidden, expected)
