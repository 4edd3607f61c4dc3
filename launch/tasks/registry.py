"""Tasks by name: those of this project, and a user's own as `module:Class`."""

from __future__ import annotations

from typing import Any

import torch

from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.run.trust import imported
from launch.tasks import Task
from parallel.mesh import Mesh

_TASKS = {
    "language_model": "launch.tasks.language_model:LanguageModelTask",
    "hub_lm": "launch.tasks.hub_language_model:HubLanguageModelTask",
    "diffusion": "launch.tasks.diffusion:DiffusionTask",
    "image_classification": "launch.tasks.image_classification:ImageClassificationTask",
}


def task_class(name: str) -> type[Task]:
    """The task of that name, or a user's `module:Class`.

    Raises:
        UntrustedCode: only a checkpoint names it.
        BadInput: unknown name, or nothing importable there.
    """
    home = _TASKS.get(name, name)
    if ":" not in home:
        raise BadInput(f"task={name}: must be one of {', '.join(_TASKS)}, or module:Class")
    found: Any = imported("task", home)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise BadInput(f"task={name}: must be a subclass of launch.tasks.Task")
    return found


def make_task(
    config: RunConfig, *, mesh: Mesh | None = None, device: torch.device | str = "cpu"
) -> Task:
    """The task of a run.

    Args:
        config: of the run.
        mesh: one rank by default.
        device: where batches and the model go.
    """
    mesh = Mesh.single() if mesh is None else mesh
    return task_class(config.task)(config, mesh=mesh, device=torch.device(device))
