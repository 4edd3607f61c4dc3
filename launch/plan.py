"""What a run will need on each mesh, before anything runs: `python -m launch.plan --help`."""

from __future__ import annotations

import argparse

from adaptive.models.decoder.model import DecoderConfig
from launch.planning.machines import PUBLISHED, with_given
from launch.planning.plans import candidates, mesh_of, plan, table
from launch.planning.probe import machine_of
from launch.run.config import load_config
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import check_counts, check_positive, parse_mesh, refuse_empty_values
from launch.run.trust import add_trust_option

_EPILOG = """\
Memory: weights, gradients and Adam's moments as the ZeRO stage shards them, and the activations
that one micro-batch keeps. Communication: the formulas of docs/parallelism.md. Time: products,
attention and element-wise passes at the machine's rates, plus a latency and bytes over bandwidth
for every collective, nothing overlapped (launch/planning/step_time.py). --machine this measures it
first; the others are published peaks times shares that are assumed, not measured.
"""


@program
def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_intermixed_args(arguments)
    refuse_empty_values(options.overrides)
    check_counts(options, "gpus")
    given = ("memory", "tflops", "bandwidth", "network")
    check_positive(options, "efficiency", *given)
    config = load_config(options.config, options.overrides)
    if not isinstance(config.model, DecoderConfig):
        raise BadInput(f"task={config.task}: only decoders (task language_model) can be planned")
    mixed = not options.float32
    machine = machine_of(
        options.machine,
        ranks=options.gpus,
        dim=config.model.dim,
        mixed=mixed,
        efficiency=options.efficiency,
    )
    machine = with_given(machine, **{name: getattr(options, name) for name in given})
    meshes = (
        [mesh_of(options.gpus, parse_mesh(text)) for text in options.meshes]
        if options.meshes
        else list(candidates(config, options.gpus))
    )
    plans, refused = [], []
    for mesh in meshes:
        try:
            plans.append(plan(config, mesh, machine, mixed=mixed))
        except BadInput as error:
            refused.append(str(error))
    if not plans:
        raise BadInput(refused[0] if refused else f"--gpus={options.gpus}: no mesh divides")
    print(f"{machine.name}: {machine.source}")
    print(table(plans, machine))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.plan",
        description="Memory, communication and time of a run on every mesh of so many GPUs.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="a file, or a recipe's name"
    )
    add_trust_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    parser.add_argument("--gpus", type=int, required=True, help="ranks")
    parser.add_argument("--meshes", nargs="+", metavar="MESH", help="only these")
    parser.add_argument("--float32", action="store_true", help="32-bit throughout; else mixed")
    machines = f"this, {', '.join(sorted(PUBLISHED))}"
    parser.add_argument("--machine", default="h100", help=f"{machines} (h100)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.5,
        help="share of a published peak that products and attention reach (0.5)",
    )
    for name, unit in (
        ("memory", "GB of one rank"),
        ("tflops", "TFLOP/s that products and attention reach"),
        ("bandwidth", "GB/s that a rank sends to others of its machine"),
        ("network", "GB/s that a rank sends to other machines"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{unit} (the machine's)")
    return parser


if __name__ == "__main__":
    main()
