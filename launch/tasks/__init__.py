"""Task: what a run learns. The train loop knows nothing else about models or data.

A task names two config dataclasses, builds a model and turns *rows* into batches and losses. The
training stream is an infinite sequence of rows (a text window, an image with its noise); row n is
a pure function of (seed, n). Step s takes the next `train.batch_size` rows, and each rank and
micro-batch a slice of them. So a run resumes exactly, and does not depend on the number of ranks.

A language model needs the first six methods. A diffusion model also keeps an average of its
weights (`after_step`, `shared_state`) and draws samples (`report`). A model that grows between two
phases of a run fits the old state to the new model (`adapt`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.flops import Work
from adaptive.observe.metric_log import MetricLog
from launch.checkpoint.state import WholeState
from launch.run.sections import RunConfig
from parallel.mesh import Mesh

Batch = Mapping[str, Tensor]
"""Tensors of some rows, rows first. The loop moves them to the device and gives them to losses,
but for those that `Task.on_host` names."""

Sums = dict[str, tuple[Tensor, int]]
"""metric -> (sum over this rank's valid tokens or rows, their count)."""


class TrainedModel(Protocol):
    """What a task may ask of the engine that trains its model.

    Attributes:
        model: from `Task.build_model` (under ZeRO 3 its parameters are empty outside forwards).
        mesh: how the ranks share it.
        device: where it is.
    """

    @property
    def model(self) -> nn.Module: ...

    mesh: Mesh
    device: torch.device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter once (tied ones under their first name)."""

    def forward(self, batch: Batch, function: Callable[[nn.Module, Batch], Any]) -> Any:
        """`function(model, batch)` on the device. Collective under ZeRO 3."""

    def train(self, mode: bool = True) -> None:
        """As the module's."""


class Task(ABC):
    """What the train loop asks of a task. One instance lives on every rank for a phase of a run.

    Class attributes:
        model_config, data_config: dataclasses of the sections `model` and `data`.
        sections: dataclasses of further sections, of those that `OF_SOME_TASKS` names.
        on_host: names of a batch's tensors that stay on the host: they decide shapes.

    Args:
        config: of this phase of the run.
        mesh: how the ranks share the model.
        device: where batches and the model go.
    """

    model_config: ClassVar[type]
    data_config: ClassVar[type]
    sections: ClassVar[dict[str, type]] = {}
    on_host: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device

    @classmethod
    @abstractmethod
    def check(cls, config: RunConfig) -> None:
        """Check what the dataclasses cannot: that data exist, that sections fit one another.

        Runs once before any rank starts, and may build caches. Raises BadInput.
        """

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, float32, from torch's default generator (the loop seeds it)."""

    def check_first_weights(self) -> None:  # noqa: B027
        """Check, before any rank starts, that `first_weights` can be made. Raises BadInput."""

    def first_weights(self) -> dict[str, Tensor] | None:
        """All tensors of the model that a run without a checkpoint begins with, float32.

        The same on every rank. None: those of `build_model`.
        """
        return None

    @abstractmethod
    def batch(self, rows: range) -> Batch:
        """Training rows of the stream, on the CPU. A pure function of (seed, rows).

        Called in a thread of its own while the model computes the step before: it must leave
        global generators alone (torch's is checked, and BadInput raised), and draw from
        `row_generator` or another generator of its own.
        """

    @classmethod
    def on_device(cls, batch: Batch, device: torch.device | str) -> Batch:
        """The batch where `loss_sum` and `validation_sums` want it."""
        return {
            name: tensor if name in cls.on_host else tensor.to(device)
            for name, tensor in batch.items()
        }

    @abstractmethod
    def tokens(self, rows: range) -> int:
        """Valid tokens in training rows: what auxiliary losses are means over. Needs no tensor."""

    def targets(self, rows: range) -> int:
        """What the task's loss over training rows is a mean over; by default, their tokens."""
        return self.tokens(rows)

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the loss over the batch's targets, differentiable, float32 scalar.

        `model` is the module from `build_model`; auxiliary losses go to the current RoutingTape.
        """

    def training_sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum and count, on this rank since the last call, of losses of kinds of training rows.

        The same names on every rank; added up, `NAME` becomes `loss/train/NAME`.
        """
        return {}

    def work(self, batch: Batch) -> Work | None:
        """What a forward of the batch computes, for `adaptive.flops`; None: not counted."""
        return None

    @property
    def validation_rows(self) -> int:
        """Rows of the fixed held-out set; 0: no evaluation."""
        return 0

    def validation_batch(self, rows: range) -> Batch:
        """Held-out rows, on the CPU."""
        raise NotImplementedError

    def validation_sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sums and counts of metrics over held-out rows. The model is in evaluation mode.

        The loop adds them over all ranks and divides: `loss` becomes `validation/loss`.
        """
        raise NotImplementedError

    def adapt(self, whole: WholeState) -> WholeState:
        """Fit the state that the phase before ended with to this phase's model (growth).

        Asked only when their parameters differ; the default changes nothing, which ends the run.
        """
        return whole

    def start_phase(self, engine: TrainedModel) -> None:  # noqa: B027
        """The engine holds its weights: make what follows them (an average of the weights)."""

    def after_step(self, engine: TrainedModel, step: int) -> None:  # noqa: B027
        """An optimizer step has been taken. Every rank calls it."""

    def shared_state(self, engine: TrainedModel) -> dict[str, Tensor]:
        """Full tensors to keep in checkpoints beside the weights, the same whatever the ranks.

        Collective; what rank 0 returns is written (task.safetensors).
        """
        return {}

    def load_shared_state(self, engine: TrainedModel, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take back what `shared_state` gave, at any number of ranks and ZeRO stage."""

    def report(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:  # noqa: B027
        """Write images or texts at an evaluation. Every rank calls it; rank 0 has the log."""

    def sample(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:  # noqa: B027
        """Write texts that the model makes, as `monitor.samples` asks. Every rank calls it."""

    def generation_command(self, checkpoint: Path) -> str | None:
        """The command that generates text or images from a checkpoint, printed at a run's end."""
        return None


def row_generator(seed: int, row: int, *, stream: int = 0) -> np.random.Generator:
    """Random numbers of one row, the same on whichever rank it falls.

    Args:
        seed: of the run.
        row: number of the row in the stream.
        stream: keeps apart several uses (order of data, noise, dropped labels).
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, row]))
