"""Turn a trained decoder's feed-forwards into rows of learners, and train what is new.

    python -m launch.convert acm runs/acm_lm/dense --output runs/acm_lm/tuned

Cuts every feed-forward into learners (the function does not change), distils the learners from the
feed-forwards they replace, and trains the gates on labels made from the learners' errors. The
source is only read. The result is the beginning of a run of its own, which then trains the whole
model with the budget and diversity losses. Prints the held-out loss after each stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adaptive import RoutingTape
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.models.convert.acm import convert, distil, rows_of_learners, train_gates
from adaptive.models.decoder.model import Decoder
from adaptive.routing.forced import force_choices
from launch.checkpoint.files import find_checkpoint, load_model, named_tensors, write_whole
from launch.checkpoint.state import RunState, WholeState
from launch.data.text import Corpus
from launch.grow import check_output
from launch.run.config import save_resolved
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts, check_positive
from launch.run.sections import RunConfig
from launch.run.terminal import command
from parallel.checkpoint import save_atomically


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.convert acm",
        description=__doc__,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("--output", required=True, help="folder of the run to come")
    parser.add_argument("--learners", type=int, default=4, help="in each row")
    parser.add_argument("--budget", type=float, default=0.5, help="mean cost to train for")
    parser.add_argument("--distil-steps", type=int, default=100)
    parser.add_argument("--gate-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--label-threshold",
        type=float,
        default=0.9,
        help="a learner that leaves this share of the error is not worth it; lower: fewer run",
    )
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of the losses told")
    return parser


def main(arguments: list[str] | None = None) -> None:
    with exit_on_bad_input():
        run(arguments_parser().parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Load, convert, distil, train gates, write."""
    check_counts(options, "learners", "distil_steps", "gate_steps", "batch_size", "rows")
    check_positive(options, "learning_rate")
    if not 0 < options.label_threshold <= 1:
        raise BadInput(f"--label-threshold={options.label_threshold}: must be in (0, 1]")
    source, output = find_checkpoint(options.checkpoint), Path(options.output)
    check_output(output, source)
    teacher, config = load_model(source)
    if not isinstance(teacher, Decoder):
        raise BadInput(f"{source}: holds a {type(teacher).__name__}, not a text decoder")
    corpus = Corpus(config.data)
    print(f"{'teacher':34s} loss {held_out(teacher, corpus, options.rows)[0]:.4f}", flush=True)
    batches = training_rows(corpus, config, options.batch_size)
    try:
        wanted = AdaptiveComputationConfig(num_learners=options.learners, budget=options.budget)
        student = convert(teacher, wanted, [next(batches) for _ in range(4)])
    except ValueError as error:
        raise BadInput(f"{source}: {error}") from None
    tell(student, corpus, options.rows, "converted")
    for number, error_share in enumerate(
        distil(teacher, student, take(batches, options.distil_steps), **rates(options)), start=1
    ):
        if number % 20 == 0 or number == options.distil_steps:
            print(f"distil {number}/{options.distil_steps}  error {error_share:.4f}", flush=True)
    tell(student, corpus, options.rows, "distilled")
    gate_steps = train_gates(
        teacher,
        student,
        take(batches, options.gate_steps),
        threshold=options.label_threshold,
        **rates(options),
    )
    for number, (loss, cost) in enumerate(gate_steps, start=1):
        if number % 20 == 0 or number == options.gate_steps:
            print(
                f"gates {number}/{options.gate_steps}  cross-entropy {loss:.4f}  "
                f"labels ask for {cost:.0%}",
                flush=True,
            )
    loss, cost = held_out(student, corpus, options.rows)
    print(f"{'gates trained, as they choose':34s} loss {loss:.4f}  cost {cost:.2f}")
    print(f"checkpoint {write(student, config, output)}")
    print(f"continue   {command('launch.start', '--config', output / 'run.yaml')}")


def rates(options: argparse.Namespace) -> dict[str, float]:
    return {"learning_rate": options.learning_rate}


def tell(student: Decoder, corpus: Corpus, rows: int, stage: str) -> None:
    """The held-out loss when every token runs 1, 2, … learners."""
    modules = rows_of_learners(student)
    learners = max(len(module.learners) for module in modules.values())
    for count in range(1, learners + 1):
        loss, _ = held_out(student, corpus, rows, count=count)
        print(f"{f'{stage}, {count} of {learners} learners':34s} loss {loss:.4f}", flush=True)


@torch.no_grad()
def held_out(
    model: Decoder, corpus: Corpus, rows: int, *, count: int | None = None
) -> tuple[float, float]:
    """Loss on held-out rows, and the mean cost; with `count`, every token runs so many learners."""
    total, tokens, costs = 0.0, 0, []
    for row in range(min(rows, corpus.validation_rows)):
        ids = torch.from_numpy(corpus.validation_row(row))[None]
        length = ids.shape[1] - 1
        forced: dict[nn.Module, Tensor] = {}
        if count is not None:
            counts_T = torch.full((length,), count)
            forced = dict.fromkeys(rows_of_learners(model).values(), counts_T)
        with RoutingTape(model) as tape, force_choices(forced):
            total += float(model.token_losses(ids[:, :-1], ids[:, 1:]).sum())
        tokens += length
        costs += [float(record.executed) / length for record in tape.records]
    return total / tokens, sum(costs) / max(len(costs), 1)


def training_rows(corpus: Corpus, config: RunConfig, batch_size: int) -> Iterator[Tensor]:
    """int64 [B, S] batches of the run's training stream, from its beginning."""
    row = 0
    while True:
        rows = [corpus.train_row(config.train.seed, row + n) for n in range(batch_size)]
        yield torch.from_numpy(np.stack(rows)[:, :-1])
        row += batch_size


def take(batches: Iterator[Tensor], number: int) -> Iterator[Tensor]:
    return (next(batches) for _ in range(number))


def write(student: Decoder, config: RunConfig, output: Path) -> Path:
    """Write a converted model as the beginning of the run `output`."""
    config = replace(
        config,
        model=student.config,
        output=str(output),
        phases=[],
        checkpoint=replace(config.checkpoint, resume="auto"),
    )
    whole = WholeState(
        weights=named_tensors(student),
        exp_avg={},
        exp_avg_sq={},
        state=RunState(),
        config=config,
    )
    checkpoint = save_atomically(output / "checkpoints", 0, lambda to: write_whole(to, whole))
    save_resolved(config, output / "run.yaml")
    return checkpoint
