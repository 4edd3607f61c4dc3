"""Whether a run went to its end: `python -m launch.run.finished` and the words that started it.

    python -m launch.start    --config recipes/acm_lm.yaml output=runs/acm
    python -m launch.run.finished --config recipes/acm_lm.yaml output=runs/acm

A run that was stopped as asked exits 0, as one that ended does. A script of several stages asks
here before the next one: exit code 0 without a word, or 1 and a line that says how far the run is.
"""

from __future__ import annotations

from pathlib import Path

from launch.checkpoint.contents import newest_checkpoint
from launch.checkpoint.files import read_state
from launch.checkpoint.state import RunState
from launch.run.arguments import parse
from launch.run.errors import Failed, program
from launch.run.launcher import launcher_options
from launch.run.sections import RunConfig


@program
def main(arguments: list[str] | None = None) -> None:
    # The launcher's options are those of the run's own command line; none matters here.
    parsed = parse(arguments, program="python -m launch.run.finished", launcher=launcher_options())
    problem = unfinished(parsed.config)
    if problem is not None:
        raise Failed(problem)


def unfinished(config: RunConfig) -> str | None:
    """How far a run is that has not taken all its steps; None: it has."""
    phases = config.phase_configs()
    # Sizes only: who reads the checkpoint next compares its checksums.
    newest = newest_checkpoint(Path(config.output) / "checkpoints", checksums=False)
    state = RunState() if newest is None else read_state(newest)
    if state.phase + 1 >= len(phases) and state.phase_step >= phases[-1].train.steps:
        return None
    planned = sum(phase.train.steps for phase in phases)
    return (
        f"{config.output}: stopped at step {state.step} of {planned}, so what follows it was not "
        "begun; the same command continues"
    )


if __name__ == "__main__":
    main()
