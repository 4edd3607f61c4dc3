"""The command `adaptive`: every program of this package by its name.

    adaptive train mod_lm train.steps=50
    adaptive generate runs/mod_lm --prompt 'def '

are `python -m launch.start --config mod_lm …` and `python -m launch.generate …`.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path

from launch.run.errors import BadInput, program
from launch.run.starting import begin

FOLDER = Path(__file__).parents[1]
# launch/train.py is one rank; launch/start.py is what a user calls training.
TRAIN, RANK = "start", "train"


@program
def main(arguments: list[str] | None = None) -> int:
    """Run the program that the command line names, in its place; its exit code is ours."""
    found = programs()
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(overview(found))
        return 0 if words else 2
    if words[0] not in found:
        raise BadInput(f"{words[0]}: must be one of {', '.join(found)}")
    # As `python -m` has it: tasks of one's own are found in the folder where one stands.
    sys.path.insert(0, os.getcwd())
    sys.argv = words
    begin(found[words[0]][0], words)
    runpy.run_module(f"launch.{found[words[0]][0]}", run_name="__main__", alter_sys=True)
    return 0


def programs() -> dict[str, tuple[str, str]]:
    """name -> (module, one line): the files directly in launch/ that are programs."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem.startswith("__") or path.stem == RANK:
            continue
        # Read, not imported: listing them costs no torch and no seconds.
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        line = about.splitlines()[0].split("`python -m")[0].rstrip(" :.,")
        found["train" if path.stem == TRAIN else path.stem] = (path.stem, line)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "train", item[0])))


def overview(found: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, found))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in found.items()]
    return "\n".join(
        [
            "usage: adaptive PROGRAM …",
            "",
            *lines,
            "",
            "`adaptive PROGRAM --help` says more; `adaptive train RECIPE` trains a recipe by name.",
        ]
    )


if __name__ == "__main__":
    main()
