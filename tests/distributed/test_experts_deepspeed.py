"""Experts under DeepSpeed's engine train as they do on one rank with plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from launch.run.errors import BadInput
from launch.run.experts import count_every_expert_once, declare_experts, expert_groups
from parallel.gradients import whole
from parallel.mesh import Mesh
from parallel.parity import Report, Settings, Trace, check_on_ranks
from tests.distributed.test_experts import SUBJECTS
from tests.ranks import run_ranks


class DeepSpeedTrainer:
    """SGD as parity's PlainTrainer has it, stepped by DeepSpeed."""

    stage = 0

    def __init__(self, model: nn.Module, mesh: Mesh, settings: Settings) -> None:
        import deepspeed

        self.model, self.mesh, self.norm = model, mesh, float("nan")
        declare_experts(model, mesh, zero_stage=self.stage)
        groups = expert_groups([{"params": [p for p in model.parameters() if p.requires_grad]}])
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": settings.micro_batches,
                "gradient_clipping": settings.clip,
                "zero_optimization": {"stage": self.stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
            dist_init_required=False,
        )
        if self.stage == 0:
            count_every_expert_once(self.engine, mesh, self._keep)

    def _keep(self, norm: Tensor) -> None:
        self.norm = float(norm)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()

    def finish(self, trace: Trace, *, first: bool) -> None:
        norm = self.norm if self.stage == 0 else float(self.engine.get_global_grad_norm())
        trace.norms.append(norm)

    def weights(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: whole(p, p, self.mesh).detach().float().clone() for name, p in named}


def check(name: str, stage: int, meshes: list[dict[str, int]], micro_batches: int) -> list[Report]:
    trainer = type("Trainer", (DeepSpeedTrainer,), {"stage": stage})
    settings = Settings(micro_batches=micro_batches)
    return check_on_ranks(SUBJECTS[name], meshes, settings, make_trainer=trainer)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "ranks", "degree", "micro_batches"),
    [
        ("top-2", 2, 2, 1),
        ("top-2", 4, 2, 2),
        ("one expert takes everything", 4, 4, 1),
        ("frozen experts", 2, 2, 2),
    ],
)
def test_deepspeed_trains_spread_experts_as_one_rank_does(
    name: str, ranks: int, degree: int, micro_batches: int, stage: int
) -> None:
    reports = run_ranks(check, ranks, name, stage, [{"expert": degree}], micro_batches, timeout=120)
    (report,) = reports[0]
    wrong = [row for row in report.rows if row.error > 1e-5 and row.quantity != "gradient"]
    assert not wrong, report.table()


def refused() -> str:
    mesh = Mesh.create(expert=2)
    try:
        declare_experts(nn.Linear(2, 2), mesh, zero_stage=3)
    except BadInput as error:
        return str(error)
    return ""


def test_zero_3_is_refused_in_one_clear_line() -> None:
    for message in run_ranks(refused, 2):
        assert message.startswith("parallel.expert=2: must be 1 with ZeRO 3")
