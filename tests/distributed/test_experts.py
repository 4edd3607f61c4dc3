"""Expert parallelism trains the same model: loss, gradient norm, clipped update, weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adaptive.blocks.mixture_of_experts import MixtureOfExperts, MixtureOfExpertsConfig
from adaptive.routing.tape import RoutingTape
from parallel.expert import combine, dispatch, plan_dispatch
from parallel.gradients import is_expert
from parallel.mesh import Mesh
from parallel.parity import Report, Settings, check_on_ranks
from tests.distributed.subjects import TINY, LanguageModel
from tests.ranks import run_ranks

# Losses large enough to show in every gradient.
EXPERTS = MixtureOfExpertsConfig(
    num_experts=4, ffn_dim=32, balance_coefficient=0.5, z_coefficient=0.1
)


@dataclass(frozen=True)
class Skewed(LanguageModel):
    """A decoder whose routers send every token to the same experts, whatever they learn."""

    def build(self, mesh: Mesh) -> nn.Module:
        model = super().build(mesh)
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                assert module.expert_bias is not None
                module.expert_bias.bias[2] = 9.0
        return model


def language_model(
    config: MixtureOfExpertsConfig, kind: type[LanguageModel] = LanguageModel
) -> Any:
    return kind(replace(TINY, mixture_of_experts=config), rows=8, seq_len=12)


SUBJECTS = {
    "top-2": language_model(EXPERTS),
    "hyperspherical": language_model(
        replace(EXPERTS, router="hyperspherical", top_k=1, shared_experts=1)
    ),
    "one expert takes everything": language_model(
        replace(EXPERTS, top_k=1, bias_rate=1e-3), Skewed
    ),
    "moving bias": language_model(replace(EXPERTS, bias_rate=1e-3)),
    "gelu": language_model(replace(EXPERTS, activation="gelu")),
    "idle experts": language_model(replace(EXPERTS, idle_experts=2)),
    "frozen experts": language_model(replace(EXPERTS, freeze_experts=True)),
    "recomputed": LanguageModel(
        replace(TINY, mixture_of_experts=EXPERTS, recompute=True), rows=8, seq_len=12
    ),
}


def check(subject: Any, meshes: list[dict[str, int]], micro_batches: int) -> list[Report]:
    return check_on_ranks(subject, meshes, Settings(micro_batches=micro_batches))


ON_TWO_RANKS = [(name, 2, (1, 2)) for name in SUBJECTS]
ON_FOUR_RANKS = [(name, 4, (1, 2, 4)) for name in ("top-2", "one expert takes everything")]


@pytest.mark.parametrize(("name", "ranks", "degrees"), ON_TWO_RANKS + ON_FOUR_RANKS)
def test_expert_parallel_training_agrees_with_one_rank(
    name: str, ranks: int, degrees: tuple[int, ...]
) -> None:
    meshes = [{"expert": degree} for degree in degrees]
    for report in run_ranks(check, ranks, SUBJECTS[name], meshes, 1)[0]:
        assert report.ok, report.mesh + "\n" + report.table()


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 1), (2, 2)])
def test_losses_are_means_over_the_global_batch_however_it_is_split(
    ranks: int, micro_batches: int
) -> None:
    """One rank with 8 rows against 2 ranks with 4, and 4 accumulation steps of 2."""
    for report in run_ranks(check, ranks, SUBJECTS["top-2"], [{}], micro_batches)[0]:
        assert report.ok, report.table()


def wrong_average(model: nn.Module, mesh: Mesh) -> None:
    for parameter in model.parameters():
        if is_expert(parameter):
            del parameter.allreduce  # the engine now averages different experts


def check_broken(subject: Any) -> list[str]:
    class Broken:
        def __init__(self, model: nn.Module, mesh: Mesh) -> None:
            wrong_average(model, mesh)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    reports = check_on_ranks(subject, [{"expert": 2}], Settings(), fault=Broken)  # type: ignore[arg-type]
    return reports[0].disagreeing() if reports else []


def test_the_check_sees_experts_averaged_like_dense_weights() -> None:
    assert any("experts" in name for name in run_ranks(check_broken, 2, SUBJECTS["top-2"])[0])


def exchanged(counts: list[list[int]]) -> dict[str, Any]:
    """Each rank sends `counts[rank][expert]` rows that say where they come from."""
    mesh = Mesh.create(expert=2)
    rank = dist.get_rank()
    own = torch.tensor(counts[rank])
    experts = torch.repeat_interleave(torch.arange(4), own)
    rows = torch.stack([experts, torch.full_like(experts, rank)], 1).double().requires_grad_()
    plan = plan_dispatch(own, mesh)
    received = dispatch(rows, plan, mesh)
    back = combine(received * torch.tensor([1.0, 10.0]), plan, mesh)
    back.sum().backward()
    return {
        "received": received[plan.order].tolist(),
        "rows": plan.rows_per_expert.tolist(),
        "returned": torch.equal(back, rows * torch.tensor([1.0, 10.0])),
        "grad": rows.grad.unique(dim=0).tolist() if rows.numel() else [[1.0, 10.0]],
    }


@pytest.mark.parametrize(
    "counts",
    [
        [[1, 2, 0, 1], [0, 3, 1, 0]],
        [[0, 0, 0, 0], [2, 0, 0, 1]],  # a rank without tokens
        [[3, 0, 0, 0], [4, 0, 0, 0]],  # one expert takes everything
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ],
)
def test_rows_travel_to_their_experts_and_back(counts: list[list[int]]) -> None:
    for rank, result in enumerate(run_ranks(exchanged, 2, counts)):
        experts = (2 * rank, 2 * rank + 1)
        assert result["rows"] == [counts[0][e] + counts[1][e] for e in experts]
        expected = [[e, r] for e in experts for r in range(2) for _ in range(counts[r][e])]
        assert result["received"] == expected
        assert result["returned"]
        assert result["grad"] == [[1.0, 10.0]]


def rank_without_tokens() -> list[bool]:
    """Rank 1 routes nothing at all, and still joins every collective and has every gradient."""
    mesh = Mesh.create(expert=2)
    torch.manual_seed(0)
    module = MixtureOfExperts(8, 6, 4, mesh=mesh, bias_rate=0.1, capacity_factor=1.0)
    tokens = torch.randn(5 if dist.get_rank() == 0 else 0, 8)
    with RoutingTape() as tape:
        out = module(tokens)
    (out.sum() + tape.loss()).backward()
    module.start_step(1)
    return [p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters()]


def test_a_rank_without_tokens_still_has_every_gradient() -> None:
    for result in run_ranks(rank_without_tokens, 2):
        assert all(result)


def experts_of_rank() -> str:
    mesh = Mesh.create(expert=2)
    try:
        MixtureOfExperts(8, 6, 5, mesh=mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_experts_that_do_not_divide_are_one_clear_line() -> None:
    expected = "num_experts=5: must be a multiple of the expert axis 2; expert may be 1"
    assert run_ranks(experts_of_rank, 2) == [expected] * 2
