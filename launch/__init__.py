"""Programs: train, generate, sample, grow, reshard. The only place that knows DeepSpeed."""

import sys

from launch.run.starting import begin

# Of `python -m launch.NAME` this file is imported first, while "-m" stands for the program.
if sys.argv[:1] == ["-m"]:
    match sys.orig_argv[-len(sys.argv)].split("."):
        case ["launch", program]:
            begin(program, sys.argv)
