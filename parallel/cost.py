"""What a mesh costs, as formulas: bytes that one rank sends.

Each function gives the mean over the ranks of a group, forward and backward together unless it
says otherwise, reductions and gathers counted as rings, as `parallel.checks.traffic` counts them.
Tests and `benchmarks/parallel.py` hold them against what is really sent.

T tokens of one micro-batch (of all ranks of the group together), D width, n ranks of the group,
c share of tokens that a routed layer computes (1: dense), `size` bytes of a number.
"""

from __future__ import annotations

import math

from parallel.mesh import Mesh


def tensor_bytes(
    tokens: int, dim: int, ranks: int, *, share: float = 1.0, splits: int = 2, size: int = 4
) -> float:
    """Rows at the borders of a layer's split products: 4 · splits · c · T · D · size · (n-1)/n.

    A split product (attention, feed-forward) reduces, or gathers and scatters, once forward and
    once backward. The same with and without sequence parallelism.
    """
    return 4 * splits * share * tokens * dim * size * (ranks - 1) / ranks


def score_bytes(tokens: int, ranks: int, *, scores: int = 1, size: int = 4) -> float:
    """Router scores gathered for an exact choice over whole sequences; forward only."""
    return scores * tokens * size * (ranks - 1) / ranks


def replicated_bytes(numbers: int, ranks: int, *, size: int = 4) -> float:
    """Gradients of norms, routers and predictors summed over tensor ranks; backward only."""
    return 2 * numbers * size * (ranks - 1) / ranks


def ulysses_bytes(
    tokens: int,
    heads: float,
    kv_heads: float,
    head_dim: int,
    ranks: int,
    *,
    share: float = 1.0,
    size: int = 4,
) -> float:
    """Tokens for heads and back: 2 · c · T/n · (2H + 2G) · h · size · (n-1)/n.

    Without what evening out chosen rows costs, which depends on where they lie.
    """
    row = (2 * heads + 2 * kv_heads) * head_dim
    return 2 * share * tokens / ranks * row * size * (ranks - 1) / ranks


def ring_bytes(
    tokens: int,
    heads: float,
    kv_heads: float,
    head_dim: int,
    ranks: int,
    *,
    scheme: str = "queries",
    share: float = 1.0,
    size: int = 4,
) -> float:
    """Ring attention. "keys": keys and values, and their gradients, travel. "queries": queries,
    output gradients and two numbers a row travel on; outputs, one number a row and query
    gradients go back. What is summed on the way has 32 bits at least; the rest, `size` bytes."""
    own = share * tokens / ranks
    wide = max(size, 4)
    if scheme == "keys":
        both = 2 * own * kv_heads * head_dim
        return both * ((ranks - 1) * 2 * size + ranks * wide)
    rows, scalars = own * heads * head_dim, own * heads
    return (ranks - 1) * (rows * (3 * size + 2 * wide) + 3 * scalars * wide)


def zigzag_bytes(
    tokens: int,
    heads: float,
    kv_heads: float,
    head_dim: int,
    ranks: int,
    *,
    moved: float,
    share: float = 1.0,
    size: int = 4,
) -> float:
    """Rows to where a ring wants them and back: 2 · m · c · T/n · (2H + 2G) · h · size.

    `moved`, m, is the share of rows that change ranks (`parallel.ring.order.moved_share`).
    """
    row = (2 * heads + 2 * kv_heads) * head_dim
    return 2 * moved * share * tokens / ranks * row * size


def context_bytes(
    mesh: Mesh,
    tokens: int,
    heads: float,
    kv_heads: float,
    head_dim: int,
    *,
    share: float = 1.0,
    moved: float = 0.0,
    size: int = 4,
) -> float:
    """Attention over the context ranks of a mesh: Ulysses, or the ring that sends less, with the
    rows that move before and after it."""
    sizes = (tokens, heads, kv_heads, head_dim, mesh.context)
    if not mesh.ring:
        repeated = kv_heads * mesh.context / math.gcd(round(kv_heads), mesh.context)
        return ulysses_bytes(tokens, heads, repeated, *sizes[3:], share=share, size=size)
    schemes = ("queries", "keys")
    exchanged = zigzag_bytes(*sizes, moved=moved, share=share, size=size)
    return exchanged + min(ring_bytes(*sizes, scheme=s, share=share, size=size) for s in schemes)


def expert_bytes(tokens: int, dim: int, ranks: int, *, top_k: int, size: int = 4) -> float:
    """Rows to their experts and back: 4 · K · t · D · size · (e-1)/e, t tokens of one rank.

    For an even load; a rank that gets more rows sends more back.
    """
    return 4 * top_k * tokens * dim * size * (ranks - 1) / ranks


def gradient_bytes(parameters: int, ranks: int, *, size: int = 4) -> float:
    """The average of gradients over the ranks that hold a copy, or with ZeRO their scatter and
    the gather of new weights: 2 · P · size · (r-1)/r a step."""
    return 2 * parameters * size * (ranks - 1) / ranks
