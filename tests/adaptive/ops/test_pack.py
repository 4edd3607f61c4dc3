"""pack and combine: exact, autograd-correct, bit-preserving."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.ops.pack import combine, pack


@pytest.mark.parametrize("rows", [[], [3], [0, 2, 5], list(range(6))])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_match_finite_differences(rows: list[int], weighted: bool) -> None:
    torch.manual_seed(0)
    indices = torch.tensor(rows, dtype=torch.int64)
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    update = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(rows), dtype=torch.float64, requires_grad=True) if weighted else None
    assert torch.autograd.gradcheck(pack, (hidden, indices))
    assert torch.autograd.gradgradcheck(pack, (hidden, indices))
    assert torch.autograd.gradcheck(combine, (hidden, update, indices, weights))


@settings(max_examples=40)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_combine_is_the_masked_dense_formula_and_leaves_other_rows_bit_for_bit(
    mask: list[bool], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(mask)
    indices = chosen.nonzero().squeeze(1)
    hidden = torch.randn(len(mask), 4, generator=generator) * 1e3
    update = torch.randn(len(indices), 4, generator=generator)
    weights = torch.randn(len(indices), generator=generator)
    out = combine(hidden, update, indices, weights)
    assert torch.equal(out[~chosen], hidden[~chosen])
    expected = hidden[chosen].double() + weights.double()[:, None] * update.double()
    # One float32 rounding of a product and one of a sum of size 1e3.
    torch.testing.assert_close(out[chosen].double(), expected, rtol=2e-7, atol=1e-3)


def test_negative_zero_and_nan_pass_through_unselected_rows() -> None:
    hidden = torch.tensor([[-0.0], [float("nan")], [1.0]])
    out = combine(hidden, torch.ones(1, 1), torch.tensor([2]), torch.ones(1))
    assert torch.equal(out[:2].view(torch.int32), hidden[:2].view(torch.int32))


def test_low_precision_weights_accumulate_their_gradient_in_float32() -> None:
    torch.manual_seed(0)
    update = torch.randn(1, 4096, dtype=torch.bfloat16)
    weights = torch.ones(1, dtype=torch.float32, requires_grad=True)
    hidden = torch.zeros(2, 4096, dtype=torch.bfloat16)
    out = combine(hidden, update, torch.tensor([1]), weights)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, weights, grad)
    expected = (grad[1].double() * update[0].double()).sum()
    assert out.dtype == torch.bfloat16
    assert abs(got.item() - expected.item()) < 1e-3 * expected.abs().item() + 1e-3
