"""Matchings against their definitions written out token by token, and the traps of public code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adaptive import Grouping, TokenLayout
from adaptive.ops.merge import merge
from adaptive.routing.merging import adjacent, amount_of, bsm, mctf, pitome, random_pairs, tomesd

LENGTHS = [12, 0, 7, 1, 12]
RAGGED = TokenLayout.from_lengths(LENGTHS)


def metric(tokens: int, seed: int = 0, width: int = 5) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def cosine(m: Tensor, i: int, j: int) -> float:
    return float(torch.nn.functional.cosine_similarity(m[i].double(), m[j].double(), dim=0))


def groups_of(grouping: Grouping) -> list[set[int]]:
    members: dict[int, set[int]] = {}
    for token, group in enumerate(grouping.group.tolist()):
        members.setdefault(group, set()).add(token)
    return [members[group] for group in sorted(members)]


def from_pairs(tokens: int, pairs: list[tuple[int, int]]) -> list[set[int]]:
    """The groups when each (source, place) of one sequence merges, in order of their places."""
    gone = {source for source, _ in pairs}
    return [{t} | {s for s, place in pairs if place == t} for t in range(tokens) if t not in gone]


def bsm_pairs(m: Tensor, r: int) -> list[tuple[int, int]]:
    n = len(m)
    best = {}
    for a in range(0, n, 2):
        if n > 1:
            b = max(range(1, n, 2), key=lambda b: cosine(m, a, b))
            best[a] = (cosine(m, a, b), b)
    ranked = sorted(best, key=lambda a: -best[a][0])[:r]
    return [(a, best[a][1]) for a in ranked]


def pitome_pairs(m: Tensor, r: int, margin: float, form: str) -> list[tuple[int, int]]:
    n = len(m)

    def f(x: float) -> float:
        if form == "text":
            sigma = 1 - margin
            return math.exp(-0.5 * ((1 - x) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return x if x >= margin else math.exp(x - margin) - 1

    energy = [sum(f(cosine(m, i, j)) for j in range(n)) / n for i in range(n)]
    order = sorted(range(n), key=lambda i: -energy[i])[: 2 * r]
    a, b = (order[0::2], order[1::2]) if form == "image" else (order[:r], order[r:])
    return [(i, max(b, key=lambda j: cosine(m, i, j))) for i in a]


CASES: dict[str, tuple[Callable[..., Grouping], Callable[[Tensor, int], list]]] = {
    "bsm": (lambda m, layout, r: bsm(m, layout, amount=r), bsm_pairs),
    "pitome image": (
        lambda m, layout, r: pitome(m, layout, amount=r, margin=0.45),
        lambda m, r: pitome_pairs(m, r, 0.45, "image"),
    ),
    "pitome text": (
        lambda m, layout, r: pitome(m, layout, amount=r, margin=0.6, form="text"),
        lambda m, r: pitome_pairs(m, r, 0.6, "text"),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("amount", [0, 1, 3, 0.25, 0.5])
def test_matching_is_the_definition(name: str, amount: float) -> None:
    function, definition = CASES[name]
    m, expected, start = metric(RAGGED.tokens), [], 0
    for length in LENGTHS:
        r = min(amount_of(amount, length), length // 2)
        part = from_pairs(length, definition(m[start : start + length], r))
        expected += [{start + i for i in group} for group in part]
        start += length
    ragged = function(m, RAGGED, amount)
    assert groups_of(ragged) == expected
    assert ragged.sizes.sum() == RAGGED.tokens
    # The same sequences in a batch of one length, and each alone.
    both = torch.cat([m[:12], m[-12:]])
    uniform = function(both, TokenLayout.dense(2, 12), amount)
    alone = [groups_of(function(x, TokenLayout.dense(1, 12), amount)) for x in both.split(12)]
    assert groups_of(uniform) == alone[0] + [{i + 12 for i in group} for group in alone[1]]


def every_kind(m: Tensor, layout: TokenLayout) -> dict[str, Grouping]:
    ones = torch.ones(len(m))
    draws = torch.rand(len(m), generator=torch.Generator().manual_seed(3))
    return {
        "bsm": bsm(m, layout, amount=0.4),
        "bsm threshold": bsm(m, layout, threshold=0.3),
        "pitome": pitome(m, layout, amount=0.4, margin=0.5),
        "adjacent": adjacent(m, layout, amount=0.4),
        "adjacent threshold": adjacent(m, layout, threshold=0.0),
        "mctf": mctf(m, layout, amount=0.4, attention_T=draws + 0.1),
        "random": random_pairs(m, layout, ones, amount=0.4, draws_T=draws),
    }


@pytest.mark.parametrize("layout", [RAGGED, TokenLayout.dense(2, 16)], ids=["ragged", "uniform"])
def test_order_is_kept_and_nobody_is_lost(layout: TokenLayout) -> None:
    # The trap: ToMe returns unmerged tokens by similarity, then the others.
    for name, grouping in every_kind(metric(layout.tokens), layout).items():
        assert grouping.sizes.sum() == layout.tokens, name
        assert int(grouping.cu_seqlens[-1]) == grouping.groups < layout.tokens, name
        starts = grouping.cu_seqlens.tolist()
        for first, last in itertools.pairwise(starts):
            positions = grouping.positions[first:last]
            assert torch.equal(positions, positions.sort().values), name
        # A group stands where one of its members does: nobody merged into a token that is gone.
        for group, members in enumerate(groups_of(grouping)):
            assert int(grouping.positions[group]) in layout.positions[sorted(members)], name
        # Tokens of different sequences never meet.
        group_sequence = torch.repeat_interleave(
            torch.arange(layout.batch_size), grouping.cu_seqlens.diff().long()
        )
        assert torch.equal(group_sequence[grouping.group], layout.sequence_ids), name


def test_protected_tokens_neither_merge_nor_receive() -> None:
    layout = TokenLayout.dense(2, 10)
    m = metric(20)
    protected = torch.zeros(20, dtype=torch.bool)
    protected[[0, 3, 10, 19]] = True  # not only the first: the trap of ToMe's class token
    draws = torch.rand(20)
    for name, grouping in {
        "bsm": bsm(m, layout, amount=5, protected_T=protected),
        "threshold": bsm(m, layout, threshold=-1.0, protected_T=protected),
        "pitome": pitome(m, layout, amount=5, margin=0.5, protected_T=protected),
        "adjacent": adjacent(m, layout, amount=9, protected_T=protected),
        "mctf": mctf(m, layout, amount=5, attention_T=draws + 0.1, protected_T=protected),
        "random": random_pairs(m, layout, amount=5, draws_T=draws, protected_T=protected),
    }.items():
        assert (grouping.sizes[grouping.group[protected]] == 1).all(), name
        assert grouping.groups < 20, name


def test_all_but_one_protected_leaves_everything_alone() -> None:
    protected = torch.ones(6, dtype=torch.bool)
    protected[2] = False
    layout, m = TokenLayout.dense(1, 6), metric(6)
    assert bsm(m, layout, amount=3, protected_T=protected).groups == 6
    assert pitome(m, layout, amount=3, margin=0.5, protected_T=protected).groups == 6
    assert mctf(m, layout, amount=3, attention_T=torch.ones(6), protected_T=protected).groups == 6


def test_adjacent_runs_stand_at_their_last_and_do_not_look_ahead() -> None:
    m = metric(16, seed=5)
    layout = TokenLayout.dense(1, 16)
    grouping = adjacent(m, layout, threshold=0.0)
    expected, run = [], [0]
    for i in range(1, 16):
        if cosine(m, i - 1, i) >= 0:
            run.append(i)
        else:
            expected.append(set(run))
            run = [i]
    assert groups_of(grouping) == [*expected, set(run)]
    assert grouping.positions.tolist() == [max(group) for group in groups_of(grouping)]
    changed = m.clone()
    changed[9:] = metric(7, seed=6)
    later = adjacent(changed, layout, threshold=0.0)
    # Runs that ended before the change are as they were.
    closed = [group for group in groups_of(grouping) if max(group) < 8]
    assert groups_of(later)[: len(closed)] == closed


def test_tomesd_merges_into_one_token_of_each_cell() -> None:
    grid, batch = (4, 6), 2
    m = metric(48, seed=2)
    cells = torch.randint(0, 4, (1, 6), generator=torch.Generator().manual_seed(1))
    grouping = tomesd(m, TokenLayout.dense(batch, 24), grid=grid, amount=18, cells_BC=cells)
    # All 18 others of a sample merge: what remains is one token a cell, the same in both samples.
    expected = []
    for cell, inside in enumerate(cells[0].tolist()):
        row, column = cell // 3 * 2 + inside // 2, cell % 3 * 2 + inside % 2
        expected.append(row * 6 + column)
    assert grouping.positions.tolist() == sorted(expected) * batch
    for token, group in enumerate(grouping.group.tolist()):
        if token < 24 and token not in expected:
            best = max(expected, key=lambda place: cosine(m, token, place))
            assert grouping.positions[group] == best
    with pytest.raises(ValueError, match=r"grid=\[3, 8\]: must be multiples of the cell \[2, 2\]"):
        tomesd(m, TokenLayout.dense(batch, 24), grid=(3, 8), amount=2)


def test_mctf_counts_members_by_size_times_attention() -> None:
    layout, m = TokenLayout.dense(1, 8), metric(8, seed=4)
    attention, sizes = torch.rand(8) + 0.1, torch.tensor([1.0, 2, 1, 3, 1, 1, 5, 1])
    grouping = mctf(m, layout, sizes, attention_T=attention, amount=3)
    assert grouping.groups == 5
    x = torch.randn(8, 3)
    merged = merge(x, sizes, grouping)
    for group, members in enumerate(groups_of(grouping)):
        share = torch.stack([sizes[i] * attention[i] for i in sorted(members)])
        rows = torch.stack([x[i] for i in sorted(members)])
        expected = (share[:, None] * rows).sum(0) / share.sum()
        torch.testing.assert_close(merged[group], expected)
    assert grouping.sizes.sum() == sizes.sum()


def test_a_choice_has_no_gradient() -> None:
    m = metric(12).requires_grad_()
    grouping = bsm(m, TokenLayout.dense(1, 12), amount=4)
    assert not grouping.sizes.requires_grad
    assert merge(m, None, grouping).requires_grad


def test_amounts_are_counts_or_shares() -> None:
    assert amount_of(3, 10) == 3
    assert amount_of(0.3, 10) == 3  # 0.3 · 10 is 2.999… in binary
    for wrong in (-1, 1.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="amount="):
            amount_of(wrong, 10)
    with pytest.raises(ValueError, match="amount and threshold: give at least one"):
        bsm(metric(4), TokenLayout.dense(1, 4))
