"""Ring attention against attention of the whole, and against plain ring attention."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from adaptive.ops.varlen_attention import varlen_attention, with_key_bias
from adaptive.routing.layout import TokenLayout
from parallel.checks.traffic import Traffic
from parallel.cost import ring_bytes
from parallel.ring import blocks as ring_blocks
from parallel.ring.attention import (
    RingLayout,
    Scheme,
    cheaper_scheme,
    ring_attention,
    zigzag_rows,
)
from parallel.ring.layout import Pair
from tests.ranks import run_ranks

HEADS, WIDTH = 4, 8


def _whole(tokens: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    shapes = [(HEADS, WIDTH), (kv_heads, WIDTH), (kv_heads, WIDTH), (HEADS, WIDTH)]
    q, k, v, grad = (torch.randn(tokens, *shape, generator=draw) for shape in shapes)
    return q, k, v, grad


def _bias(tokens: int) -> Tensor:
    """Of every key: the log of a size."""
    draw = torch.Generator().manual_seed(5)
    return torch.randint(1, 9, (tokens,), generator=draw).float().log()


def _rows(lengths: tuple[int, ...], spread: str) -> Tensor:
    """Which tokens this rank holds."""
    tokens, ranks, rank = sum(lengths), dist.get_world_size(), dist.get_rank()
    if spread == "zigzag":
        return zigzag_rows(tokens, ranks, rank)
    if spread == "scattered":  # routed tokens, some ranks nearly without
        draw = torch.Generator().manual_seed(0)
        owner = torch.randint(0, ranks * ranks, (tokens,), generator=draw) // ranks
        owner[owner == 1] = 0
        return (owner == rank).nonzero().squeeze(1)
    return torch.arange(tokens).tensor_split(ranks)[rank]


def _attend(
    lengths: tuple[int, ...],
    spread: str,
    scheme: Scheme,
    causal: bool,
    kv_heads: int,
    dtype: torch.dtype = torch.float32,
    biased: bool = False,
) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    whole = TokenLayout.from_lengths(lengths)
    q, k, v, grad = (x.to(dtype) for x in _whole(whole.tokens, kv_heads))
    rows = _rows(lengths, spread)
    group = dist.group.WORLD
    assert group is not None
    layout = RingLayout.create(
        whole.positions[rows], whole.sequence_ids[rows], group, causal=causal
    )
    own = [x[rows].clone().requires_grad_() for x in (q, k, v)]
    heads = tuple(own)
    if biased:
        # The bias goes where its keys go.
        own.append(_bias(whole.tokens)[rows].requires_grad_())
        heads = with_key_bias(*heads, own[3])
    with Traffic() as traffic:
        out = ring_attention(*heads, layout, scheme=scheme)[..., :WIDTH]
        out.backward(grad[rows])
    return (
        rows,
        [out.detach(), *(x.grad for x in own if x.grad is not None)],
        traffic.by_operation(),
    )


@pytest.mark.parametrize("scheme", ["queries", "keys"])
@pytest.mark.parametrize(
    ("lengths", "ranks", "spread", "causal", "kv_heads", "biased"),
    [
        ((24,), 2, "zigzag", True, 4, False),
        ((23,), 4, "zigzag", True, 2, False),
        ((5, 1, 17), 3, "even", True, 1, False),
        ((5, 1, 17), 3, "scattered", True, 2, False),
        ((9, 8), 3, "even", False, 4, False),
        ((9, 8), 2, "even", False, 4, True),
        ((5, 1, 17), 4, "scattered", True, 2, True),
    ],
)
def test_attention_and_gradients_are_those_of_the_whole(
    lengths: tuple[int, ...],
    ranks: int,
    spread: str,
    causal: bool,
    kv_heads: int,
    biased: bool,
    scheme: Scheme,
) -> None:
    q, k, v, grad = _whole(sum(lengths), kv_heads)
    bias = _bias(sum(lengths)) if biased else None
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    layout = TokenLayout.from_lengths(lengths)
    expected = varlen_attention(q, k, v, queries=layout, causal=causal, key_bias=bias)
    expected.backward(grad)
    wanted = [expected.detach(), *(x.grad for x in leaves)]
    seen = torch.zeros(sum(lengths), dtype=torch.bool)
    arguments = lengths, spread, scheme, causal, kv_heads, torch.float32, biased
    for rows, found, _ in run_ranks(_attend, ranks, *arguments):
        seen[rows] = True
        for a, b in zip(found, wanted, strict=True):
            assert b is not None
            torch.testing.assert_close(a, b[rows], atol=2e-6, rtol=1e-5)
    assert seen.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_both_schemes(ranks: int, dtype: torch.dtype) -> None:
    tokens, number, wide = 32, dtype.itemsize, 4
    channels = tokens // ranks * HEADS * WIDTH
    scalars = tokens // ranks * HEADS * wide
    by_scheme = {}
    for scheme in ("queries", "keys"):
        results = run_ranks(_attend, ranks, (tokens,), "zigzag", scheme, True, HEADS, dtype)
        by_scheme[scheme] = {tuple(sent.items()) for _, _, sent in results}
        sizes = (tokens, HEADS, HEADS, WIDTH, ranks)
        formula = ring_bytes(*sizes, scheme=scheme, size=number)
        assert by_scheme[scheme] == {(("send", formula),)}
    # Queries on, outputs and log-sum-exp back; then queries, gradients and two numbers a row on,
    # and query gradients back. Sums have 32 bits.
    forward = channels * (number + wide) + scalars
    backward = channels * (2 * number + wide) + 2 * scalars
    assert by_scheme["queries"] == {(("send", (ranks - 1) * (forward + backward)),)}
    # Keys and values; then both again, and the gradients of both all the way home.
    both = 2 * channels * ((ranks - 1) * 2 * number + ranks * wide)
    assert by_scheme["keys"] == {(("send", both),)}


@pytest.mark.parametrize("scheme", ["queries", "keys"])
def test_16_bits_travel_and_32_are_computed(scheme: Scheme) -> None:
    q, k, v, grad = (x.bfloat16().double() for x in _whole(24, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = varlen_attention(*leaves, queries=TokenLayout.from_lengths((24,)))
    expected.backward(grad)
    wanted = [expected.detach(), *(x.grad for x in leaves)]
    arguments = ((24,), "zigzag", scheme, True, 2, torch.bfloat16)
    for rows, found, _ in run_ranks(_attend, 2, *arguments):
        for a, b in zip(found, wanted, strict=True):
            assert b is not None
            # One rounding, at the end.
            torch.testing.assert_close(a.double(), b[rows], atol=1e-5, rtol=2**-8)


def _balance(ranks: int, spread: str) -> int:
    rows = _rows((64,), spread)
    group = dist.group.WORLD
    assert group is not None
    layout = RingLayout.create(rows, torch.zeros_like(rows), group)
    return sum(layout.pairs(queries, dist.get_rank()) for queries in range(ranks))


def test_zigzag_gives_every_rank_the_same_pairs() -> None:
    zigzag = run_ranks(_balance, 4, 4, "zigzag")
    assert len(set(zigzag)) == 1
    contiguous = run_ranks(_balance, 4, 4, "even")
    assert max(contiguous) > 1.5 * min(contiguous)
    # Together little more than the causal half of all pairs.
    assert sum(zigzag) < 0.6 * 64 * 64


def test_few_key_value_heads_travel_themselves() -> None:
    assert cheaper_scheme(8, 8, 64, 4) == "queries"
    assert cheaper_scheme(8, 1, 64, 4) == "keys"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-30, 0.0])
def test_fused_and_plain_blocks_agree(size: float, masked: bool) -> None:
    """Whatever the size of the gradients, from which the fused one makes up its output."""
    draw = torch.Generator().manual_seed(1)
    q, grad = (torch.randn(9, 4, 8, generator=draw) for _ in range(2))
    k, v = (torch.randn(7, 2, 8, generator=draw) for _ in range(2))
    seen = torch.rand(9, 7, generator=draw) > 0.4 if masked else None
    if seen is not None:
        seen[3] = False  # a query without any key
    plain, lse = ring_blocks._attend_plain(q, k, v, seen)
    fused, fused_lse = ring_blocks._attend_fused(q, k, v, seen)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused_lse, lse)
    lse, grad = lse.clamp(min=ring_blocks.LOWEST), grad * size
    delta = (plain * grad).sum(-1)
    expected = ring_blocks._backward_plain(q, grad, lse, delta, k, v, seen)
    found = ring_blocks._backward_fused(q, grad, lse, delta, k, v, seen)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size)


def _both_ways(heads: tuple[Tensor, ...], pair: Pair) -> list[Tensor]:
    """A part and its gradients: of queries, keys, values and gradients that lie over two ranks."""
    q, k, v, grad = (x.split(list(pair.query_layout.sizes)) for x in heads)
    out, lse = ring_blocks.attend(q[1], k[0], v[0], pair)
    delta = (out * grad[1]).sum(-1)
    grads = ring_blocks.attend_backward(q[1], grad[1], lse, delta, k[0], v[0], pair)
    return [out, lse, *grads]


def _pair(*, causal: bool) -> Pair:
    whole, nobody = TokenLayout.from_lengths((9, 4, 16)), cast(Any, None)
    rows = (whole.positions, whole.sequence_ids)
    layout = RingLayout.of(*rows, (12, 17), nobody, causal=causal)
    return Pair(layout, layout, 1, 0)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_blocks_of_few_rows_agree_with_fused_ones(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs run, here on the CPU."""
    heads, pair = _whole(29, 2), _pair(causal=causal)
    fused = _both_ways(heads, pair)
    monkeypatch.setattr(ring_blocks, "_fuses", lambda q: False)
    monkeypatch.setattr(ring_blocks, "PLAIN_ROWS", 3)
    for a, b in zip(_both_ways(heads, pair), fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuses", [True, False])
def test_blocks_compute_the_same_under_autocast(
    fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain ones multiplied 16-bit numbers, which cannot hold what stands for no key either."""
    monkeypatch.setattr(ring_blocks, "_fuses", lambda q: fuses)
    heads, pair = _whole(29, 2), _pair(causal=True)
    expected = _both_ways(heads, pair)
    with torch.autocast("cpu", torch.bfloat16):
        found = _both_ways(heads, pair)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
