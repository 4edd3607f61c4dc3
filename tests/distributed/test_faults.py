"""Training broken on purpose: the parity check names what each fault breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import RoutingTape
from parallel.checks.faults import FAULTS
from parallel.parity import Batch, Report, Settings, Share, Subject, check_on_ranks
from tests.distributed.subjects import FAMILIES, LanguageModel
from tests.ranks import run_ranks

Degrees = dict[str, int | bool]
SEQUENCE: Degrees = {"tensor": 2, "sequence_parallel": True}


def check(subject: Subject, degrees: Degrees, fault: str | None, settings: Settings) -> Report:
    reports = check_on_ranks(
        subject, [degrees], settings, fault=None if fault is None else FAULTS[fault]
    )
    return reports[0] if reports else Report("", 0, [])


@pytest.mark.parametrize(
    ("fault", "family", "degrees", "quantity", "named"),
    [
        ("skip_one_all_reduce", "dense", {"tensor": 2}, "gradient", "layers.1.ffn_norm.weight"),
        ("skip_one_all_reduce", "dense", {}, "gradient", "embedding.weight"),
        ("scale_expert_gradients", "mixture_of_experts", {"expert": 2}, "gradient", "experts"),
        ("detach_routers", "mixture_of_depths", {"tensor": 2}, "gradient", "router.weight"),
        ("detach_routers", "skip_layer", {}, "gradient", "router.weight"),
        ("keep_router_gradients_apart", "mixture_of_depths", SEQUENCE, "gradient", "router"),
        ("keep_norm_gradients_apart", "dense", SEQUENCE, "gradient", "attention_norm.weight"),
        ("count_own_experts_only", "mixture_of_experts", {"expert": 2}, "norm", "step 0"),
        ("count_own_experts_only", "mixture_of_experts", {"expert": 2}, "update", "experts"),
    ],
)
def test_fault_is_caught_and_named(
    fault: str, family: str, degrees: Degrees, quantity: str, named: str
) -> None:
    report = run_ranks(check, 2, FAMILIES[family], degrees, fault, Settings(steps=1))[0]
    assert not report.ok
    names = report.disagreeing(quantity)
    assert any(named in name for name in names), report.table()


def test_router_fault_leaves_the_other_gradients_right() -> None:
    """The report points at the router's own weights, not at everything."""
    fault, family = "keep_router_gradients_apart", FAMILIES["mixture_of_depths"]
    report = run_ranks(check, 2, family, SEQUENCE, fault, Settings(steps=1))[0]
    names = report.disagreeing("gradient")
    assert names
    assert all("router" in name or "predictor" in name for name in names)


@dataclass(frozen=True)
class AuxiliaryLossPerMicroBatch(LanguageModel):
    """Adds auxiliary losses as if every micro-batch were the whole batch."""

    def losses(
        self, model: nn.Module, micro_batches: Sequence[Batch], share: Share
    ) -> Iterator[Tensor]:
        scope = BatchScope.of(share.mesh, share.tokens, micro_batches=share.micro_batches)
        wrong = BatchScope.of(share.mesh, share.tokens // share.micro_batches)
        wrong.replicas *= share.micro_batches
        for batch in micro_batches:
            with RoutingTape(model, scope=wrong) as tape:
                loss = self._task_loss(model, batch, scope)
            yield loss + tape.loss()


@pytest.mark.parametrize("kind", [LanguageModel, AuxiliaryLossPerMicroBatch])
def test_auxiliary_loss_scale_under_accumulation(kind: type[LanguageModel]) -> None:
    family = FAMILIES["mixture_of_depths"]
    subject = kind(family.config, rows=8)
    settings = Settings(steps=1, micro_batches=2)
    report = run_ranks(check, 2, subject, {}, None, settings)[0]
    if kind is LanguageModel:
        assert report.ok, report.table()
    else:
        assert "layers.1.predictor.up.weight" in report.disagreeing("gradient")
        assert not report.ok


def test_error_of_a_missing_or_misshapen_tensor_is_infinite() -> None:
    from parallel.parity import Trace, compare

    right = Trace(gradients={"a": torch.ones(2), "b": torch.ones(2)})
    wrong = replace(right, gradients={"a": torch.ones(3)})
    assert compare(right, wrong, mesh="").disagreeing("gradient") == ["a", "b"]
    nan = replace(right, gradients={"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    assert compare(right, nan, mesh="").disagreeing("gradient") == ["b"]
