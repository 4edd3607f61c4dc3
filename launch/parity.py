"""Compare a model on one rank with the same model on meshes: `python -m launch.parity --help`."""

from __future__ import annotations

import argparse

from launch.run.config import load_config
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import (
    check_counts,
    check_positive,
    check_seed,
    parse_mesh,
    refuse_empty_values,
)
from launch.run.parity import RecipeSubject, deepspeed_trainer
from launch.run.terminal import announced
from launch.run.trust import add_trust_option
from launch.run.zero import check_zero
from launch.tasks.registry import task_class
from parallel.checks.faults import FAULTS
from parallel.parity import PlainTrainer, Settings, check_parity

_EPILOG = """\
A mesh is written as its axes: tensor=2,sequence_parallel=true or context=2,context_attention=ring.
`data` is what is needed for the other axes unless given. Exit code: 0 if every mesh agrees, 1 if
one does not, 2 for bad input.

A model of your own: --subject module:function, where function() returns an object with the methods
of parallel.parity.Subject (build, batch, tokens, losses).
"""


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    check_seed(options.seed)
    check_counts(options, "steps", "rows", "micro_batches")
    check_positive(options, "tolerance", "timeout")
    settings = Settings(steps=options.steps, micro_batches=options.micro_batches, seed=options.seed)
    subject: str | RecipeSubject
    if options.subject is not None:
        subject = options.subject
    else:
        refuse_empty_values(options.overrides)
        config = load_config(options.config, options.overrides)
        device = "cuda" if options.cuda else "cpu"
        task_class(config.task).check(config)
        subject = RecipeSubject(config, options.rows, device)
    meshes = [parse_mesh(text) for text in options.meshes]
    if options.zero is not None:
        for mesh in meshes:
            axes = {axis: int(mesh.get(axis, 1)) for axis in ("tensor", "expert")}
            check_zero(options.zero, **axes)
    trainer = PlainTrainer if options.zero is None else deepspeed_trainer(options.zero)
    try:
        with announced("training on one rank and on the meshes"):
            reports = check_parity(
                subject,
                meshes,
                settings,
                tolerance=options.tolerance,
                make_trainer=trainer,
                fault=None if options.fault is None else FAULTS[options.fault],
                cuda=options.cuda,
                timeout=options.timeout,
            )
    except ValueError as error:
        raise BadInput(str(error)) from None
    for report in reports:
        verdict = "agrees with one rank" if report.ok else "DISAGREES with one rank"
        print(f"\n{report.mesh}: {verdict} (tolerance {report.tolerance:g})")
        if report.difference is not None:
            print(report.difference.text)
            if report.difference.tied:
                print("What follows from it is right on either side and not compared.")
        print(report.table(options.limit))
    return 0 if all(report.ok for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.parity",
        description="Is a model the same on a mesh as on one rank? Loss, every gradient, the "
        "gradient norm, the clipped update, the weights.",
        epilog=_EPILOG,
    )
    add_trust_option(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="YAML", help="a file, or a recipe's name")
    what.add_argument("--subject", metavar="MODULE:FUNCTION", help="a model of your own")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    parser.add_argument("--meshes", nargs="+", required=True, metavar="MESH", help="see below")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (3)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a recipe's batch (8)")
    parser.add_argument("--micro-batches", type=int, default=1, help="accumulation steps (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative error (1e-5)")
    parser.add_argument("--zero", type=int, help="train by DeepSpeed at this ZeRO stage")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="break training on purpose")
    parser.add_argument("--limit", type=int, default=20, help="rows of the table (20)")
    parser.add_argument("--cuda", action="store_true", help="one GPU a rank, NCCL")
    parser.add_argument("--timeout", type=float, default=600, help="seconds (600)")
    return parser


if __name__ == "__main__":
    main()
