"""The varlen attention kernels against softmax attention written out over a full mask."""

import math

import pytest
import torch
import triton
import triton.language as tl

from adaptive.ops.kernels import varlen_attention as forward
from adaptive.ops.kernels import varlen_attention_backward as backward
from adaptive.ops.kernels.varlen_visibility import block_grid, sequence_of
from adaptive.ops.varlen_attention import attention_with_lse
from adaptive.routing.layout import TokenLayout
from parallel.flop_formulas import torch_flop_counter
from tests.adaptive.ops.kernel_checks import (
    COMPILED,
    DEVICE,
    DTYPES,
    assert_within_twice_the_reference_error,
    draw,
)


def self_attention(q, k, v, *, layout, causal):
    return attention_with_lse(q, k, v, queries=layout, causal=causal)[0]


def cross_attention(q, k, v, *, queries, keys, causal):
    return attention_with_lse(q, k, v, queries=queries, keys=keys, causal=causal)[0]


@pytest.fixture(autouse=True)
def small_interpreted_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a sequence at sizes that the interpreter can bear."""
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    for kernels in (forward, backward):
        monkeypatch.setattr(kernels, "interpreted_blocks", lambda *_: blocks)


def dense_attention(q, k, v, allowed):
    """(out, log-sum-exp) with `allowed` [Q, T]; a query without a key gets zeros and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~allowed, -torch.inf)
    sees = allowed.any(1)
    # Rows without a key are computed on zeros, so that no gradient is NaN, and then replaced.
    safe = scores.masked_fill(~sees[None, :, None], 0)
    out = torch.einsum("hqt,thd->qhd", safe.softmax(-1), v)
    out = torch.where(sees[:, None, None], out, 0)
    return out, torch.where(sees, safe.logsumexp(-1), -torch.inf)


def pairs_of(queries: TokenLayout, keys: TokenLayout, causal: bool, by_position: bool):
    allowed = queries.sequence_ids[:, None] == keys.sequence_ids[None, :]
    if causal and by_position:
        allowed = allowed & (keys.positions[None, :] <= queries.positions[:, None])
    elif causal:
        allowed = allowed & torch.ones_like(allowed).tril()
    return allowed


def packed(lengths: list[int]) -> TokenLayout:
    return TokenLayout.from_lengths(lengths, device=DEVICE)


