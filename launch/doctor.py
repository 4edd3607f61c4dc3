"""What this machine can do: `python -m launch.doctor`.

Prints the environment, every optional package and what it is for, and for each operation which
implementation runs here and why the others do not. Ends with a small model's forward and backward.
Exit status 1 when training cannot work here, 0 otherwise.
"""

from __future__ import annotations

from launch.planning import kernels as kernel_doctor
from launch.planning.environment import report
from launch.run.errors import OneLineParser, program


@program
def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m launch.doctor", description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="check and time our kernels instead")
    if parser.parse_args(arguments).kernels:
        return kernel_doctor.examine()
    return 1 if report() else 0


if __name__ == "__main__":
    main()
