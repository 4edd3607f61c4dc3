"""varlen attention against a float64 softmax written out, one query at a time."""

import pytest
import torch
from torch import Tensor

from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: TokenLayout,
    keys: TokenLayout,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """softmax(q·k / √h) v over the keys of the same sequence at earlier or equal positions."""
    window = 10**9 if window is None else window
    group = q.shape[1] // k.shape[1]
    q_ids, k_ids = queries.sequence_ids.tolist(), keys.sequence_ids.tolist()
    q_at, k_at = queries.positions.tolist(), keys.positions.tolist()
    out = []
    for i in range(q.shape[0]):
        seen = [
            j
            for j in range(k.shape[0])
            if k_ids[j] == q_ids[i] and (not causal or q_at[i] - window < k_at[j] <= q_at[i])
        ]
        heads = []
        for head in range(q.shape[1]):
            if not seen:
                heads.append(q[i, head] * 0)
                continue
            scores = k[seen, head // group] @ q[i, head] / q.shape[-1] ** 0.5
            heads.append(torch.softmax(scores, 0) @ v[seen, head // group])
        out.append(torch.stack(heads))
    return torch.stack(out) if out else q


@pytest.mark.parametrize("lengths", [[5, 5], [1, 7, 3], [0, 4], [3]])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 3)])
def test_self_attention_of_packed_sequences(
    lengths: list[int], causal: bool, window: int | None
) -> None:
    torch.manual_seed(0)
    layout = TokenLayout.from_lengths(lengths)
    tokens = sum(lengths)
    q = torch.randn(tokens, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(tokens, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = varlen_attention(q, k, v, queries=layout, causal=causal, window=window)
    expected = written_out(q, k, v, layout, layout, causal, window)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("taken", [[0, 3, 5, 6], [], [1], list(range(9))])
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys_follow_original_positions(taken: list[int], causal: bool) -> None:
    torch.manual_seed(0)
    keys = TokenLayout.from_lengths([4, 5])
    chosen = torch.zeros(9, dtype=torch.bool)
    chosen[taken] = True
    starts = [0, int(chosen[:4].sum()), int(chosen.sum())]
    indices = torch.tensor(taken, dtype=torch.int64)
    queries = keys.take(indices, torch.tensor(starts, dtype=torch.int32), max(starts))
    q = torch.randn(len(taken), 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = varlen_attention(q, k, v, queries=queries, keys=keys, causal=causal)
    expected = written_out(q, k, v, queries, keys, causal)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, (q, k, v), grad)
    if taken:
        theirs = torch.autograd.grad(expected, (q, k, v), grad)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert all(not g.any() for g in ours)


@pytest.mark.parametrize("window", [None, 40])
def test_many_queries_cross_chunk_borders_and_may_precede_every_key(window: int | None) -> None:
    torch.manual_seed(0)
    queries = TokenLayout.from_lengths([150])
    # Keys of every third place from 5 on, in any order: a cache need not be sorted.
    places = torch.arange(5, 150, 3)
    places = places[torch.randperm(len(places))]
    keys = TokenLayout(torch.tensor([0, len(places)], dtype=torch.int32), len(places), places)
    q = torch.randn(150, 1, 2, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(len(places), 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    got = varlen_attention(q, k, v, queries=queries, keys=keys, window=window)
    behind = torch.arange(150)[:, None] - places[None]
    scores = (q[:, 0] @ k[:, 0].T / 2**0.5).masked_fill(
        (behind < 0) | (behind >= (window or 150)), -torch.inf
    )
    expected = scores[5:].softmax(-1) @ v[:, 0]
    torch.testing.assert_close(got[5:, 0], expected)
    assert not got[:5].any()
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, (q, k, v), grad[5:, 0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_that_are_no_multiple_are_refused() -> None:
    layout = TokenLayout.from_lengths([2])
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match="heads=3: must be a multiple of key-value heads 2"):
        varlen_attention(q, k, k, queries=layout)
