"""What a checkpoint of a run holds, and how any program reads one.

    step-00000180/
        run.yaml               the configuration, every key
        state.json             RunState: where the run was
        model.safetensors      all weights, float32, under the model's own names
        task.safetensors       what the task keeps besides (an average of the weights); optional
        engine/…               DeepSpeed's shards of weights and optimizer, one set a rank
        optimizer.safetensors  instead of engine/: whole Adam moments, `exp_avg/NAME`,
                               `exp_avg_sq/NAME`; what growth and resharding write
        manifest.json          sizes and checksums (parallel.checkpoint)

`model.safetensors` serves every reader that does not continue the optimizer; it is the same
whatever the ranks and the ZeRO stage.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.checkpoint.contents import (
    OPTIMIZER,
    TASK_STATE,
    WEIGHTS,
    newest_checkpoint,
    problem_with_checkpoint,
    read_state,
)
from launch.checkpoint.shards import whole_moments
from launch.checkpoint.state import RunState, WholeState
from launch.run.config import load_saved, save_resolved
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.run.sizes import without_memory
from launch.run.terminal import announced
from launch.run.writable import follow_umask
from launch.tasks.registry import make_task
from parallel.checkpoint import MANIFEST, FailedElsewhere
from parallel.mesh import Mesh

# DeepSpeed's names of optimizers whose state is a step, exp_avg and exp_avg_sq.
_ADAMS = ("adam", "adamw", "lamb", "muadam", "muadamw")


def find_checkpoint(path: str | Path, *, checksums: bool = True) -> Path:
    """The checkpoint at `path`: one itself, or the newest intact one of a run's folder.

    Args:
        path: of a checkpoint, of a run, or of a run's checkpoints.
        checksums: False trusts the sizes of its files.

    Raises:
        BadInput: there is none, or the one named is damaged.
    """
    path = Path(path).expanduser()
    if os.path.isfile(path):  # False, too, where a name is too long to be one
        raise BadInput(f"{path}: is a file, must be the folder of a checkpoint or of a run")
    if not os.path.exists(path):
        raise BadInput(f"{path}: does not exist")
    with announced(f"checking what {path} holds"):
        if (path / MANIFEST).is_file() or (path / "state.json").is_file():
            problem = problem_with_checkpoint(path, checksums=checksums)
            if problem is not None:
                raise BadInput(f"{path}: is not an intact checkpoint: {problem}")
            return path
        for root in (path / "checkpoints", path):
            found = newest_checkpoint(root, checksums=checksums)
            if found is not None:
                return found
    raise BadInput(f"{path}: holds no intact checkpoint")


def load_model(path: str | Path, *, mesh: Mesh | None = None) -> tuple[nn.Module, RunConfig]:
    """Rebuild the model of a checkpoint, with its weights, on the CPU in float32.

    Args:
        path: a checkpoint, or the folder of a run (its newest intact checkpoint).
        mesh: one rank by default.

    Returns:
        The model in evaluation mode, and the run's configuration.

    Raises:
        BadInput: no intact checkpoint there, or its weights are not those of its configuration.
    """
    folder = find_checkpoint(path)
    config = load_saved(folder)
    with announced(f"reading the model of {folder}"):
        check_weights(config, folder, mesh=mesh)
        model = make_task(config, mesh=mesh).build_model()
        load_weights(model, load_file(folder / WEIGHTS), source=folder)
    return model.eval(), config


def check_weights(config: RunConfig, folder: Path, *, mesh: Mesh | None = None) -> None:
    """Check that a checkpoint has the weights of its configuration, before memory is taken.

    Raises:
        BadInput: names the first parameter that differs.
    """
    with without_memory() as device:
        model = make_task(config, mesh=mesh, device=device).build_model()
    check_same_model(model, folder)


def load_weights(model: nn.Module, weights: dict[str, Tensor], *, source: Path) -> None:
    """Copy weights into a model that must have exactly these.

    Raises:
        BadInput: names the first parameter that differs.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problem = first_difference(model, shapes)
    if problem is not None:
        raise BadInput(f"{source}: is a checkpoint of another model: {problem}")
    for name, tensor in named_tensors(model).items():
        held, wanted = weights[name].dtype, tensor.dtype
        if held.is_floating_point != wanted.is_floating_point:
            raise BadInput(f"{source}: {name} holds {held}, must hold {wanted}")
    model.load_state_dict(weights, strict=False)


