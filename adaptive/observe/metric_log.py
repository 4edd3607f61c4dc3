"""MetricLog: numbers, texts, histograms and pictures of a run, to metrics.jsonl and other sinks.

All hold the same numbers. A run that resumes continues all: what was written at or after the step
that it resumes from is dropped, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from adaptive.observe.layer_history import LayerHistory
from adaptive.observe.sinks import OpenSink, Setting, Sink, numbers
from adaptive.observe.tensorboard import TensorBoard


class MetricLog:
    """Writes what one rank has to say; the other ranks have none.

    Writing costs a buffered write and what the sinks cost: TensorBoard's writer has a thread of
    its own, and the file is flushed by `flush()`, every `flush_seconds` and at the end.

    Args:
        folder: where metrics.jsonl and tensorboard/ go.
        first_step: the first step that will be written. 0 starts all anew.
        tensorboard: also write TensorBoard events.
        sinks: open further sinks.
        flush_seconds: longest time for which written lines may stay in memory.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        first_step: int = 0,
        tensorboard: bool = True,
        sinks: Sequence[OpenSink] = (),
        flush_seconds: float = 10.0,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _keep_steps_before(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        opened = [*sinks]
        if tensorboard:
            opened.insert(0, partial(TensorBoard, flush_seconds=flush_seconds))
        earlier = read_metrics(self.path) if opened else []
        self._sinks: list[Sink] = [opens(folder, first_step, earlier) for opens in opened]
        self._history = None
        if opened:
            self._history = LayerHistory()
            for line in earlier:
                self._history.add(line["step"], numbers(line))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the file, and a point of each curve. A value that is not finite is null."""
        if not values:
            return
        self._line({"step": step, **{name: _finite(value) for name, value in values.items()}})
        if self._history is not None:
            self._history.add(step, values)
        for sink in self._sinks:
            sink.scalars(step, values)

    def alarm(self, step: int, *, layer: str, kind: str, message: str) -> None:
        """A line with the keys step, alarm, layer, message; a text elsewhere."""
        self._line({"step": step, "alarm": kind, "layer": layer, "message": message})
        self.text(step, "alarms", f"**step {step}** {f'`{layer}`: ' if layer else ''}{message}")

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown; not in the file."""
        for sink in self._sinks:
            sink.text(step, name, text)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """The distribution of some values; not in the file."""
        if self._sinks and values.numel():
            values = values.detach().float().cpu()
            for sink in self._sinks:
                sink.histogram(step, name, values)

    def image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """A picture, uint8 [H, W, 3]; not in the file."""
        for sink in self._sinks:
            sink.image(step, name, image_HWC)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """What the run was configured with, flat; not in the file."""
        for sink in self._sinks:
            sink.settings(values)

    def layer_images(self, step: int) -> None:
        """Of each statistic that several layers have, a picture of layers over steps so far."""
        if self._history is not None:
            for name, image_HWC in self._history.pictures().items():
                self.image(step, name, image_HWC)

    def flush(self) -> None:
        """Bring what was written to the disk; what other sinks hold to the operating system.

        Raises:
            OSError: they cannot be written.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed = time.monotonic()
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        with ExitStack() as last:
            # What one of them could not write, the others try again.
            for sink in self._sinks:
                last.callback(sink.close)
            last.callback(self._close_file)
            self.flush()

    def _close_file(self) -> None:
        with suppress(OSError):
            self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # A disk that is full by now must not hide the error that ends the run.
        with suppress(OSError) if error is not None else nullcontext():
            self.close()

    def _line(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content, allow_nan=False) + "\n")
        if time.monotonic() - self._flushed > self._flush_seconds:
            self._file.flush()
            self._flushed = time.monotonic()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left half written is dropped."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _keep_steps_before(path: Path, first_step: int) -> None:
    """Cut the file before its first line of a step that will be written again."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            step = _step_of(line)
            if step is None:
                warnings.warn(
                    f"{path}: line {number} cannot be read; it and what follows are dropped",
                    stacklevel=2,
                )
            if step is None or step >= first_step:
                break
            kept += len(line)
    with path.open("r+b") as file:
        file.truncate(kept)


def _step_of(line: bytes) -> int | None:
    """The step that a line is of; None: it is none of a log's."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if type(step) is int else None


def _finite(value: float | Tensor) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
