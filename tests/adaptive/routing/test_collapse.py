"""Measures of representation collapse against their definitions."""

import pytest
import torch
from torch import Tensor

from adaptive.routing.collapse import (
    FluctuationProbe,
    cosine_spread,
    experts_of_all_tokens,
    inter_run_consistency,
    representation_collapse,
    routing_fluctuation,
)
from adaptive.routing.tape import RoutingRecord


def scatter_trace(hidden_TD: Tensor, expert_T: Tensor) -> Tensor:
    """Tr(Σ_W Σ_B⁺), the matrices written out."""
    mean, dim = hidden_TD.mean(0), hidden_TD.shape[1]
    within, between = torch.zeros(dim, dim).double(), torch.zeros(dim, dim).double()
    for e in expert_T.unique():
        of_expert = hidden_TD[expert_T == e]
        centred = of_expert - of_expert.mean(0)
        within += centred.T @ centred
        shift = of_expert.mean(0) - mean
        between += len(of_expert) * torch.outer(shift, shift)
    return torch.trace((within / len(hidden_TD)) @ torch.linalg.pinv(between / len(hidden_TD)))


def clusters(spread: float, experts: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    centres = torch.randn(experts, 6).double()
    expert_T = torch.arange(60) % experts
    return centres[expert_T] + spread * torch.randn(60, 6).double(), expert_T


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("num_experts", [4, 7])
def test_rc_is_the_trace_of_within_times_pseudo_inverse_of_between(
    spread: float, num_experts: int
) -> None:
    hidden_TD, expert_T = clusters(spread)  # experts 4, 5, 6 have no token
    found = representation_collapse(hidden_TD, expert_T, num_experts)
    torch.testing.assert_close(found, scatter_trace(hidden_TD, expert_T))


def test_rc_falls_as_the_tokens_of_an_expert_draw_together() -> None:
    values = [float(representation_collapse(*clusters(s), 4)) for s in (1.0, 0.3, 0.1, 0.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-12)


def test_rc_of_one_expert_in_use_is_not_a_number() -> None:
    hidden_TD, expert_T = clusters(1.0)
    assert representation_collapse(hidden_TD, torch.zeros_like(expert_T), 4).isnan()


def test_fluctuation_counts_tokens_whose_experts_changed() -> None:
    before = torch.tensor([[0, 1], [2, 3], [1, 2], [4, 4]])
    after = torch.tensor([[1, 0], [2, 1], [1, 2], [4, 4]])  # order is no change; 4 is padding
    assert float(routing_fluctuation(before, after, padding=4)) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"choices of shape \[2, 2\]: must be \[4, 2\]"):
        routing_fluctuation(before, after[:2])


def test_a_probe_compares_each_layer_with_the_time_before() -> None:
    def records(*choices: list[list[int]]) -> list[RoutingRecord]:
        return [
            RoutingRecord(str(n), "mixture_of_experts", 2, 2, load=torch.ones(4), chosen=c)
            for n, c in enumerate(map(torch.tensor, choices))
        ]

    probe = FluctuationProbe()
    first = records([[0], [1]], [[2], [3]])
    probe.update(first)
    assert all(record.statistics == {} for record in first)
    second = records([[0], [1]], [[2], [0]])
    probe.update(second)
    assert [float(r.statistics["collapse/fluctuation"]) for r in second] == [0, 0.5]


def test_experts_behind_a_layer_that_skips_tokens_are_not_compared() -> None:
    """They get other tokens, and another number of them, each time."""

    def records(taken: list[bool]) -> list[RoutingRecord]:
        experts = {"kind": "mixture_of_experts", "executed": 2, "load": torch.ones(4)}
        inside, outside = torch.zeros(sum(taken), 1).long(), torch.zeros(3, 1).long()
        chosen = torch.tensor(taken)
        return [
            RoutingRecord("layers.1.block.ffn", tokens=sum(taken), chosen=inside, **experts),
            RoutingRecord("layers.1", "mixture_of_depths", 3, sum(taken), chosen=chosen),
            RoutingRecord("layers.10.ffn", tokens=3, chosen=outside, **experts),
        ]

    probe = FluctuationProbe()
    for taken in ([True, True, False], [True, False, False], [False, True, False]):
        latest = records(taken)
        probe.update(latest)
    assert [list(record.statistics) for record in latest] == [[], [], ["collapse/fluctuation"]]
    # A layer that skips nothing shows its experts every token.
    everything = records([True] * 3)
    assert experts_of_all_tokens(everything) == [everything[0], everything[2]]


def test_consistency_is_the_mean_pearson_correlation() -> None:
    torch.manual_seed(0)
    loads = [torch.rand(3, 8) for _ in range(3)]
    expected = [
        torch.corrcoef(torch.stack([loads[a][layer], loads[b][layer]]))[0, 1]
        for a, b in ((0, 1), (0, 2), (1, 2))
        for layer in range(3)
    ]
    found = inter_run_consistency(loads)
    torch.testing.assert_close(found, torch.stack(expected).mean().double())
    assert float(inter_run_consistency([loads[0], 3 * loads[0] + 1])) == pytest.approx(1)
    with pytest.raises(ValueError, match="runs=1: consistency needs at least 2"):
        inter_run_consistency(loads[:1])


def test_an_even_load_correlates_with_nothing() -> None:
    even = torch.ones(2, 4)
    assert inter_run_consistency([even, torch.rand(2, 4)]).isnan()


def test_cosine_spread_is_over_tokens() -> None:
    cosines = torch.tensor([[1.0, 0.2], [-1.0, 0.2]])
    assert float(cosine_spread(cosines)) == pytest.approx(0.5)
