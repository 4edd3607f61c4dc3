"""pack_norm against the norms written out."""

import pytest
import torch

from adaptive.ops.kernels.pack_norm import pack_norm
from adaptive.ops.pack_norm import pack_norm as op
from tests.adaptive.ops.kernel_checks import (
    DEVICE,
    DTYPES,
    assert_within_twice_the_reference_error,
    draw,
)


def formula(hidden, index, weight, eps, centered):
    packed = hidden[index]
    rows = packed - packed.mean(1, keepdim=True) if centered else packed
    normed = rows / (rows.square().mean(1, keepdim=True) + eps).sqrt()
    return packed, normed if weight is None else normed * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "chosen", "width"), [(3, 0, 5), (1, 1, 3), (37, 11, 33)])
def test_rows_leave_packed_and_normed(tokens, chosen, width, weighted, centered, dtype) -> None:
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
    index = order[:chosen].sort().values.to(DEVICE)
    inputs = [draw(tokens, width)] + [draw(width, seed=1)] * weighted

    def kernel(hidden, weight=None):
        return pack_norm(hidden, index, weight, 1e-2, centered)

    def plain(hidden, weight=None):
        return formula(hidden, index, weight, 1e-2, centered)

    assert_within_twice_the_reference_error(kernel, plain, inputs, dtype)


@pytest.mark.parametrize("centered", [True, False])
def test_the_reference_is_the_same_formula(centered: bool) -> None:
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 4, 8])
    got = op(hidden, index, weight, eps=1e-2, centered=centered)
    for mine, expected in zip(got, formula(hidden, index, weight, 1e-2, centered), strict=True):
        torch.testing.assert_close(mine, expected)
    torch.autograd.gradcheck(
        lambda h, w: op(h, index, w, eps=1e-2, centered=centered), (hidden, weight)
    )
