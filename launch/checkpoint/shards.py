"""Whole optimizer moments out of, and into, DeepSpeed's shards."""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.checkpoint.contents import ENGINE as TAG
from launch.checkpoint.engine_files import only_data
from launch.run.config import load_saved
from launch.run.errors import BadInput
from launch.run.optimizer import parameter_groups
from launch.run.sizes import without_memory
from launch.run.writable import scratch_folder
from launch.tasks.registry import make_task

MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIX = "model."  # of parameters in DeepSpeed's files: launch.run.engine.Objective holds the model


def whole_moments(folder: Path) -> dict[str, Tensor]:
    """`exp_avg/NAME` and `exp_avg_sq/NAME` of a checkpoint with DeepSpeed's shards, float32.

    ZeRO shards go through DeepSpeed's own universal conversion. Without ZeRO the optimizer state is
    whole already, and only numbered: the numbers follow the order of the parameter groups.

    Raises:
        BadInput: DeepSpeed could not convert its files.
    """
    source = folder / TAG
    if not list(source.glob("*optim_states.pt")):
        return _numbered_moments(folder)
    with scratch_folder("universal-", near=folder.parent) as scratch:
        out = scratch / TAG
        _convert(source, out)
        moments = {}
        shapes = _shapes(folder)
        for kind in MOMENTS:
            for name, shape in shapes.items():
                if 0 in shape:  # in no shard
                    moments[f"{kind}/{name}"] = torch.zeros(shape)
                    continue
                file = out / "zero" / f"{PREFIX}{name}" / f"{kind}.pt"
                saved = torch.load(file, map_location="cpu", weights_only=True)
                tensor = saved["param"] if isinstance(saved, dict) else saved
                moments[f"{kind}/{name}"] = tensor.float().reshape(shape).clone()
    return moments


@contextmanager
def write_errors_last(deepspeed_engine: Any, folder: Path) -> Iterator[None]:
    """Raise what this rank's files in `folder` met after a save, not amid its collectives.

    The other ranks would wait for this one in DeepSpeed's last barrier.
    """
    errors: list[Exception] = []

    def attempted(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except Exception as error:
                errors.append(_cause(error, folder))

        return attempt

    files = deepspeed_engine.checkpoint_engine
    writers = [(files, "makedirs"), (files, "save"), (deepspeed_engine, "_copy_recovery_script")]
    for owner, name in writers:
        setattr(owner, name, attempted(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers:
            delattr(owner, name)  # the method of the class stands behind it
    if errors:
        raise errors[0]


def _cause(error: Exception, folder: Path) -> Exception:
    """What the system says, where torch's writer ("unexpected pos 128 vs 0") does not know why."""
    if isinstance(error, RuntimeError):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                probe.write(bytes(1 << 20))
        except OSError as cause:
            return cause
    return error


def _convert(source: Path, out: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), only_data(source):
            main(options)
    except BadInput:
        raise
    except Exception as error:  # whatever it meets in a file
        raise BadInput(f"{source}: DeepSpeed cannot convert it: {error}") from error


def set_whole(
    deepspeed_engine: Any,
    parameters: dict[str, nn.Parameter],
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    *,
    optimizer_steps: int,
) -> None:
    """Give an engine at any ZeRO stage whole weights and moments. Every rank calls it.

    Args:
        deepspeed_engine: DeepSpeed's.
        parameters: of the model, by name.
        weights: by name, float32; each parameter must be there.
        moments: `exp_avg/NAME` and `exp_avg_sq/NAME`; empty: moments start at zero.
        optimizer_steps: what Adam's bias correction counts.
    """
    optimizer = deepspeed_engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if moments:
        # Under ZeRO 3 the groups of the optimizer hold their shards during a step only.
        shards = getattr(optimizer, "fp32_partitioned_groups_flat", None)
        if shards is None:
            shards = [shard for group in inner.param_groups for shard in group["params"]]
        for shard in shards:
            # Adam makes its state at the first step; a run that continues is past it.
            inner.state[shard] = {
                "step": torch.tensor(float(optimizer_steps)),
                **{kind: torch.zeros_like(shard) for kind in MOMENTS},
            }
        link_moments(deepspeed_engine)
    with torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter, weights[name], None)
            stepped = moments and parameter.requires_grad and weights[name].numel()
            for kind in MOMENTS if stepped else ():
                whole = moments[f"{kind}/{name}"]
                if not _fill(parameter, whole, kind):
                    inner.state[parameter][kind].copy_(whole)


def link_moments(deepspeed_engine: Any) -> None:
    """Let parameters find their moments under ZeRO 1 and 2.

    DeepSpeed links them after its first group's first step, when the states of the other groups
    do not exist yet, and never again.
    """
    optimizer = deepspeed_engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _fill(parameter: nn.Parameter, whole: Tensor, kind: str | None) -> bool:
    """Copy this rank's part of a whole weight (`kind=None`) or moment; False where it is whole."""
    if hasattr(parameter, "ds_id"):
        # ZeRO 3: equal parts of the flattened tensor, the last one padded.
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        optimizer = getattr(parameter, "_z3_optimizer", None)
        rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        flat = whole.flatten().float()[rank * part : (rank + 1) * part]
        flat = nn.functional.pad(flat, (0, part - flat.numel())).to(parameter.device)
        if kind is None:
            parameter.ds_tensor.copy_(flat)  # type: ignore[attr-defined]
        if optimizer is not None and parameter.requires_grad:
            optimizer.set_local_hp_param(flat, parameter, kind)
        return True
    if kind is None:
        parameter.copy_(whole)
    if hasattr(parameter, "_hp_mapping"):
        setter = parameter.set_full_hp_param  # type: ignore[attr-defined]
        setter(whole.to(parameter.device, torch.float32), kind)
        return True
    return kind is None


def _numbered_moments(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / TAG).glob("mp_rank_*_model_states.pt"))
    if len(files) != 1:
        raise BadInput(f"{folder / TAG}: has {len(files)} files of model states, must have one")
    with only_data(files[0]):
        saved = torch.load(files[0], map_location="cpu", weights_only=True)["optimizer"]
    config = load_saved(folder)
    model = _meta_model(folder)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config.train)
    order = [names[id(p)] for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    moments = {}
    for number, name in enumerate(order):
        for kind in MOMENTS:
            moments[f"{kind}/{name}"] = saved["state"][number][kind].float()
    for name, parameter in model.named_parameters():
        for kind in MOMENTS if parameter.requires_grad and not parameter.numel() else ():
            moments[f"{kind}/{name}"] = torch.zeros(parameter.shape)
    return moments


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    model = _meta_model(folder)
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


def _meta_model(folder: Path) -> nn.Module:
    config = load_saved(folder)
    with without_memory() as device:
        return make_task(config, device=device).build_model()
