"""Sinks: where a run's numbers, texts and pictures go beside metrics.jsonl, by one protocol.

metrics.jsonl is the record of a run. A sink shows the same numbers elsewhere. When a run resumes,
a sink is given the lines of the steps that stay: one that cannot drop what came after them writes
itself anew from the lines, one that cannot do that either writes those that it has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

Line = Mapping[str, Any]
"""A line of metrics.jsonl: `step`, and numbers or null by name; or an alarm."""

Setting = bool | int | float | str


class Sink:
    """Takes what a run has to say; what a sink does not override it does not show."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their names in metrics.jsonl; they may be NaN or infinite."""

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown."""

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """The distribution of some values, float32 on the CPU."""

    def image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """A picture, uint8 [H, W, 3]."""

    def settings(self, values: Mapping[str, Setting]) -> None:
        """What the run was configured with, flat: `train.learning_rate`, …"""

    def flush(self) -> None:
        """Let what was taken outlive this process, where the sink can.

        Raises:
            OSError: it cannot be written.
        """

    def close(self) -> None: ...


OpenSink = Callable[[Path, int, Sequence[Line]], Sink]
"""Opens a sink: the run's folder, the first step that will be written, the lines before it."""


def numbers(line: Line) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl; null was not finite. Of an alarm, none."""
    if "alarm" in line:
        return {}
    return {
        name: float("nan") if value is None else value
        for name, value in line.items()
        if name != "step"
    }


def shown_name(name: str) -> str:
    """A name of metrics.jsonl as people look for it: statistic first, layers in order.

    `routing/layers.7/executed_share` is shown as `routing/executed_share/layer_07`.
    """
    found = of_layer(name)
    if found is None:
        return name
    prefix, layer, statistic = found
    return f"{prefix}/{statistic}/{_shown_layer(layer)}"


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers under the names that people are shown, and over all layers the least, mean and most.

    `routing_summary/executed_share/least`, `…/mean` and `…/most` are over the layers that have
    the statistic, where there are two or more.
    """
    out: dict[str, float] = {}
    by_statistic: dict[str, list[float]] = {}
    for name, value in values.items():
        found = of_layer(name)
        if found is None:
            out[name] = value
            continue
        prefix, layer, statistic = found
        out[f"{prefix}/{statistic}/{_shown_layer(layer)}"] = value
        by_statistic.setdefault(f"{prefix}_summary/{statistic}", []).append(value)
    for name, of_layers in by_statistic.items():
        if len(of_layers) > 1:
            out[f"{name}/least"], out[f"{name}/most"] = min(of_layers), max(of_layers)
            out[f"{name}/mean"] = sum(of_layers) / len(of_layers)
    return out


_BY_LAYER = ("routing", "validation_routing", "collapse", "gradients")


def of_layer(name: str) -> tuple[str, str, str] | None:
    """Prefix, layer and statistic of a number that each layer has."""
    prefix, _, rest = name.partition("/")
    layer, slash, statistic = rest.partition("/")
    return (prefix, layer, statistic) if prefix in _BY_LAYER and slash else None


def _shown_layer(name: str) -> str:
    """`layers.7.ffn` as `layer_07.ffn`, so that layer 10 comes after layer 9."""
    return re.sub(r"^layers\.(\d+)", lambda found: f"layer_{int(found[1]):02d}", name)


class Csv(Sink):
    """OUTPUT/metrics.csv: a row `step,name,value` for each number, names as in metrics.jsonl."""

    def __init__(self, folder: Path, first_step: int, earlier: Sequence[Line]) -> None:
        self._file = (folder / "metrics.csv").open("w", encoding="utf-8", newline="")
        self._file.write("step,name,value\n")
        for line in earlier:
            self.scalars(line["step"], numbers(line))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._file.writelines(f"{step},{_cell(name)},{value!r}\n" for name, value in values.items())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cell(name: str) -> str:
    """A name as a cell: sources of data may be called what they like."""
    quoted = name.replace('"', '""')
    return f'"{quoted}"' if re.search(r'[",\n]', name) else name
