"""Verification of drafts: the output is the target's distribution, by enumeration."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from adaptive.models.decoder.speculation.verification import (
    Verdict,
    chain,
    recursive_acceptance,
    recursive_rejection,
    sequential_rejection,
)
from adaptive.models.decoder.speculative import best_acceptance, k_seq

V = 4
EXACT = 1e-12  # float64, sums of a few hundred terms


def pairs(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Random distributions, and those at which formulas divide by zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(2, count, V, generator=generator, dtype=torch.float64) ** 3
    drawn = drawn / drawn.sum(-1, keepdim=True)
    one, other = torch.eye(V, dtype=torch.float64)[:2]
    half = (one + other) / 2
    cut = drawn[0, 0].clone()
    cut[:2] = 0  # top-k of the draft
    equal = (drawn[0, 1], drawn[0, 1])
    edges = [equal, (one, one), (one, other), (half, one), (one, half), (cut / cut.sum(), half)]
    return [*zip(drawn[0], drawn[1], strict=True), *edges]


def draws(p: Tensor, k: int, *, replacement: bool) -> list[tuple[float, list[int]]]:
    """Every tuple of k drafts and its probability."""
    found = []
    for drafts in itertools.product(range(V), repeat=k):
        probability, left = 1.0, p.clone()
        for draft in drafts:
            if not replacement:
                total = left.sum()
                probability *= float(left[draft] / total) if total > 0 else 0.0
                left[draft] = 0
            else:
                probability *= float(left[draft])
        if probability > 0:
            found.append((probability, list(drafts)))
    return found


def output(
    rule: Callable[[Tensor, Tensor, Tensor], Verdict],
    drafts: list[tuple[float, list[int]]],
    p: Tensor,
    q: Tensor,
) -> tuple[Tensor, float]:
    """What comes out of a rule for all drafts together, and how often it is a draft."""
    out, accepted = torch.zeros(V, dtype=torch.float64), 0.0
    for probability, tokens in drafts:
        verdict = rule(p, q, torch.tensor(tokens))
        assert (verdict.residual >= -EXACT).all()
        assert not verdict.residual.isnan().any()
        left = probability
        for token, accept in zip(tokens, verdict.accept.tolist(), strict=True):
            out[token] += left * accept
            accepted += left * accept
            left *= 1 - accept
        out += left * verdict.residual
    return out, accepted


RULES = {
    "recursive": recursive_rejection,
    "without replacement": partial(recursive_rejection, replacement=False),
    "k_seq": sequential_rejection,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_output_is_the_distribution_of_the_target(name: str, k: int) -> None:
    for p, q in pairs():
        replacement = name != "without replacement"
        drafts = draws(p, k, replacement=replacement)
        if not drafts:
            continue  # fewer tokens than drafts that differ
        out, accepted = output(RULES[name], drafts, p, q)
        torch.testing.assert_close(out, q, atol=EXACT, rtol=0)
        if replacement:
            assert accepted <= float(best_acceptance(p, q, k)) + EXACT
        told = {"recursive": recursive_acceptance, "k_seq": lambda *a: k_seq(*a).acceptance}
        if name in told:
            assert accepted == pytest.approx(float(told[name](p, q, k)), abs=EXACT)


def test_one_draft_is_taken_as_often_as_distributions_overlap() -> None:
    for p, q in pairs():
        overlap = float(torch.minimum(p, q).sum())
        every = [
            chain(p, q).acceptance,
            k_seq(p, q, 1).acceptance,
            recursive_acceptance(p, q, 1),
            best_acceptance(p, q, 1),
        ]
        assert [float(x) for x in every] == pytest.approx([overlap] * 4, abs=EXACT)
        torch.testing.assert_close(chain(p, q).residual, k_seq(p, q, 1).residual)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_no_set_of_tokens_bounds_acceptance_tighter(k: int) -> None:
    """Against all subsets: the prefixes in order of q/p hold the best one."""
    for p, q in pairs(20):
        sets = itertools.product([0.0, 1.0], repeat=V)
        worst = max(float((p @ s) ** k - q @ s) for s in (torch.tensor(s).double() for s in sets))
        assert float(best_acceptance(p, q, k)) == pytest.approx(1 - worst, abs=EXACT)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_rho_is_the_least_that_leaves_no_negative_residual(k: int) -> None:
    for p, q in pairs(20)[:20]:  # of those that are equal, or share nothing, any is valid
        rho = k_seq(p, q, k).rho
        assert 1 < float(rho) < k
        for tried, valid in ((rho, True), (0.99 * rho, False)):
            taken = torch.minimum(p, q / tried)
            beta = taken.sum()
            left = q - taken * (1 - (1 - beta) ** k) / beta
            assert (float(left.min()) >= -EXACT) == valid


@pytest.mark.parametrize(
    ("k", "best", "sequential", "recursive"), [(2, 0.435, 0.422, 0.414), (8, 0.601, 0.571, 0.551)]
)
def test_acceptance_of_200_random_pairs_is_that_of_the_table(
    k: int, best: float, sequential: float, recursive: float
) -> None:
    """The table names no distribution; fourth powers of uniform numbers, normalised, give it."""
    drawn = torch.rand(2, 200, 100, generator=torch.Generator().manual_seed(0)).double() ** 4
    p, q = drawn / drawn.sum(-1, keepdim=True)
    found = [best_acceptance(p, q, k), k_seq(p, q, k).acceptance, recursive_acceptance(p, q, k)]
    for acceptance, expected in zip(found, (best, sequential, recursive), strict=True):
        # Two means of 200 pairs, the table's and ours, each with this standard error.
        error = float(acceptance.std()) / 200**0.5
        assert abs(float(acceptance.mean()) - expected) < 3 * 2**0.5 * error
        assert error < 0.007
    assert (found[0] >= found[1] - EXACT).all()
    assert (found[0] >= found[2] - EXACT).all()


def test_the_likeliest_tokens_are_no_samples() -> None:
    """A tree of the top k tokens tested as if it had been drawn gives another distribution."""
    p, q = pairs()[0]
    top = [(1.0, p.topk(2).indices.tolist())]
    out, _ = output(recursive_rejection, top, p, q)
    assert float((out - q).abs().max()) > 0.05


def test_wrong_arguments_are_named() -> None:
    p = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        k_seq(p, p, 0)
    with pytest.raises(ValueError, match=r"p of shape \[3\]: must be that of q, \[2\]"):
        best_acceptance(p, p[:2], 1)
