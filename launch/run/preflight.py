"""Everything about a run that can be checked before any rank starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from adaptive.flops import planned_flops
from launch.checkpoint.contents import newest_checkpoint
from launch.checkpoint.files import check_same_model, find_checkpoint, read_state
from launch.run.compiled import check_compiles
from launch.run.config import load_saved
from launch.run.deepspeed_section import check_deepspeed
from launch.run.engine import engine_settings
from launch.run.errors import BadInput
from launch.run.log import check_sinks, without_monitors
from launch.run.sections import RunConfig
from launch.run.sizes import without_memory
from launch.run.terminal import announced
from launch.run.writable import check_folder
from launch.run.zero import check_zero
from launch.tasks.registry import make_task, task_class
from parallel.mesh import Mesh, data_degree


def check_run(config: RunConfig, *, ranks: int, speak: bool = False) -> None:
    """Check that a run on that many ranks can begin. Builds the caches of its data.

    Args:
        config: of the run.
        ranks: how many.
        speak: say that operations will not be counted.

    Raises:
        BadInput: one line that names the value and the rule.
    """
    phases = config.phase_configs()
    axes = config.parallel
    try:
        data = data_degree(ranks, tensor=axes.tensor, context=axes.context, expert=axes.expert)
    except ValueError as error:
        raise BadInput(f"parallel.{error}") from None
    mesh = Mesh(**{**vars(axes), "data": data})
    check_folder("output", config.output)
    with announced("checking section deepspeed (which imports it)"):
        check_sinks(config)
        check_deepspeed(without_monitors(config))
    for phase in phases:
        stage = phase.deepspeed.get("zero_optimization", {}).get("stage", 0)
        check_zero(stage, tensor=axes.tensor, expert=axes.expert)
        engine_settings(phase, data)
        task_class(phase.task).check(phase)
        with announced("checking the model"):
            model = meta_model(phase, mesh)
        _check_memory(model)
        check_compiles(phase, model)
        _check_elements(model, stage)
        why = _uncounted(phase, model) if speak else None
        if why is not None:
            print(f"operations will not be counted: {why}", flush=True)
    # Sizes only: the run itself compares the checksums, once.
    source = starting_checkpoint(config, checksums=False)
    if source is not None:
        check_continues(config, source)
    elif config.checkpoint.weights is not None:
        weights = find_checkpoint(config.checkpoint.weights, checksums=False)
        check_same_model(meta_model(phases[0]), weights)
    else:
        make_task(phases[0], device="meta").check_first_weights()


def _uncounted(config: RunConfig, model: nn.Module) -> str | None:
    """Why a run will not count its operations, where a module of one's own does not say them."""
    task = make_task(config, device="meta")
    work = task.work(task.batch(range(1)))
    if work is None:
        return None
    try:
        planned_flops(model, work)
    except ValueError as error:
        return str(error)
    return None


def _check_elements(model: nn.Module, stage: int) -> None:
    """Refuse what DeepSpeed asserts against when ranks have started."""
    if stage != 3:
        return
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise BadInput(
                f"deepspeed.zero_optimization.stage=3: cannot shard {name} "
                f"{list(parameter.shape)}, which has no elements; use ZeRO 0, 1 or 2"
            )


def _check_memory(model: nn.Module) -> None:
    """Refuse weights that this machine cannot hold: each rank makes its part whole, then shards."""
    import psutil

    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    there = psutil.virtual_memory().total
    if needed > there:
        raise BadInput(
            f"model: {needed / 2**30:,.0f} GiB of weights for one rank, must be at most the "
            f"{there / 2**30:,.0f} GiB of this machine (launch.plan tells what a larger one needs)"
        )


def starting_checkpoint(config: RunConfig, *, checksums: bool = True) -> Path | None:
    """The checkpoint that a run starts from; None: from nothing.

    Args:
        config: of the run.
        checksums: False trusts the sizes of a checkpoint's files.

    Raises:
        BadInput: the one asked for is not there or damaged.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(Path(config.output) / "checkpoints", checksums=checksums)
    return find_checkpoint(resume, checksums=checksums)


def check_continues(config: RunConfig, source: Path) -> None:
    """Check that a run can go on from a checkpoint.

    Raises:
        BadInput: it is of another model (names the first parameter), or of a later phase.
    """
    state, phases = read_state(source), config.phase_configs()
    if state.phase >= len(phases):
        raise BadInput(f"{source}: ends phase {state.phase + 1}, this run has {len(phases)}")
    phase = phases[state.phase]
    try:
        check_same_model(meta_model(phase), source)
    except BadInput as error:
        advice = "start anew with checkpoint.resume=never or another output="
        if config.checkpoint.resume not in ("auto", "never"):
            # Anew, it would train without the weights that it is to start from.
            advice = "train it with the configuration beside it: launch.start --config …/run.yaml"
        raise BadInput(f"{error}; {advice}") from None


_OF_ADAMW = ("train.beta1", "train.beta2", "train.eps")


def changed_settings(config: RunConfig, source: Path) -> list[str]:
    """What a run computes with that the checkpoint it goes on from did not: "key: now, was then".

    Args:
        config: of the phase that continues.
        source: a checkpoint from inside that phase.
    """
    now, then = (_flat(one.resolved()) for one in (config, load_saved(source)))
    # An optimizer of section deepspeed has its own.
    idle = _OF_ADAMW if "optimizer" in config.deepspeed else ()
    return [
        f"{key}: {now.get(key)}, was {then.get(key)}"
        for key in {**now, **then}
        if key.split(".")[0] in ("task", "model", "data", "train", "average", "deepspeed")
        if now.get(key) != then.get(key) and key not in idle
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return found


def meta_model(config: RunConfig, mesh: Mesh | None = None) -> nn.Module:
    """The model without memory for its weights; one rank's part on a mesh of these sizes.

    Raises:
        BadInput: what its blocks refuse.
    """
    try:
        with without_memory() as device:
            return make_task(config, mesh=mesh, device=device).build_model()
    except BadInput:
        raise
    except (ValueError, OverflowError) as error:
        raise BadInput(f"model: {error}") from None
