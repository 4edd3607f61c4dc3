"""The kernel of group_sum against its definition."""

import pytest
import torch

from adaptive.ops import merge as op
from adaptive.ops.kernels.merge import group_sum
from tests.adaptive.ops.kernel_checks import (
    COMPILED,
    DEVICE,
    DTYPES,
    assert_within_twice_the_reference_error,
    draw,
)

# (tokens, groups, width): nothing, one group of all, empty groups, several blocks of columns.
SIZES = [
    (0, 0, 8),
    (0, 3, 5),
    (7, 1, 1),
    (37, 11, 33),
    (12, 12, 300),
    pytest.param(3000, 1700, 1024, marks=COMPILED),
]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "groups", "width"), SIZES)
def test_groups_are_summed_with_their_shares(tokens, groups, width, dtype, weighted) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # One number more than there are groups: dropped.
    group = torch.randint(0, groups + 1, (tokens,), generator=generator).to(DEVICE)
    ordered, order = group.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(groups + 1, device=DEVICE))
    share = torch.rand(tokens, generator=generator).to(DEVICE) if weighted else None

    def by_definition(x):
        rows = x if share is None else x * share.to(x.dtype)[:, None]
        return x.new_zeros(groups + 1, width).index_add(0, group, rows)[:groups]

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return group_sum(x, share, order, starts)

        @staticmethod
        def backward(ctx, grad):
            kept = (group < groups).to(grad.dtype)[:, None]
            grad = torch.cat([grad, grad.new_zeros(1, width)])[group] * kept
            return grad if share is None else grad * share.to(grad.dtype)[:, None]

    rows = draw(tokens, width, dtype=dtype)
    assert_within_twice_the_reference_error(Sum.apply, by_definition, [rows], dtype)


def test_merge_runs_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "triton")
    x = draw(9, 4).requires_grad_()
    group = torch.tensor([0, 0, 2, -1, 1, 2, 2, 1, 0], device=DEVICE)
    boundaries = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    grouping = op.Grouping(group, draw(3).abs(), boundaries, torch.arange(3, device=DEVICE), 3)
    ours = op.merge(x, None, grouping)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    monkeypatch.setenv("ADAPTIVE_BACKEND", "reference")
    torch.testing.assert_close(ours, op.merge(x, None, grouping))
    assert grad[3].abs().sum() == 0
