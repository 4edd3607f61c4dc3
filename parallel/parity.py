"""Parity: one model on one rank and on a mesh; are loss, gradients, norm and update the same?

Wrong gradients under parallelism are silent: the loss still falls. This trains a model of yours
for a few steps twice, whole on one rank and split over a mesh, from the same weights on the same
batches, and compares everything by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checks.choices import Notes
from parallel.checks.traces import Report, Row, Trace, compare
from parallel.gradients import average_gradients, clip_gradients, whole
from parallel.mesh import Mesh, data_degree
from parallel.ranks import on_ranks

__all__ = [
    "Batch",
    "PlainTrainer",
    "Report",
    "Row",
    "Settings",
    "Share",
    "Subject",
    "Trace",
    "check_on_ranks",
    "check_parity",
    "compare",
]

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Share:
    """What a loss needs to know of the global batch of which it sees a part.

    Attributes:
        tokens: in the global batch; what losses are means over.
        mesh: how the ranks share the model.
        micro_batches: accumulation steps.
        choices: where `losses` may note what routers chose, before it yields each loss: choices
            are then compared before gradients are.
    """

    tokens: int
    mesh: Mesh
    micro_batches: int = 1
    choices: Notes = field(default_factory=Notes)


class Subject(Protocol):
    """What is checked: a model, its batches and its loss."""

    def build(self, mesh: Mesh) -> nn.Module:
        """The model, drawn from torch's default generator, which has been seeded."""
        ...

    def batch(self, step: int) -> Batch:
        """The global batch of a step, rows first; a pure function of the step."""
        ...

    def tokens(self, step: int) -> int:
        """Tokens of a step's batch, what its loss is a mean over."""
        ...

    def losses(
        self, model: nn.Module, micro_batches: Sequence[Batch], share: Share
    ) -> Iterator[Tensor]:
        """The loss of each micro-batch of this rank; each is differentiated before the next.

        Averaged over micro-batches and replicas they are the global loss. For a mean over tokens:
        the sum over these rows x replicas x micro-batches / share.tokens.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """How a subject is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate, momentum: of SGD, large enough to see an update beside the rounding of the
            weight that it is added to. Adam divides by the gradient's size, which makes rounding
            errors of tiny gradients as large as an update; SGD shows an error as large as it is.
        clip: largest gradient norm; small enough to be active.
        micro_batches: accumulation steps on the mesh (the reference takes the batch at once).
        seed: of the weights.
        dtype: of weights and activations.
    """

    steps: int = 3
    learning_rate: float = 1.0
    momentum: float = 0.9
    clip: float = 0.5
    micro_batches: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float32


class Trainer(Protocol):
    """What steps a model: plain torch here, DeepSpeed in launch.parity."""

    def backward(self, loss: Tensor) -> None: ...

    def finish(self, trace: Trace, *, first: bool) -> None:
        """After the last micro-batch: record gradients if `first`, the norm; clip and step."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Whole, by name. A collective."""
        ...


MakeTrainer = Callable[[nn.Module, Mesh, Settings], Trainer]
Fault = Callable[[nn.Module, Mesh], AbstractContextManager[object]]


class PlainTrainer:
    """Averages, clips and steps as a plain torch loop does, with `parallel.gradients`."""

    def __init__(self, model: nn.Module, mesh: Mesh, settings: Settings) -> None:
        self.model, self.mesh, self.settings = model, mesh, settings
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.learning_rate, momentum=settings.momentum
        )

    def backward(self, loss: Tensor) -> None:
        (loss / self.settings.micro_batches).backward()

    def finish(self, trace: Trace, *, first: bool) -> None:
        average_gradients(self.model.parameters(), self.mesh)
        if first:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    trace.gradients[name] = whole(parameter.grad, parameter, self.mesh).clone()
        norm = clip_gradients(self.model.parameters(), self.settings.clip, self.mesh)
        trace.norms.append(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: whole(p, p, self.mesh).detach().clone() for name, p in named}


def train(
    subject: Subject,
    mesh: Mesh,
    settings: Settings,
    make_trainer: MakeTrainer = PlainTrainer,
    *,
    fault: Fault | None = None,
) -> Trace:
    """Train on a mesh and keep what happened. A collective over the mesh."""
    torch.manual_seed(settings.seed)
    model = subject.build(mesh).to(settings.dtype)
    broken = nullcontext() if fault is None else fault(model, mesh)
    trainer = make_trainer(model, mesh, settings)
    trace = Trace()
    before = trainer.weights()
    with broken:
        for step in range(settings.steps):
            trace.losses.append(_one_step(subject, model, trainer, trace, mesh, settings, step))
            if step == 0:
                after = trainer.weights()
                trace.updates = {name: after[name] - before[name] for name in before}
    trace.weights = trainer.weights()
    return trace


