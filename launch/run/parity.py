"""A parity check's subject, a recipe; and its trainer, DeepSpeed: SGD, clipping, ZeRO, any mesh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import RoutingTape
from launch.run.builds import build_no_collectives
from launch.run.experts import count_every_expert_once, declare_experts, expert_groups
from launch.run.sections import RunConfig
from launch.run.zero import check_zero
from launch.tasks.registry import task_class
from parallel.draws import drawing_part
from parallel.gradients import whole
from parallel.mesh import Mesh
from parallel.parity import Batch, MakeTrainer, Settings, Share, Trace


class DeepSpeedTrainer:
    """Steps a model by DeepSpeed; see `parallel.parity.Trainer`.

    Args:
        model, mesh, settings: see `parallel.parity.train`.
        zero_stage: 0 to 3.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, settings: Settings, *, zero_stage: int
    ) -> None:
        import deepspeed

        check_zero(zero_stage, tensor=mesh.tensor, expert=mesh.expert)
        build_no_collectives()
        self.model, self.mesh, self.stage = model, mesh, zero_stage
        self._norm = float("nan")
        declare_experts(model, mesh, zero_stage=zero_stage)
        groups = expert_groups([{"params": [p for p in model.parameters() if p.requires_grad]}])
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=mesh.mpu,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": settings.micro_batches,
                "gradient_clipping": settings.clip,
                # Even the small weights of a test are sharded.
                "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
        )
        self._stepped = 0
        self._gradients: dict[str, Tensor] = {}
        if zero_stage == 0:
            count_every_expert_once(self.engine, mesh, self._keep)
        self._micro_batches = settings.micro_batches

    def _keep(self, norm: Tensor) -> None:
        self._norm = float(norm)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self._stepped += 1
        if self._stepped == self._micro_batches:
            # ZeRO 2 and 3 drop gradients when they step.
            self._gradients = self._whole_gradients()
        self.engine.step()
        if self.stage:
            # As the engine's forward would, which subjects do not call: without it ZeRO 3 takes
            # every micro-batch for the first and forgets those before.
            self.engine.optimizer.clear_backward_seen_flag()

    def finish(self, trace: Trace, *, first: bool) -> None:
        if first:
            trace.gradients = self._gradients
        trace.norms.append(
            self._norm if self.stage == 0 else float(self.engine.get_global_grad_norm())
        )

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        out = {}
        for name, parameter in self.model.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            own = (parameter if full is None else full).detach().float()
            out[name] = whole(own, parameter, self.mesh).clone()
        return out

    def _whole_gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        out = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
                if grad is not None:
                    # Under ZeRO 3 a parameter is empty outside of forwards.
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    own = grad.detach().float().view(shape)
                    out[name] = whole(own, parameter, self.mesh).clone()
        return out


def deepspeed_trainer(zero_stage: int) -> MakeTrainer:
    """What `check_on_ranks(make_trainer=…)` takes."""
    return partial(DeepSpeedTrainer, zero_stage=zero_stage)


@dataclass(frozen=True)
class RecipeSubject:
    """The model, data and loss of a recipe. On a CPU in float32, with every dropout at work."""

    config: RunConfig
    rows: int
    device: str = "cpu"

    def _task(self, mesh: Mesh) -> Any:
        config = self.config
        return task_class(config.task)(config, mesh=mesh, device=torch.device(self.device))

    def _rows(self, step: int) -> range:
        return range(step * self.rows, (step + 1) * self.rows)

    def build(self, mesh: Mesh) -> nn.Module:
        return self._task(mesh).build_model()

    def batch(self, step: int) -> Batch:
        task = self._task(Mesh.single())
        return task.on_device(task.batch(self._rows(step)), self.device)

    def tokens(self, step: int) -> int:
        return self._task(Mesh.single()).tokens(self._rows(step))

    @contextmanager
    def _draws(self, batch: Batch, index: int, share: Share) -> Iterator[None]:
        """Random draws of tokens are those of the whole batch, however it is split."""
        torch.manual_seed(self.config.train.seed)
        rows = len(next(iter(batch.values())))
        first = (share.mesh.data_rank * share.micro_batches + index) * rows
        with drawing_part(first, rows, rows * share.mesh.data * share.micro_batches):
            yield

    def losses(
        self, model: nn.Module, micro_batches: Sequence[Batch], share: Share
    ) -> Iterator[Tensor]:
        task = self._task(share.mesh)
        scope = BatchScope.of(share.mesh, share.tokens, micro_batches=share.micro_batches)
        if share.micro_batches > 1:
            scope.start_census()
            for index, batch in enumerate(micro_batches):
                with self._draws(batch, index, share), torch.no_grad(), RoutingTape(scope=scope):
                    task.loss_sum(model, batch)
            scope.finish_census()
        for index, batch in enumerate(micro_batches):
            with self._draws(batch, index, share), RoutingTape(model, scope=scope) as tape:
                total = task.loss_sum(model, batch)
            for record in tape.records:
                if record.chosen is not None:
                    share.choices.add(record.name, record.chosen, record.scores)
            yield total * (scope.replicas / share.tokens) + tape.loss()
