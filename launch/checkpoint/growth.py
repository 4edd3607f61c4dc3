"""Grown TokenFormers: more parameter tokens, the same function, moments that go on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.growth import Growth, grow, grown_config, grown_moments
from launch.checkpoint.beginning import check_new_run, config_of_new_run, how_to_train, write_run
from launch.checkpoint.files import (
    find_checkpoint,
    load_model,
    load_weights,
    named_tensors,
    read_whole,
)
from launch.checkpoint.state import WholeState
from launch.run.config import load_saved
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.tasks.registry import make_task

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
                f"continue     {how_to_train(Path(self.config.output))}",
            ]
        )


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
    check_new_run(output, source=folder)
    old = load_saved(folder)
    model_config = _wanted(old, tokens=tokens, ffn_tokens=ffn_tokens, output_tokens=output_tokens)
    train = old.train if steps is None else replace(old.train, steps=steps)
    config = config_of_new_run(old, output, model=model_config, train=train)
    _check_divides(config)
    whole = read_whole(folder)
    before = _logits(folder, rows)
    grown, growth = grow_whole(whole, model_config)
    # A run of its own: one phase, from its beginning, on the data that come next.
    state = replace(grown.state, phase=0, phase_step=0)
    grown = replace(grown, config=config, state=state)
    checkpoint = write_run(grown)
    change = float((_logits(checkpoint, rows) - before).abs().max())
    if not change <= LIMIT:
        shutil.rmtree(checkpoint)
        (output / "run.yaml").unlink()
        raise BadInput(f"{folder}: growing would change its logits by {change:.1e}")
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
        model = make_task(whole.config).build_model()
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


def _logits(checkpoint: Path, rows: int) -> Tensor:
    """Logits of the run's held-out rows by the checkpoint's model: [rows, S, V]."""
    model, config = load_model(checkpoint)
    task = make_task(config)
    batch = task.validation_batch(range(min(rows, task.validation_rows)))
    if "input_ids" not in batch:
        raise BadInput(f"task {config.task}: its batches have no input_ids to compare logits on")
    return _evaluated(model, batch["input_ids"])


@torch.no_grad()
def _evaluated(model: nn.Module, input_ids_BS: Tensor) -> Tensor:
    logits_BSV: Tensor = model(input_ids_BS)
    return logits_BSV
