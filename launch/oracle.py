"""Which path would have served each token best? `python -m launch.oracle RUN --budgets 0.25 0.5`

Searches, for tokens of the run's held-out text, the path through its routed layers with the lowest
loss within each budget, and compares it with the model's own routers and with full compute. The
report goes to the terminal, and with --output as JSON to a file: the best path of every token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from adaptive.models.decoder.oracle import Found, OracleReport, search
from launch.checkpoint.models import add_checkpoint, load_decoder
from launch.run.errors import BadInput, OneLineParser, as_bad_input, program
from launch.run.options import check_counts
from launch.run.terminal import announced
from launch.run.writable import check_file
from launch.tasks import Batch


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.oracle",
        description=__doc__,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 1.0],
        help="largest mean costs of a token's choices, as shares of full compute",
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens to search for")
    parser.add_argument("--row", type=int, default=0, help="held-out row that they are taken from")
    parser.add_argument("--beam", type=int, default=8, help="paths kept where not all are tried")
    parser.add_argument(
        "--exhaustive-up-to", type=int, default=729, help="most paths that are all tried"
    )
    parser.add_argument("--output", help="file for the report in JSON")
    return parser


@program
def main(arguments: list[str] | None = None) -> None:
    """Load, search, report."""
    options = arguments_parser().parse_args(arguments)
    check_counts(options, "tokens", "beam", "exhaustive_up_to")
    if options.output is not None:
        check_file("--output", options.output)
    saved = load_decoder(options.checkpoint)
    rows = saved.task.validation_rows
    if not 0 <= options.row < rows:
        raise BadInput(f"--row={options.row}: must be between 0 and {rows - 1}")
    batch = saved.task.validation_batch(range(options.row, options.row + 1))
    ids_S, learnt = text_of(batch)
    # The last tokens of the text have the longest texts before them.
    positions = learnt[-options.tokens :]
    if not positions:
        raise BadInput(f"--row={options.row}: holds nothing that is learnt: give another row")
    with as_bad_input(options.checkpoint), announced("searching paths"):
        report = search(
            saved.model,
            ids_S,
            positions,
            options.budgets,
            beam=options.beam,
            exhaustive_up_to=options.exhaustive_up_to,
        )
    print(table(report))
    if options.output is not None:
        Path(options.output).write_text(json.dumps(as_json(report), indent=1), encoding="utf-8")
        print(f"best paths: {options.output}")


def text_of(batch: Batch) -> tuple[Tensor, list[int]]:
    """A row's text, int64 [S], and the positions whose next token is learnt.

    Of packed documents it is the one of which most is learnt: only there do tokens see one another.
    """
    ids, targets = batch["input_ids"][0], batch["targets"][0]
    if "documents" in batch:
        of_S = batch["documents"][0]
        learnt = of_S[targets >= 0]
        own = of_S == (learnt.bincount().argmax() if len(learnt) else 0)
        ids, targets = ids[own], targets[own]
    positions = (targets >= 0).nonzero().flatten().tolist()
    # What is not learnt is not told by targets: the text ends before it.
    return (ids if targets[-1] < 0 else torch.cat([ids, targets[-1:]])), positions


def table(report: OracleReport) -> str:
    """Losses and costs, then each module's choices at each budget."""
    lines = [f"{len(report.positions)} tokens, {report.evaluated} (token, path) pairs computed"]
    full = sum(report.full) / len(report.full)
    lines.append(f"{'full compute':16s} loss {full:.4f}  cost 1.000")
    for name, found in {
        "the routers": report.router,
        **{f"oracle <= {budget:g}": found for budget, found in report.best.items()},
    }.items():
        loss, cost = _means(found)
        lines.append(f"{name:16s} loss {loss:.4f}  cost {cost:.3f}")
    for budget in report.best:
        lines.append(f"choices of the oracle <= {budget:g}:")
        for module, shares in zip(report.modules, report.usage(budget), strict=True):
            shown = "  ".join(f"{choice}: {share:4.0%}" for choice, share in enumerate(shares))
            lines.append(f"  {module:24s} {shown}")
    return "\n".join(lines)


def as_json(report: OracleReport) -> dict[str, object]:
    """Plain data: the report with the best path of every token."""
    plain = dataclasses.asdict(report)
    plain["best"] = {f"{budget:g}": found for budget, found in plain["best"].items()}
    return plain


def _means(found: list[Found]) -> tuple[float, float]:
    return sum(f.loss for f in found) / len(found), sum(f.cost for f in found) / len(found)


if __name__ == "__main__":
    main()
