"""MetricLog: numbers, histograms and pictures of a run, to TensorBoard and to a file of JSON lines.

Both hold the same numbers under the same names. A run that resumes continues both: what was
written at or after the step that it resumes from is dropped, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor


class MetricLog:
    """Writes what one rank has to say; the other ranks have none.

    Writing costs a dictionary look-up and a buffered write: TensorBoard's writer has a thread of
    its own, and the file is flushed by `flush()`, every `flush_seconds` and at the end.

    Args:
        folder: where metrics.jsonl and tensorboard/ go.
        first_step: the first step that will be written. 0 starts both anew.
        tensorboard: also write TensorBoard events.
        flush_seconds: longest time for which written lines may stay in memory.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        first_step: int = 0,
        tensorboard: bool = True,
        flush_seconds: float = 10.0,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _keep_steps_before(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            home = folder / "tensorboard"
            if first_step == 0 and home.is_dir():
                for events in home.glob("events.out.tfevents.*"):
                    events.unlink()
            self.writer = SummaryWriter(
                str(home), purge_step=first_step or None, flush_secs=round(max(flush_seconds, 1))
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the file, and a point of each curve. A value that is not finite is null."""
        if not values:
            return
        self._line({"step": step, **{name: _finite(value) for name, value in values.items()}})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def alarm(self, step: int, *, layer: str, kind: str, message: str) -> None:
        """A line with the keys step, alarm, layer, message; a text in TensorBoard."""
        self._line({"step": step, "alarm": kind, "layer": layer, "message": message})
        if self.writer is not None:
            self.writer.add_text("alarms", f"{layer}: {message}" if layer else message, step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """The distribution of some values; TensorBoard only."""
        if self.writer is not None and values.numel():
            self.writer.add_histogram(name, values.detach().float().cpu(), step)

    def image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """A picture, uint8 [H, W, 3]; TensorBoard only."""
        if self.writer is not None:
            self.writer.add_image(name, image_HWC, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring what was written to the disk; TensorBoard's events to the operating system.

        Raises:
            OSError: they cannot be written.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed = time.monotonic()
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            # What the first of them could not write, the others try again.
            with suppress(OSError):
                self._file.close()
            if self.writer is not None:
                self.writer.close()

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
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if step >= first_step:
                break
            kept += len(line)
    with path.open("r+b") as file:
        file.truncate(kept)


def _finite(value: float | Tensor) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
