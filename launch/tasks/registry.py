"""Tasks by name: those of this project, and a user's own as `module:Class`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.tasks import Task
from parallel.mesh import Mesh

_TASKS = {
    "language_model": "launch.tasks.language_model:LanguageModelTask",
    "diffusion": "launch.tasks.diffusion:DiffusionTask",
}


def task_class(name: str) -> type[Task]:
    """The task of that name, or a user's `module:Class`.

    Raises:
        BadInput: unknown name, or nothing importable there.
    """
    home = _TASKS.get(name, name)
    module, colon, attribute = home.partition(":")
    if not colon:
        raise BadInput(f"task={name}: must be one of {', '.join(_TASKS)}, or module:Class")
    try:
        found: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"task={name}: cannot be imported: {error}") from None
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
