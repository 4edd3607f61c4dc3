"""Turn a trained decoder's feed-forwards into rows of learners, and train what is new.

    python -m launch.convert acm runs/acm_lm/dense --output runs/acm_lm/tuned

Cuts every feed-forward into learners (the function does not change), distils the learners from the
feed-forwards they replace, and trains the gates on labels made from the learners' errors. The
result then trains the whole model with the budget and diversity losses. Prints the held-out loss
after each stage.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch

from adaptive import RoutingTape
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.models.convert.acm import convert as cut
from adaptive.models.convert.acm import distil, rows_of_learners, train_gates
from adaptive.models.decoder.model import Decoder
from adaptive.routing.forced import force_choices
from launch.checkpoint.beginning import begin_run
from launch.checkpoint.files import named_tensors
from launch.checkpoint.models import held_out_loss, training_ids
from launch.conversions.source import add_source, open_source
from launch.run.errors import BadInput, as_bad_input
from launch.run.options import check_counts, check_positive
from launch.run.terminal import announced
from launch.tasks import Task


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
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


def convert(options: argparse.Namespace) -> Path:
    """Load, cut, distil, train gates, write; returns the checkpoint."""
    check_counts(options, "learners", "distil_steps", "gate_steps", "batch_size", "rows")
    check_positive(options, "learning_rate")
    if not 0 < options.label_threshold <= 1:
        raise BadInput(f"--label-threshold={options.label_threshold}: must be in (0, 1]")
    source = open_source(options)
    teacher, task, rows = source.model, source.task, options.rows
    rate = {"learning_rate": options.learning_rate}
    loss = held_out_loss(teacher, task, rows=rows, at_once=1)
    print(f"{'teacher':34s} loss {loss:.4f}", flush=True)
    batches = training_ids(task, options.batch_size)
    with as_bad_input(source.folder), announced("cutting feed-forwards into learners"):
        wanted = AdaptiveComputationConfig(num_learners=options.learners, budget=options.budget)
        student = cut(teacher, wanted, list(islice(batches, 4)))
    print_losses_by_learners(student, task, rows, "converted")
    steps = distil(teacher, student, islice(batches, options.distil_steps), **rate)
    for number, error_share in enumerate(steps, start=1):
        if number % 20 == 0 or number == options.distil_steps:
            print(f"distil {number}/{options.distil_steps}  error {error_share:.4f}", flush=True)
    print_losses_by_learners(student, task, rows, "distilled")
    gate_batches = islice(batches, options.gate_steps)
    gate_steps = train_gates(
        teacher, student, gate_batches, threshold=options.label_threshold, **rate
    )
    for number, (loss, cost) in enumerate(gate_steps, start=1):
        if number % 20 == 0 or number == options.gate_steps:
            print(
                f"gates {number}/{options.gate_steps}  cross-entropy {loss:.4f}  "
                f"labels ask for {cost:.0%}",
                flush=True,
            )
    with RoutingTape(student) as tape:
        loss = held_out_loss(student, task, rows=rows, at_once=1)
    costs = [float(record.executed) / float(record.tokens) for record in tape.records]
    cost = sum(costs) / len(costs)
    print(f"{'gates trained, as they choose':34s} loss {loss:.4f}  cost {cost:.2f}")
    output = Path(options.output)
    return begin_run(source.config, named_tensors(student), output=output, model=student.config)


def print_losses_by_learners(student: Decoder, task: Task, rows: int, stage: str) -> None:
    """The held-out loss when every token runs 1, 2, … learners."""
    modules = rows_of_learners(student)
    learners = max(len(module.learners) for module in modules.values())
    tokens = task.tokens(range(1))
    for count in range(1, learners + 1):
        counts_T = torch.full((tokens,), count)
        with force_choices(dict.fromkeys(modules.values(), counts_T)):
            loss = held_out_loss(student, task, rows=rows, at_once=1)
        print(f"{f'{stage}, {count} of {learners} learners':34s} loss {loss:.4f}", flush=True)