def _one_step(
    subject: Subject,
    model: nn.Module,
    trainer: Trainer,
    trace: Trace,
    mesh: Mesh,
    settings: Settings,
    step: int,
) -> float:
    batch = subject.batch(step)
    share = Share(subject.tokens(step), mesh, settings.micro_batches)
    rows = len(next(iter(batch.values())))
    parts = mesh.data * settings.micro_batches
    if rows % parts:
        raise ValueError(f"batch of {rows} rows: must be a multiple of {parts} micro-batches")
    total = torch.zeros((), dtype=torch.float64)
    size = rows // parts
    first = mesh.data_rank * settings.micro_batches * size
    starts = range(first, first + settings.micro_batches * size, size)
    own = [{name: x[start : start + size] for name, x in batch.items()} for start in starts]
    for loss in subject.losses(model, own, share):
        total += loss.detach().double() / (mesh.replicas * settings.micro_batches)
        trainer.backward(loss)
        share.choices.next()
    trace.choices.append(share.choices.whole(mesh))
    trainer.finish(trace, first=step == 0)
    if mesh.batch_group is not None:
        dist.all_reduce(total, group=mesh.batch_group)
    return float(total)


def check_parity(
    subject: Subject | str,
    meshes: Sequence[Mapping[str, Any]],
    settings: Settings | None = None,
    *,
    tolerance: float = 1e-5,
    make_trainer: MakeTrainer = PlainTrainer,
    fault: Fault | None = None,
    cuda: bool = False,
    timeout: float = 600.0,
) -> list[Report]:
    """Compare meshes with one rank; starts the ranks itself.

    Args:
        subject: what is checked, picklable; or `module:function`, which returns it.
        meshes: arguments of `Mesh.create` for each mesh. `data` says how many ranks there are; by
            default as few as the other axes need.
        settings, tolerance, make_trainer, fault: see `check_on_ranks`.
        cuda: one GPU a rank, else gloo on the CPU.
        timeout: seconds for all meshes of one number of ranks.

    Returns:
        One report a mesh, in order.

    Raises:
        ValueError: a mesh that cannot be, or a subject that cannot be imported.
        RuntimeError: a rank failed; its message.
    """
    if isinstance(subject, str):
        _imported(subject)
    completed = [_completed(mesh) for mesh in meshes]
    by_world: dict[int, list[int]] = {}
    for index, mesh in enumerate(completed):
        world = int(mesh["data"]) * int(mesh["tensor"]) * int(mesh["context"])
        by_world.setdefault(world, []).append(index)
    reports: dict[int, Report] = {}
    for world, indices in by_world.items():
        chosen = [completed[index] for index in indices]
        call = partial(_check_imported, tolerance=tolerance, make_trainer=make_trainer, fault=fault)
        found = on_ranks(call, world, subject, chosen, settings, cuda=cuda, timeout=timeout)
        reports.update(zip(indices, found, strict=True))
    return [reports[index] for index in range(len(completed))]


def _check_imported(
    subject: Subject | str,
    meshes: Sequence[Mapping[str, Any]],
    settings: Settings | None,
    **options: Any,
) -> list[Report]:
    subject = _imported(subject) if isinstance(subject, str) else subject
    return check_on_ranks(subject, meshes, settings, **options)


def _imported(name: str) -> Subject:
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"subject={name}: must be module:function")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"subject={name}: cannot be imported: {error}") from None
    finally:
        sys.path.pop(0)


def _completed(mesh: Mapping[str, Any]) -> dict[str, Any]:
    """With every axis; `data` as small as the experts allow where it is not given."""
    axes = {name: int(mesh.get(name, 1)) for name in ("tensor", "context", "expert")}
    data = int(mesh.get("data", -(-axes["expert"] // max(axes["context"], 1))))
    data_degree(data * axes["tensor"] * axes["context"], **axes)
    rest: dict[str, Any] = {"sequence_parallel": bool(mesh.get("sequence_parallel"))}
    if "context_attention" in mesh:
        rest["context_attention"] = mesh["context_attention"]
    return {**axes, "data": data, **rest}


def check_on_ranks(
    subject: Subject,
    meshes: Sequence[Mapping[str, Any]],
    settings: Settings | None = None,
    *,
    tolerance: float = 1e-5,
    make_trainer: MakeTrainer = PlainTrainer,
    fault: Fault | None = None,
) -> list[Report]:
    """Compare meshes of the current process group with one rank. Every rank of it calls this.

    Args:
        subject: what is checked.
        meshes: arguments of `Mesh.create`, one mapping a mesh.
        settings: how it is trained.
        tolerance: largest relative error that counts as agreement.
        make_trainer: what trains on the meshes; the reference is plain torch.
        fault: breaks the model on purpose, to show that the check catches it.

    Returns:
        One report a mesh, on rank 0; on other ranks an empty list.
    """
    settings = Settings() if settings is None else settings
    first = dist.get_rank() == 0
    whole_batch = Settings(**{**settings.__dict__, "micro_batches": 1})
    reference = train(subject, Mesh.single(), whole_batch) if first else None
    reports = []
    for degrees in meshes:
        mesh = Mesh.create(**degrees)
        trace = train(subject, mesh, settings, make_trainer, fault=fault)
        if reference is not None:
            reports.append(compare(reference, trace, mesh=describe(mesh), tolerance=tolerance))
    return reports


def describe(mesh: Mesh) -> str:
    """As it is written on the command line: `data=2,tensor=2,sequence_parallel=true`."""
    axes = [("data", mesh.data), ("tensor", mesh.tensor), ("context", mesh.context)]
    axes.append(("expert", mesh.expert))
    words = [f"{name}={size}" for name, size in axes if size > 1]
    words += ["sequence_parallel=true"] if mesh.sequence_parallel else []
    words += ["context_attention=ring"] if mesh.ring else []
    return ",".join(words) or "data=1"