def some_of(lengths: list[int], kept: list[int]) -> TokenLayout:
    """`kept` tokens of each sequence, drawn at random, in order, with their positions."""
    generator = torch.Generator().manual_seed(sum(kept))
    chosen = [
        torch.randperm(n, generator=generator)[:k].sort().values
        for n, k in zip(lengths, kept, strict=True)
    ]
    part = TokenLayout.from_lengths(kept, device=DEVICE)
    return TokenLayout(part.cu_seqlens, part.max_seqlen, torch.cat(chosen).to(DEVICE))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "dtype"),
    [
        ([0], 1, 1, 8, torch.float32),
        ([1], 2, 1, 5, torch.float32),
        ([37, 0, 1, 18], 4, 2, 20, torch.float32),
        ([21, 35], 2, 2, 16, torch.bfloat16),
        pytest.param([300, 0, 1, 257], 4, 2, 64, torch.float32, marks=COMPILED),
        pytest.param([300, 0, 1, 257], 4, 2, 64, torch.bfloat16, marks=COMPILED),
        pytest.param([520, 130], 8, 2, 128, torch.bfloat16, marks=COMPILED),
        pytest.param([260], 2, 1, 256, torch.bfloat16, marks=COMPILED),
    ],
)
def test_attention_of_a_pack_to_itself(lengths, heads, kv_heads, head_dim, dtype, causal) -> None:
    layout = packed(lengths)
    q = draw(layout.tokens, heads, head_dim)
    k, v = (draw(layout.tokens, kv_heads, head_dim, seed=s) for s in (1, 2))
    allowed = pairs_of(layout, layout, causal, False)
    assert_within_twice_the_reference_error(
        lambda q, k, v: self_attention(q, k, v, layout=layout, causal=causal),
        lambda q, k, v: dense_attention(q, k, v, allowed)[0],
        [q, k, v],
        dtype,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "kept", "dtype"),
    [
        ([5], [0], torch.float32),
        ([1], [1], torch.float32),
        ([0, 40], [0, 19], torch.float32),
        ([33, 7, 50], [11, 0, 50], torch.float32),
        ([33, 20], [17, 3], torch.bfloat16),
        pytest.param([400, 70], [190, 33], torch.float32, marks=COMPILED),
        pytest.param([700, 0, 300], [350, 0, 290], torch.bfloat16, marks=COMPILED),
    ],
)
def test_fewer_queries_than_keys_are_causal_by_position(lengths, kept, dtype, causal) -> None:
    keys, queries = packed(lengths), some_of(lengths, kept)
    q = draw(queries.tokens, 4, 12)
    k, v = (draw(keys.tokens, 2, 12, seed=s) for s in (1, 2))
    allowed = pairs_of(queries, keys, causal, True)
    assert_within_twice_the_reference_error(
        lambda q, k, v: cross_attention(q, k, v, queries=queries, keys=keys, causal=causal),
        lambda q, k, v: dense_attention(q, k, v, allowed)[0],
        [q, k, v],
        dtype,
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's blocks are what they are")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries_block", "keys_block"), [(32, 16), (16, 64)])
def test_blocks_of_any_shape_meet_at_the_same_masks(
    queries_block: int, keys_block: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks(*_: object) -> dict[str, int]:
        return {"BLOCK_M": queries_block, "BLOCK_N": keys_block, "num_warps": 4, "num_stages": 1}

    monkeypatch.setattr(forward, "forward_blocks", blocks)
    monkeypatch.setattr(backward, "query_blocks", blocks)
    monkeypatch.setattr(backward, "key_blocks", blocks)
    for keys, queries in (
        (packed([70, 0, 13]), None),
        (packed([70, 5]), some_of([70, 5], [31, 2])),
    ):
        asked = keys if queries is None else queries
        q = draw(asked.tokens, 2, 8)
        k, v = (draw(keys.tokens, 1, 8, seed=s) for s in (1, 2))
        allowed = pairs_of(asked, keys, causal, queries is not None)
        context = None if queries is None else keys
        assert_within_twice_the_reference_error(
            lambda q, k, v, asked=asked, context=context: attention_with_lse(
                q, k, v, queries=asked, keys=context, causal=causal
            )[0],
            lambda q, k, v, allowed=allowed: dense_attention(q, k, v, allowed)[0],
            [q, k, v],
            torch.float32,
        )


def test_positions_may_come_in_any_order_and_leave_a_query_without_a_key() -> None:
    keys, queries = packed([45]), packed([23])
    shuffled = torch.randperm(45, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 3
    at = torch.arange(23, device=DEVICE).flip(0) * 2
    keys = TokenLayout(keys.cu_seqlens, 45, shuffled)
    queries = TokenLayout(queries.cu_seqlens, 23, at)
    allowed = pairs_of(queries, keys, True, True)
    assert not allowed.any(1).all()
    q, k, v = draw(23, 2, 8), draw(45, 1, 8, seed=1), draw(45, 1, 8, seed=2)
    assert_within_twice_the_reference_error(
        lambda q, k, v: cross_attention(q, k, v, queries=queries, keys=keys, causal=True),
        lambda q, k, v: dense_attention(q, k, v, allowed)[0],
        [q, k, v],
        torch.float32,
    )


def test_log_sum_exp_is_returned_and_differentiable() -> None:
    keys, queries = packed([20, 6]), some_of([20, 6], [9, 2])
    q, k, v = draw(11, 2, 8), draw(26, 2, 8, seed=1), draw(26, 2, 8, seed=2)
    allowed = pairs_of(queries, keys, True, True)
    assert_within_twice_the_reference_error(
        lambda q, k, v: attention_with_lse(q, k, v, queries=queries, keys=keys, causal=True),
        lambda q, k, v: dense_attention(q, k, v, allowed),
        [q, k, v],
        torch.float32,
    )
    nothing = attention_with_lse(q, k[:0], v[:0], queries=queries, keys=packed([0, 0]))
    assert torch.equal(nothing[0], torch.zeros_like(q))
    assert (nothing[1] == -torch.inf).all()


def test_strided_heads_and_an_expanded_gradient_are_read_as_they_lie() -> None:
    layout = packed([19])
    joint = draw(19, 3, 2, 8)
    q, k, v = (x.detach().requires_grad_() for x in joint.unbind(1))
    out = self_attention(q, k, v, layout=layout, causal=True)
    out.sum().backward()
    allowed = pairs_of(layout, layout, True, False)
    again = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*again, allowed)[0]
    expected.sum().backward()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip((q, k, v), again, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_upper_bound_of_the_longest_sequence_is_allowed(dtype) -> None:
    exact = packed([9, 3])
    loose = TokenLayout(exact.cu_seqlens, 64, exact.positions)
    q, k, v = (draw(12, 2, 8, dtype=dtype, seed=s) for s in range(3))
    assert torch.equal(
        self_attention(q, k, v, layout=loose, causal=True),
        self_attention(q, k, v, layout=exact, causal=True),
    )


def test_torch_counts_the_operations_of_the_kernels() -> None:
    layout = packed([6, 3])
    q, k, v = (draw(9, 2, 8, seed=s).requires_grad_() for s in range(3))
    with torch_flop_counter(display=False) as counter:
        self_attention(q, k, v, layout=layout, causal=True).sum().backward()
    # Two products forward and five backward (the scores once more), each over the whole square.
    assert counter.get_total_flops() == 7 * 2 * (36 + 9) * 2 * 8


@triton.jit
def _find(starts, tiles, found, sequences, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    sequence, block = sequence_of(starts, sequences, tl.load(tiles + pid), BLOCK)
    tl.store(found + 2 * pid, sequence)
    tl.store(found + 2 * pid + 1, block)


@pytest.mark.parametrize("sequences", [1, 5, 1024, 2500])
def test_a_row_block_finds_its_sequence_among_any_number(sequences: int) -> None:
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(40, (sequences,), generator=generator)
    lengths[0] += 1
    lengths[sequences // 2 + 1 :: 7] = 0
    blocks = -(-lengths // 16)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(DEVICE)
    total, rows = int(blocks.sum()), int(lengths.sum())
    assert total <= block_grid(rows, sequences, int(lengths.max()), 16)
    owner = torch.repeat_interleave(torch.arange(sequences), blocks)
    first = (blocks.cumsum(0) - blocks)[owner]
    expected = torch.stack([owner, torch.arange(total) - first], 1)
    tiles = torch.cat([torch.randint(total, (20,), generator=generator), torch.tensor([total + 3])])
    tiles[:2] = torch.tensor([0, total - 1])
    found = torch.zeros(len(tiles), 2, dtype=torch.int32, device=DEVICE)
    _find[(len(tiles),)](starts, tiles.int().to(DEVICE), found, sequences, BLOCK=16)
    assert torch.equal(found[:-1].cpu().long(), expected[tiles[:-1]])
    assert found[-1, 0] == sequences