def first_difference(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The first parameter or buffer that a model and a checkpoint do not share; None: the same."""
    expected = named_tensors(model)
    for name, tensor in expected.items():
        if name not in shapes:
            return f"{name} {list(tensor.shape)} is not in it"
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} is {list(shapes[name])} in it, {list(tensor.shape)} in this model"
    for name, shape in shapes.items():
        if name not in expected:
            return f"{name} {list(shape)} is not in this model"
    return None


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones under their first name only."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name not in aliases:
            tensors[name] = tensor
    return tensors


def check_same_model(model: nn.Module, folder: Path) -> None:
    """Check from a checkpoint's header alone that it is of this model.

    Raises:
        BadInput: names the first parameter that differs.
    """
    problem = first_difference(model, weight_shapes(folder))
    if problem is not None:
        raise BadInput(f"{folder}: is a checkpoint of another model: {problem}")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's weights, from the file's header."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def write_description(folder: Path, state: RunState, config: RunConfig) -> None:
    """Write state.json and run.yaml."""
    text = json.dumps(dataclasses.asdict(state), indent=1)
    (folder / "state.json").write_text(text, encoding="utf-8")
    save_resolved(config, folder / "run.yaml")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as a safetensors file."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    follow_umask(path)


def shard_format(config: RunConfig) -> tuple[bool, bool, str]:
    """What DeepSpeed's shards depend on besides ranks and ZeRO stage: bf16, fp16, optimizer."""
    settings = config.deepspeed
    bf16, older_name, fp16 = (
        bool((settings.get(key) or {}).get("enabled")) for key in ("bf16", "bfloat16", "fp16")
    )
    return bf16 or older_name, fp16, (settings.get("optimizer") or {}).get("type", "").lower()


def check_moments_fit(writer: RunConfig, reader: RunConfig, folder: Path) -> None:
    """Check that moments can go as whole tensors from one run's optimizer into another's.

    Raises:
        BadInput: one of the two does not keep exactly Adam's.
    """
    # Without a section of its own the optimizer is torch's AdamW.
    wrote, reads = (
        (config.deepspeed.get("optimizer") or {}).get("type", "AdamW")
        for config in (writer, reader)
    )
    for name in (wrote, reads):
        if name.lower() not in _ADAMS:
            raise BadInput(
                f"deepspeed.optimizer.type={reads}: {folder} is of {wrote}, and the state of "
                f"{name} continues only with the same optimizer, precision, ranks and ZeRO stage; "
                "set these back, or start anew with checkpoint.resume=never"
            )


def write_problem(error: Exception) -> str | None:
    """Why a checkpoint was not written, in a few words; None: the error is about something else.

    An error that another rank met is one, whatever it was: that rank tells more.
    """
    said = " ".join(str(error).split())
    # Of torch's own writer, which does not know why.
    of_torch = "PytorchStreamWriter" in said or "inline_container" in said
    known = isinstance(error, OSError | SafetensorError | FailedElsewhere | FloatingPointError)
    if not of_torch and not known:
        return None
    if os.strerror(errno.ENOSPC).lower() in said.lower():
        return "no space left"
    return said


def write_whole(folder: Path, whole: WholeState) -> None:
    """Write a checkpoint that a run of any ranks and ZeRO stage continues from.

    To be called inside `parallel.checkpoint.save_atomically`.
    """
    save_tensors(whole.weights, folder / WEIGHTS)
    moments = {f"exp_avg/{name}": tensor for name, tensor in whole.exp_avg.items()}
    moments |= {f"exp_avg_sq/{name}": tensor for name, tensor in whole.exp_avg_sq.items()}
    save_tensors(moments, folder / OPTIMIZER)
    if whole.task_state:
        save_tensors(whole.task_state, folder / TASK_STATE)
    write_description(folder, whole.state, whole.config)


def read_whole(folder: Path, *, moments: bool = True) -> WholeState:
    """All of a checkpoint as whole tensors, whatever ranks and ZeRO stage wrote it.

    Args:
        folder: the checkpoint (see `find_checkpoint`).
        moments: False leaves the optimizer's out.
    """
    found: dict[str, Tensor] = {}
    if moments and (folder / OPTIMIZER).is_file():
        found = load_file(folder / OPTIMIZER)
    elif moments:
        with announced(f"putting the moments of {folder} together by DeepSpeed"):
            found = whole_moments(folder)
    parts: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for key, tensor in found.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    task_state = load_file(folder / TASK_STATE) if (folder / TASK_STATE).is_file() else {}
    return WholeState(
        weights=load_file(folder / WEIGHTS),
        state=read_state(folder),
        config=load_saved(folder),
        task_state=task_state,
        **parts,
    )
