"""What a run says on the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.run.loop import StepReport
from launch.run.terminal import command


class Progress:
    """Prints progress lines on one rank; elsewhere silent.

    On a terminal the current step overwrites its own line; in a log only every `every`-th stays.
    """

    def __init__(self, *, steps: int, every: int, name: str, speak: bool) -> None:
        self.steps, self.every, self.name, self.speak = steps, every, name, speak
        self._live = speak and sys.stdout.isatty()
        self._begun = time.perf_counter()
        self._tokens = 0
        self._seconds = self._executed = self._nominal = 0.0
        self._done = 0
        self._last = (0.0, 0.0, 0.0)

    def say(self, line: str) -> None:
        """Print a line of its own."""
        if self.speak:
            print(f"{self._clear()}{line}", flush=True)

    def step(
        self,
        step: int,
        report: StepReport,
        seconds: float,
        *,
        learning_rate: float,
        gradient_norm: float | None = None,
    ) -> None:
        """Count a step that took `seconds`; every `every`-th prints a line that stays.

        Rates are over the seconds of steps: evaluations and checkpoints in between slow none.
        """
        self._tokens += report.tokens
        self._seconds += seconds
        self._executed += report.executed_flops
        self._nominal += report.nominal_flops
        self._done += 1
        due = step % self.every == 0 or step == self.steps
        if due:
            taken = max(self._seconds, 1e-9)
            self._last = (self._tokens / taken, self._executed / taken, self._nominal / taken)
            self._tokens, self._seconds, self._executed, self._nominal = 0, 0.0, 0.0, 0.0
        if self.speak and (due or self._live):
            line = self._line(step, report, learning_rate, gradient_norm)
            print(f"{self._clear()}{line}", end="\n" if due else "", flush=True)

    def _line(
        self, step: int, report: StepReport, learning_rate: float, gradient_norm: float | None
    ) -> str:
        tokens, executed, nominal = self._last
        width = len(str(self.steps))
        left = (time.perf_counter() - self._begun) / self._done * (self.steps - step)
        parts = [f"{self.name} {step:>{width}}/{self.steps}", f"loss {report.loss:.4f}"]
        parts.append(f"lr {learning_rate:.2e}")
        if gradient_norm is not None:
            parts.append(f"gradient {gradient_norm:.3g}")
        if tokens:
            parts.append(f"{tokens:,.0f} tokens/s")
        if nominal:
            parts.append(
                f"{rate(executed)} executed, {rate(nominal)} nominal ({executed / nominal:.0%})"
            )
        parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    def _clear(self) -> str:
        return "\r\033[K" if self._live else ""


def rate(flops: float) -> str:
    """Operations a second, with the prefix that leaves 1 to 3 digits before the point."""
    for prefix in ("", "k", "M", "G", "T"):
        if flops < 999.5:  # which three digits round up to 1e+03
            return f"{flops:.3g} {prefix}FLOP/s"
        flops /= 1000
    return f"{flops:.4g} PFLOP/s"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def final_summary(
    *, checkpoint: Path, output: Path, tensorboard: bool, generate: str | None, seconds: float
) -> str:
    """The last lines of a run: where everything is, and what to do next."""
    lines = [f"finished in {clock(seconds)}", f"checkpoint   {checkpoint}"]
    if tensorboard:
        lines.append(
            f"TensorBoard  {command('tensorboard.main', '--logdir', output / 'tensorboard')}"
        )
    if generate is not None:
        lines.append(f"generate     {generate}")
    return "\n".join(lines)
