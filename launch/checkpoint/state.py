"""What a checkpoint tells of a run: where it was, and its tensors whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from launch.run.sections import RunConfig


@dataclass(frozen=True)
class RunState:
    """Where a run is.

    Attributes:
        step: optimizer steps taken, over all phases.
        phase: index of the phase.
        phase_step: steps taken in that phase.
        rows: rows of the training stream consumed.
        tokens: valid tokens trained on.
        executed_flops, nominal_flops: forward and backward, over all ranks.
        optimizer_steps: steps that the moments have seen (Adam's bias correction).
        ranks: world size that wrote the checkpoint.
        zero_stage: ZeRO stage that wrote it.
        left_out: steps that were not taken, since their gradient was not finite.
        rollbacks: times that the run went back to a checkpoint, since its loss had jumped.
        loss_mean, loss_variance: of the task's loss over the last steps, the newest weighing most.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    rows: int = 0
    tokens: int = 0
    executed_flops: float = 0.0
    nominal_flops: float = 0.0
    optimizer_steps: int = 0
    ranks: int = 1
    zero_stage: int = 0
    left_out: int = 0
    rollbacks: int = 0
    loss_mean: float = 0.0
    loss_variance: float = 0.0


@dataclass
class WholeState:
    """A run's state as whole tensors, for programs that change a model between runs.

    Attributes:
        weights: float32, under the model's names; tied weights once.
        exp_avg, exp_avg_sq: Adam's moments of the trained parameters; empty: not there.
        state: where the run was.
        config: of the run.
        task_state: what the task keeps besides.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    state: RunState
    config: RunConfig
    task_state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
