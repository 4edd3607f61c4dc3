"""Turn one checkpoint into another: `python -m launch.convert METHOD …`.

METHOD is one of acm, adapt, distillation, duo, to_transformers, tokenformer, transformers,
upcycling; `METHOD --help` tells its options.
The source is only read. What becomes a run is its beginning: the last line says how to train it.
"""

from __future__ import annotations

import sys
from importlib import import_module

from launch.checkpoint.beginning import how_to_train
from launch.run.children import stop_with_script
from launch.run.errors import OneLineParser, program

METHODS = (
    "acm",
    "adapt",
    "distillation",
    "duo",
    "to_transformers",
    "tokenformer",
    "transformers",
    "upcycling",
)


@program
def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    parser = OneLineParser(prog="python -m launch.convert", description=__doc__)
    parser.add_argument("method", choices=METHODS, help="what the checkpoint becomes")
    name = parser.parse_args(words[:1]).method
    method = import_module(f"launch.conversions.{name}")
    parser = OneLineParser(prog=f"python -m launch.convert {name}", description=method.__doc__)
    method.add_options(parser)
    written = method.convert(parser.parse_intermixed_args(words[1:]))
    print(f"written  {written}")
    if written.parent.name == "checkpoints":
        print(f"continue {how_to_train(written.parent.parent)}")


if __name__ == "__main__":
    stop_with_script()
    main()
