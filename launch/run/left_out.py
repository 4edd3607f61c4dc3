"""What of the data stream a run leaves out: spans that are named, and what made the loss jump.

A run that leaves rows out goes on as one that was told so in `train.skip_rows` from the start: the
same steps, learning rates and weights, on the rows that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from adaptive.observe.alarms import Alarm
from launch.checkpoint.state import RunState

# Steps that the running mean and variance of the loss look back on, and that they need.
_WINDOW, _PATIENCE = 100, 20
# Roll-backs to one checkpoint before a run gives up.
TRIES = 3


class Spike(Exception):  # noqa: N818 -- named for what it says
    """The loss jumped: the run is to go back, and on behind the rows of this step.

    Attributes:
        state: behind the step whose loss jumped.
        said: what is wrong, without what is done about it.
    """

    def __init__(self, state: RunState, said: str) -> None:
        super().__init__(said)
        self.state, self.said = state, said

    def behind(self, back: RunState) -> tuple[RunState, Alarm]:
        """Where the run goes on from a checkpoint, and the line that says so.

        Args:
            back: of the checkpoint that it goes back to.
        """
        said = (
            f"{self.said}; back to step {back.step}, rows {back.rows} to {self.state.rows - 1} "
            "are left out"
        )
        state = replace(back, rows=self.state.rows, rollbacks=self.state.rollbacks + 1)
        # Of the first step that is taken again: a resume from the checkpoint says it again.
        return state, Alarm(back.step + 1, "", "rolled_back", said)


def next_rows(start: int, count: int, spans: Sequence[Sequence[int]]) -> range:
    """The first `count` rows in a row, from `start` on, of which none is in a span.

    Args:
        start: row of the stream.
        count: rows of a step.
        spans: first row, and the one behind the last, of each.
    """
    for first, stop in sorted(map(tuple, spans)):
        if start < stop and first < start + count:
            start = stop
    return range(start, start + count)


def with_loss(state: RunState, loss: float) -> RunState:
    """A state whose running mean and variance have seen the loss of its last step."""
    weight = 1 / min(max(state.phase_step, 1), _WINDOW)
    away = loss - state.loss_mean
    return replace(
        state,
        loss_mean=state.loss_mean + weight * away,
        loss_variance=(1 - weight) * (state.loss_variance + weight * away**2),
    )


def jump(before: RunState, loss: float, deviations: float) -> str | None:
    """Why a loss is a spike; None: it is none, or too few were seen to tell.

    Args:
        before: the state before its step.
        deviations: standard deviations above the running mean that are allowed; 0: any.
    """
    if not deviations or before.phase_step < _PATIENCE:
        return None
    spread = math.sqrt(before.loss_variance)
    if loss <= before.loss_mean + deviations * spread:
        return None
    above = (loss - before.loss_mean) / max(spread, 1e-12)
    return (
        f"loss {loss:.4f} at step {before.step + 1} is {above:.1f} standard deviations above "
        f"{before.loss_mean:.4f}"
    )
