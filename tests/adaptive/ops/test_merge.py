"""merge and unmerge against sums written out in float64, and attention with a bias a key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adaptive import TokenLayout
from adaptive.ops.merge import merge, unmerge
from adaptive.ops.varlen_attention import varlen_attention, with_key_bias
from adaptive.routing.grouping import Grouping
from adaptive.routing.selection import Selection

LAYOUT = TokenLayout.from_lengths([5, 0, 9, 3])


def grouping_of(targets: list[int], sizes: Tensor | None = None) -> Grouping:
    return Grouping.from_targets(torch.tensor(targets), LAYOUT, sizes)


# Sequence 0: tokens 0 and 3, 1 and 2, 4 dropped. Sequence 2: all nine into its last one.
TARGETS = [3, 1, 1, 3, -1, *[13] * 9, 14, 15, 16]


def test_groups_are_numbered_by_representative_and_sizes_add_up() -> None:
    grouping = grouping_of(TARGETS, torch.arange(1.0, 18))
    assert grouping.group.tolist() == [1, 0, 0, 1, -1, *[2] * 9, 3, 4, 5]
    assert grouping.positions.tolist() == [1, 3, 8, 0, 1, 2]
    assert grouping.cu_seqlens.tolist() == [0, 2, 2, 3, 6]
    assert grouping.sizes.tolist() == [5.0, 5.0, 90.0, 15.0, 16.0, 17.0]
    assert grouping.layout.max_seqlen == 3
    # Every token that is not dropped is counted once.
    assert grouping.sizes.sum() == sum(range(1, 18)) - 5


def by_hand(x: Tensor, size: Tensor, weights: Tensor, group: Tensor, groups: int) -> Tensor:
    rows = []
    for g in range(groups):
        members = [i for i in range(len(group)) if int(group[i]) == g]
        share = [size[i] * weights[i] for i in members]
        rows.append(sum(s * x[i] for s, i in zip(share, members, strict=True)) / sum(share))
    return torch.stack(rows)


def test_merge_is_the_mean_by_size_with_exact_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(17, generator=generator, dtype=torch.float64).add(0.1).requires_grad_()
    size = torch.randint(1, 9, (17,), generator=generator).double()
    plain = grouping_of(TARGETS, size)
    grouping = Grouping(plain.group, plain.sizes, plain.cu_seqlens, plain.positions, 3, weights)
    merged = merge(x, size, grouping)
    expected = by_hand(x, size, weights, grouping.group, 6)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-14)
    grad = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(merged, (x, weights), grad)
    theirs = torch.autograd.grad(expected, (x, weights), grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert ours[0][4].abs().sum() == 0  # the dropped token
    assert torch.autograd.gradcheck(lambda x: merge(x, size, grouping), (x,))
    assert torch.autograd.gradcheck(
        lambda y: unmerge(y, grouping), (merged.detach().requires_grad_(),)
    )


def test_unmerge_gives_every_token_its_groups_row() -> None:
    grouping = grouping_of(TARGETS)
    rows = torch.arange(6.0)[:, None].add(1).requires_grad_()
    tokens = unmerge(rows, grouping)
    assert tokens.flatten().tolist() == [2, 1, 1, 2, 0, *[3] * 9, 4, 5, 6]
    (grad,) = torch.autograd.grad(tokens.sum(), rows)
    assert grad.flatten().tolist() == [2, 2, 9, 1, 1, 1]


def test_unmerge_of_merged_equal_tokens_is_the_identity() -> None:
    grouping = grouping_of([3, 1, 1, 3, 4, *[13] * 9, 14, 15, 16])
    x = torch.randn(6 + 1, 8)[grouping.group]
    # A mean of nine equal numbers may round; of one or two it cannot.
    back = unmerge(merge(x, None, grouping), grouping)
    torch.testing.assert_close(back, x, rtol=3e-7, atol=0)
    pairs = grouping_of([1, 1, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 13, 15, 15, 16])
    x = torch.randn(17, 8)[pairs.group]
    assert torch.equal(unmerge(merge(x, None, pairs), pairs), x)


def test_composed_means_are_right_only_with_sizes() -> None:
    x = torch.randn(17, 4, dtype=torch.float64)
    first = grouping_of([0, 0, 0, 3, 3, *range(5, 17)])
    once = merge(x, None, first)
    layout = first.layout
    second = Grouping.from_targets(
        torch.tensor([0, 0, *range(2, first.groups)]), layout, first.sizes.double()
    )
    both = first.then(second)
    twice = merge(once, first.sizes, second)
    torch.testing.assert_close(twice, merge(x, None, both), rtol=0, atol=1e-14)
    assert torch.equal(both.sizes[:2], torch.tensor([5.0, 1.0]))
    assert (merge(once, None, second)[0] - twice[0]).abs().max() > 1e-2  # the trap


def test_runs_take_their_first_or_last_members_position() -> None:
    starts = torch.zeros(17, dtype=torch.bool)
    starts[[2, 8, 9]] = True
    first = Grouping.from_starts(starts, LAYOUT)
    last = Grouping.from_starts(starts, LAYOUT, representative="last")
    assert (
        first.group.tolist()
        == last.group.tolist()
        == [0] * 2 + [1] * 3 + [2] * 3 + [3] + [4] * 5 + [5] * 3
    )
    assert first.positions.tolist() == [0, 2, 0, 3, 4, 0]
    assert last.positions.tolist() == [1, 4, 2, 3, 8, 2]


def test_a_selection_is_a_grouping_of_single_tokens() -> None:
    chosen = torch.zeros(17, dtype=torch.bool)
    chosen[[1, 4, 5, 16]] = True
    selection = Selection.from_mask(chosen, LAYOUT)
    grouping = Grouping.of_selection(selection, 17)
    x = torch.randn(17, 3)
    assert torch.equal(merge(x, None, grouping), x[selection.indices])
    assert torch.equal(unmerge(merge(x, None, grouping), grouping), x * chosen[:, None])


def test_nothing_to_merge() -> None:
    empty = TokenLayout.from_lengths([0, 0])
    grouping = Grouping.from_targets(torch.zeros(0, dtype=torch.int64), empty)
    x = torch.zeros(0, 4, requires_grad=True)
    merged = merge(x, None, grouping)
    assert merged.shape == (0, 4)
    unmerge(merged, grouping).sum().backward()
    assert x.grad is not None
    whole = Grouping.whole(LAYOUT)
    x = torch.randn(17, 4)
    assert torch.equal(merge(x, whole.sizes, whole), x)


def test_sums_of_16_bits_are_taken_in_32() -> None:
    x = torch.full((2049, 1), 1.0)
    x[0] = 300.0
    grouping = Grouping.from_targets(
        torch.zeros(2049, dtype=torch.int64), TokenLayout.from_lengths([2049])
    )
    mean = merge(x.bfloat16(), None, grouping)
    assert mean.dtype == torch.bfloat16
    assert abs(float(mean) - float(x.mean())) < 0.005


def test_wrong_sizes_are_one_line() -> None:
    grouping = grouping_of(TARGETS)
    with pytest.raises(ValueError, match="x of 3 tokens: must be of 17"):
        merge(torch.zeros(3, 2), None, grouping)
    with pytest.raises(ValueError, match="y of 17 groups: must be of 6"):
        unmerge(torch.zeros(17, 2), grouping)


# ---- attention with a bias a key


def dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], bias: Tensor, causal: bool
) -> Tensor:
    out, start, group = [], 0, q.shape[1] // k.shape[1]
    for n in lengths:
        rows = slice(start, start + n)
        keys, values = (x[rows].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhc,khc->hqk", q[rows], keys) / math.sqrt(q.shape[2])
        scores = scores + bias[rows]
        if causal:
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        out.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), values))
        start += n
    return torch.cat(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("given_keys", [True, False])
def test_a_bias_a_key_is_added_to_the_scores(causal: bool, given_keys: bool) -> None:
    lengths = [5, 9, 3]
    layout = TokenLayout.from_lengths(lengths)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(17, heads, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    bias = torch.randn(17, generator=generator, dtype=torch.float64, requires_grad=True)
    keys = layout if given_keys else None
    ours = varlen_attention(q, k, v, queries=layout, keys=keys, causal=causal, key_bias=bias)
    theirs = dense(q, k, v, lengths, bias, causal)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-15)
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    inputs = (q, k, v, bias)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-14)


def test_attention_to_duplicates_is_attention_to_one_of_their_size() -> None:
    sizes = torch.tensor([3, 1, 4, 2])
    q = torch.randn(4, 2, 8, dtype=torch.float64)
    k, v = torch.randn(2, 4, 2, 8, dtype=torch.float64)
    layout, many = TokenLayout.from_lengths([4]), TokenLayout.from_lengths([10])
    copies = torch.repeat_interleave(torch.arange(4), sizes)
    every = varlen_attention(q, k[copies], v[copies], queries=layout, keys=many, causal=False)
    merged = varlen_attention(q, k, v, queries=layout, causal=False, key_bias=sizes.double().log())
    torch.testing.assert_close(merged, every, rtol=0, atol=1e-14)
    without = varlen_attention(q, k, v, queries=layout, causal=False)
    assert (without - every).abs().max() > 1e-2  # the trap


def test_16_bits_hold_a_bias_in_two_columns() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(64, 2, 8).bfloat16() for _ in range(3))
    bias = torch.arange(1.0, 65).log()
    layout = TokenLayout.from_lengths([64])
    exact = dense(q.double(), k.double(), v.double(), [64], bias.double(), False)
    two = varlen_attention(
        q.float(), k.float(), v.float(), queries=layout, causal=False, key_bias=bias
    )
    torch.testing.assert_close(two.double(), exact, rtol=0, atol=1e-6)
    # The bias as the scores have it, read back from the widened keys.
    _, wide, _ = with_key_bias(q, k, v, bias)
    assert (wide[:, 0, 8:10].float().sum(-1) - bias).abs().max() < 3e-5
    assert (wide[:, 0, 8].float() - bias).abs().max() > 5e-3


def test_a_bias_of_another_shape_is_one_line() -> None:
    x = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match=r"key_bias of shape \[3\]: must be \[4\], one a key"):
        varlen_attention(x, x, x, queries=TokenLayout.from_lengths([4]), key_bias=torch.zeros(3))
