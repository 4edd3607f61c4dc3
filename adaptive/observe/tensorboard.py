"""TensorBoard as a sink: OUTPUT/tensorboard/NAME, where NAME is the run's.

tensorboard --logdir OUTPUT/tensorboard         one run, under its own name
tensorboard --logdir runs                       all of them
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive.observe.sinks import Line, Setting, Sink, numbers, shown, shown_name

FOLDER = "tensorboard"
RESULTS = ("loss/train", "validation/loss", "throughput/tokens_per_second", "throughput/mfu")
"""Curves whose last value the tab HPARAMS shows beside a run's settings."""


class TensorBoard(Sink):
    """Writes events; a resumed run purges the steps that come again.

    Args:
        folder: the run's.
        first_step: the first step that will be written. 0 starts anew.
        earlier: lines of the steps before it, written again where the events have them not: those
            of versions that named curves layer first stay beside them, as the run `.`.
        flush_seconds: longest time for which events may stay in memory.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        earlier: Sequence[Line],
        *,
        flush_seconds: float = 10.0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        home = folder / FOLDER
        if first_step == 0 and home.is_dir():
            _remove_events(home)
        place = _place(home, folder.resolve().name or "run")
        continues = any(place.glob("events.out.tfevents.*"))
        self._writer: Any = SummaryWriter(
            str(place),
            purge_step=first_step or None,
            flush_secs=round(max(flush_seconds, 1)),
        )
        self._laid_out: set[str] = set()
        self._results: dict[str, float] = {}
        if not continues:
            for line in earlier:
                self.scalars(line["step"], numbers(line))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        named = shown(values)
        # One event for all of them: a thread's queue and a checksum each would cost more.
        points = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
        self._writer.file_writer.add_summary(Summary(value=points), step)
        self._results |= {name: named[name] for name in RESULTS if name in named}
        self._lay_out(named)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        self._writer.add_histogram(shown_name(name), values, step)

    def image(self, step: int, name: str, image_HWC: Tensor) -> None:
        self._writer.add_image(shown_name(name), image_HWC, step, dataformats="HWC")

    def settings(self, values: Mapping[str, Setting]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # `add_hparams` would make a run of its own for them.
        for part in hparams(dict(values), dict.fromkeys(RESULTS, 0.0))[:2]:
            self._writer.file_writer.add_summary(part)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._writer.file_writer.add_summary(hparams({}, {})[2])
        self._writer.close()

    def _lay_out(self, names: Mapping[str, float]) -> None:
        """The tab CUSTOM SCALARS: of each statistic the range over layers, with its mean."""
        found = {name.rpartition("/")[0] for name in names if name.endswith("/most")}
        if found <= self._laid_out:
            return
        self._laid_out |= found
        charts: dict[str, dict[str, Any]] = {}
        for name in sorted(self._laid_out):
            prefix, _, statistic = name.partition("/")
            curves = [f"{name}/{which}" for which in ("mean", "least", "most")]
            charts.setdefault(prefix, {})[statistic] = ["Margin", curves]
        self._writer.add_custom_scalars(charts)


def _place(home: Path, name: str) -> Path:
    """Where the events go: a run whose folder was renamed takes its curves along."""
    place = home / name
    others = [path for path in home.glob("*") if path.is_dir()]
    if len(others) == 1 and not place.exists():
        with suppress(OSError):
            others[0].rename(place)
    return place


def _remove_events(home: Path) -> None:
    for events in home.glob("events.out.tfevents.*"):
        events.unlink()
    for run in home.glob("*"):
        if run.is_dir() and any(run.glob("events.out.tfevents.*")):
            shutil.rmtree(run)
