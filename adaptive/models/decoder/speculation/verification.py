"""Which drafted token a sampler may take, so that its output is the target's distribution.

A draft is drawn from p, the target's distribution is q; both are those that are drawn *from*, after
temperature, top-k and top-p. Every function takes any leading dimensions, and computes in the dtype
it is given: give float64 where a rejection is rare.

Shape legend: V vocabulary, K drafts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chain(NamedTuple):
    """One draft: taken with probability `min(1, q/p)`.

    Attributes:
        acceptance: [...], probability that the draft is taken, `sum min(p, q)`.
        residual: [..., V], what is drawn from otherwise, `(q - p)+` normalised.
    """

    acceptance: Tensor
    residual: Tensor


class KSeq(NamedTuple):
    """K independent drafts, each taken in turn with probability `min(1, q / (rho p))`.

    Attributes:
        rho: [...], the least division factor for which no residual can be below zero.
        beta: [...], probability that one draft is taken, `sum min(p, q / rho)`.
        acceptance: [...], probability that some draft is taken.
        residual: [..., V], what is drawn from otherwise.
    """

    rho: Tensor
    beta: Tensor
    acceptance: Tensor
    residual: Tensor


class Verdict(NamedTuple):
    """What to do with given drafts of one place.

    Attributes:
        accept: [K], probability of taking each draft where those before it were rejected.
        residual: [V], what to draw from where all were.
    """

    accept: Tensor
    residual: Tensor


def chain(p: Tensor, q: Tensor) -> Chain:
    """Speculative sampling with one draft. Source: arXiv 2211.17192, section 2.3.

    Raises:
        ValueError: if the shapes differ.
    """
    _check(p, q)
    return Chain(torch.minimum(p, q).sum(-1), _normalised(q - p, otherwise=q))


_HALVINGS = 64
"""Of the interval of rho: more than float64 tells apart."""


def k_seq(p: Tensor, q: Tensor, k: int) -> KSeq:
    """k-sequential selection: drafts that are taken each alone, whatever the others are.

    With `beta(rho) = sum min(p, q / rho)`, rho is the root in [1, k] of
    `1 - (1 - beta)^k = rho beta`, found by bisection and taken from the side on which the residual
    `(q - min(p, q / rho) acceptance / beta) / (1 - acceptance)` is not negative.

    Args:
        p, q: [..., V], distributions of the drafts and of the target.
        k: drafts, drawn from p independently.

    Raises:
        ValueError: if the shapes differ, or k is below 1.

    Source: SpecTr, arXiv 2310.15141, section 4 (algorithm 3).
    """
    _check(p, q, k)
    low = torch.ones_like(p[..., :1])
    high = torch.full_like(low, k)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        beta = torch.minimum(p, q / middle).sum(-1, keepdim=True)
        invalid = _any_of(beta, k) > middle * beta
        low, high = middle.where(invalid, low), high.where(invalid, middle)
    taken = torch.minimum(p, q / high)
    beta = taken.sum(-1, keepdim=True)
    acceptance = _any_of(beta, k)
    # Nothing in common: no token was taken, and the ratio is its limit, k.
    drafts = torch.where(beta > 0, acceptance / beta, k)
    residual = _normalised(q - taken * drafts, otherwise=q)
    return KSeq(high[..., 0], beta[..., 0], acceptance[..., 0], residual)


def best_acceptance(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The largest probability with which any rule can take one of k independent drafts.

    It is `1 - max_S (p(S)^k - q(S))` over sets of tokens: with probability p(S)^k all drafts lie in
    S, of which the target's distribution takes no more than q(S); a minimal cut of the transport
    between drafts and tokens shows that nothing else stands in the way. The maximum is convex in
    (p(S), q(S)), so S is a prefix of the tokens in order of q/p: O(V log V).

    Args:
        p, q: [..., V], distributions of the drafts and of the target.
        k: drafts, drawn from p independently.

    Returns:
        [...]; `sum min(p, q)` for one draft.

    Raises:
        ValueError: if the shapes differ, or k is below 1.
    """
    _check(p, q, k)
    # A token that is never drafted only adds to q(S): it comes last, and 0/0 with it.
    order = torch.where(p > 0, q / p, torch.inf).argsort(-1)
    drafted, wanted = (x.gather(-1, order).cumsum(-1) for x in (p, q))
    return 1 - (drafted**k - wanted).amax(-1).clamp(min=0)


def recursive_acceptance(p: Tensor, q: Tensor, k: int) -> Tensor:
    """Probability [...] that recursive rejection takes one of k independent drafts.

    Raises:
        ValueError: if the shapes differ, or k is below 1.
    """
    _check(p, q, k)
    rejected = torch.ones_like(p[..., 0])
    for _ in range(k):
        acceptance, q = chain(p, q)
        rejected = rejected * (1 - acceptance)
    return 1 - rejected


def recursive_rejection(
    p: Tensor, q: Tensor, drafts: Tensor, *, replacement: bool = True
) -> Verdict:
    """Each draft is tested against what the rejections before it have left of the target.

    Args:
        p, q: [V], distributions of the drafts and of the target.
        drafts: int64 [K]. Independent with `replacement`; else each was drawn from what p left
            after those before it, so that they differ. No other order or choice (the k
            likeliest, say) makes the output that of the target.
        replacement: how they were drawn.

    Sources: SpecInfer, arXiv 2305.09781, section 4.3; without replacement: Sequoia,
    arXiv 2402.12374, section 3.2.
    """
    _check(p, q)
    accept = []
    for draft in drafts.tolist():
        accept.append(_ratio(q[draft], p[draft]))
        q = _normalised(q - p, otherwise=q)
        if not replacement:
            left = p.index_fill(-1, drafts.new_tensor([draft]), 0)
            p = _normalised(left, otherwise=left)
    return Verdict(torch.stack(accept), q)


def sequential_rejection(p: Tensor, q: Tensor, drafts: Tensor) -> Verdict:
    """The verdict of `k_seq` about drafts, int64 [K], drawn independently from p, [V]."""
    rule = k_seq(p, q, len(drafts))
    return Verdict(_ratio(q[drafts] / rule.rho, p[drafts]), rule.residual)


def _any_of(beta: Tensor, k: int) -> Tensor:
    """`1 - (1 - beta)^k`, exact for small beta too."""
    return -torch.expm1(k * torch.log1p(-beta.clamp(max=1)))


def _ratio(wanted: Tensor, drafted: Tensor) -> Tensor:
    """`min(1, wanted / drafted)`. A draft that p cannot draw is not of p: never taken."""
    return torch.where(drafted > 0, wanted / drafted, 0).clamp(max=1)


def _normalised(x: Tensor, *, otherwise: Tensor) -> Tensor:
    """`x+` with sum 1; where nothing is positive, which is never drawn from, something else."""
    x = x.clamp(min=0)
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / total, otherwise)


def _check(p: Tensor, q: Tensor, k: int = 1) -> None:
    if p.shape != q.shape:
        raise ValueError(f"p of shape {list(p.shape)}: must be that of q, {list(q.shape)}")
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
