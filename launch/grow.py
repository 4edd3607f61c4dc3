"""Grow the parameter tokens of a TokenFormer checkpoint; its function and its optimizer go on.

    python -m launch.grow runs/small --tokens 128 --ffn-tokens 512 --output runs/large

Works on a checkpoint of any ranks and ZeRO stage, and writes one that any can continue. The
source is only read. Prints a receipt: the largest change of the logits on held-out data, the
parameters before and after, what became of the moments, and the command that continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: make the project importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.growth import Growth, grow, grown_config, grown_moments
from launch.checkpoint.files import (
    find_checkpoint,
    load_model,
    load_weights,
    named_tensors,
    read_whole,
    write_whole,
)
from launch.checkpoint.state import WholeState
from launch.run.config import load_saved, save_resolved
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts
from launch.run.sections import RunConfig
from launch.run.terminal import command
from launch.run.writable import check_folder
from launch.tasks import Task
from launch.tasks.registry import task_class
from parallel.checkpoint import newest_intact, save_atomically
from parallel.mesh import Mesh

LIMIT = 1e-5
"""Largest change of a logit that is rounding: float32 sums in another order."""


@dataclass(frozen=True)
class Receipt:
    """What growing a checkpoint did.

    Attributes:
        source, checkpoint: read and written.
        growth: the layers and parameters.
        logit_change: the largest, over `rows` held-out rows.
        largest_logit: by size, to compare with.
        kept, fresh: numbers whose Adam moments were kept, and those whose start at zero.
        optimizer_steps: Adam's step count, which goes on.
    """

    source: Path
    checkpoint: Path
    growth: Growth
    logit_change: float
    largest_logit: float
    rows: int
    kept: int
    fresh: int
    optimizer_steps: int
    config: RunConfig

    def __str__(self) -> str:
        growth, train = self.growth, self.config.train
        sizes = {}
        for name, (before, after) in growth.layers.items():
            sizes[name.rpartition(".")[2]] = f"{before} -> {after}"
        layers = ", ".join(f"{name} {size}" for name, size in sizes.items())
        moments = f"kept for {self.kept:,} numbers, zero for {self.fresh:,} new ones"
        if not self.kept:
            moments = "none in the source: all start at zero"
        run = self.config.output
        return "\n".join(
            [
                f"grown        {self.source} -> {self.checkpoint}",
                f"tokens       {layers}",
                f"parameters   {growth.parameters_before:,} -> {growth.parameters_after:,}",
                f"logits       largest change {self.logit_change:.1e} on {self.rows} held-out rows "
                f"(at most {LIMIT:.0e}; logits reach {self.largest_logit:.1f})",
                f"moments      {moments}; Adam's step count stays {self.optimizer_steps}",
                f"schedule     starts anew: warm-up of {train.warmup_steps} steps, "
                f"cosine to step {train.steps}",
                f"continue     {command('launch.start', '--config', Path(run) / 'run.yaml')}",
            ]
        )


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m launch.grow",
        description=__doc__,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or a run (its newest intact one)")
    for name, what in (
        ("tokens", "the projections"),
        ("ffn-tokens", "the feed-forwards"),
        ("output-tokens", "the output projections; default: --tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"parameter tokens of {what}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the grown run")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows to compare logits on")
    parser.add_argument("--steps", type=int, help="steps of the grown run; default: as before")
    if not torch.cuda.is_available():
        # A checkpoint's pickles load deepspeed, which would say that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with exit_on_bad_input():
        options = parser.parse_args(arguments)
        check_counts(options, "rows", "steps", "tokens", "ffn_tokens", "output_tokens")
        receipt = grow_checkpoint(
            options.checkpoint,
            Path(options.output),
            tokens=options.tokens,
            ffn_tokens=options.ffn_tokens,
            output_tokens=options.output_tokens,
            rows=options.rows,
            steps=options.steps,
        )
    print(receipt)


def grow_checkpoint(
    source: str | Path,
    output: Path,
    *,
    tokens: int | None = None,
    ffn_tokens: int | None = None,
    output_tokens: int | None = None,
    rows: int = 4,
    steps: int | None = None,
) -> Receipt:
    """Write a grown copy of a checkpoint as the beginning of the run `output`.

    Raises:
        BadInput: sizes that shrink or that a tensor degree does not divide, a model that cannot
            grow, an output that is in use, or logits that changed by more than `LIMIT`.
    """
    folder = find_checkpoint(source)
    check_output(output, folder)
    old = load_saved(folder)
    model_config = _wanted(old, tokens=tokens, ffn_tokens=ffn_tokens, output_tokens=output_tokens)
    config = replace(
        old,
        model=model_config,
        train=old.train if steps is None else replace(old.train, steps=steps),
        output=str(output),
        phases=[],
        checkpoint=replace(old.checkpoint, resume="auto"),
    )
    _check_divides(config)
    whole = read_whole(folder)
    before = _logits(folder, rows)
    grown, growth = grow_whole(whole, model_config)
    # A run of its own: one phase, from its beginning, on the data that come next.
    state = replace(grown.state, phase=0, phase_step=0)
    grown = replace(grown, config=config, state=state)
    root = output / "checkpoints"
    checkpoint = save_atomically(root, state.step, lambda to: write_whole(to, grown))
    change = float((_logits(checkpoint, rows) - before).abs().max())
    if not change <= LIMIT:
        shutil.rmtree(checkpoint)
        raise BadInput(f"{folder}: growing would change its logits by {change:.1e}")
    save_resolved(config, output / "run.yaml")
    kept = sum(moment.numel() for moment in whole.exp_avg.values())
    return Receipt(
        source=folder,
        checkpoint=checkpoint,
        growth=growth,
        logit_change=change,
        largest_logit=float(before.abs().max()),
        rows=before.shape[0],
        kept=kept,
        fresh=sum(moment.numel() for moment in grown.exp_avg.values()) - kept,
        optimizer_steps=state.optimizer_steps,
        config=config,
    )


def grow_whole(whole: WholeState, model_config: Any) -> tuple[WholeState, Growth]:
    """A run's state for a model with more parameter tokens.

    The new values are drawn from the run's seed and step, alike on every rank that calls this.

    Args:
        whole: the state, with its own configuration.
        model_config: section `model` of the larger one; only its sizes of Pattention are read.

    Returns:
        The state with grown weights and moments and `model_config`, and what grew.

    Raises:
        BadInput: the models are not two sizes of one TokenFormer.
    """
    sizes = getattr(model_config, "pattention", None)
    if sizes is None or getattr(whole.config.model, "pattention", None) is None:
        raise BadInput(
            f"task {whole.config.task}: its model has no model.pattention, so it cannot grow"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(whole.config.train.seed + whole.state.step)
        model = _task(whole.config).build_model()
        load_weights(model, whole.weights, source=Path("checkpoint"))
        try:
            growth = grow(
                model,
                tokens=sizes.tokens,
                ffn_tokens=sizes.ffn_tokens,
                output_tokens=sizes.output_tokens,
            )
        except ValueError as error:
            raise BadInput(f"model.pattention.{error}") from None
    weights = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    grown = replace(
        whole,
        weights=weights,
        config=replace(whole.config, model=model_config),
        exp_avg=grown_moments(whole.exp_avg, weights),
        exp_avg_sq=grown_moments(whole.exp_avg_sq, weights),
    )
    return grown, growth


def _wanted(config: RunConfig, **sizes: int | None) -> Any:
    """Section `model` with new sizes; BadInput where there is nothing that could have them."""
    pattention = getattr(config.model, "pattention", None)
    if pattention is None:
        raise BadInput(f"task {config.task}: its model has no model.pattention, so it cannot grow")
    if all(size is None for size in sizes.values()):
        raise BadInput("give a size: --tokens, --ffn-tokens")
    try:
        return replace(config.model, pattention=grown_config(pattention, **sizes))
    except ValueError as error:
        raise BadInput(f"model.pattention.{error}") from None


def _check_divides(config: RunConfig) -> None:
    tensor, pattention = config.parallel.tensor, config.model.pattention
    if pattention.split != "tokens":
        return
    for name in ("tokens", "ffn_tokens", "output_tokens"):
        size = getattr(pattention, name)
        if size is not None and size % tensor:
            raise BadInput(f"{name}={size}: must be a multiple of parallel.tensor={tensor}")


def check_output(output: Path, source: Path) -> None:
    """Check that a new run can begin in `output` without touching the source's.

    Raises:
        BadInput: it cannot be written, is the source's folder, or holds checkpoints.
    """
    check_folder("--output", output)
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    if output.resolve() in (source.resolve(), source.resolve().parent, run.resolve()):
        raise BadInput(f"--output={output}: must be another folder than the source's")
    if newest_intact(output / "checkpoints") is not None:
        raise BadInput(f"--output={output}: already holds checkpoints; choose a new folder")


def _logits(checkpoint: Path, rows: int) -> Tensor:
    """Logits of the run's held-out rows by the checkpoint's model: [rows, S, V]."""
    model, config = load_model(checkpoint)
    task = _task(config)
    batch = task.validation_batch(range(min(rows, task.validation_rows)))
    if "input_ids" not in batch:
        raise BadInput(f"task {config.task}: its batches have no input_ids to compare logits on")
    return _evaluated(model, batch["input_ids"])


@torch.no_grad()
def _evaluated(model: nn.Module, input_ids_BS: Tensor) -> Tensor:
    logits_BSV: Tensor = model(input_ids_BS)
    return logits_BSV


def _task(config: RunConfig) -> Task:
    return task_class(config.task)(config, mesh=Mesh.single(), device=torch.device("cpu"))


if __name__ == "__main__":
    main()
