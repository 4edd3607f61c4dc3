"""Turn one checkpoint into another: `python -m launch.convert METHOD …`.

METHOD is one of acm, duo, tokenformer, distillation, upcycling; `METHOD --help` tells its options.
"""

from __future__ import annotations

import sys
from importlib import import_module

from launch.run.errors import OneLineParser, exit_on_bad_input

METHODS = ("acm", "distillation", "duo", "tokenformer", "upcycling")


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    parser = OneLineParser(
        prog="python -m launch.convert",
        description=__doc__,
    )
    parser.add_argument("method", choices=METHODS, help="what the checkpoint becomes")
    with exit_on_bad_input():
        method = parser.parse_args(words[:1]).method
    import_module(f"launch.conversions.{method}").main(words[1:])


if __name__ == "__main__":
    main()
