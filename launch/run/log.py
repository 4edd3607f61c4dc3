"""The log of a run, as section `monitor` asks for it: metrics.jsonl, and further sinks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from adaptive.observe.metric_log import MetricLog
from adaptive.observe.sinks import Csv, Line, OpenSink, Setting, Sink, numbers, shown
from adaptive.observe.trackers import Mlflow, Wandb
from launch.run.errors import BadInput
from launch.run.ranks import is_first
from launch.run.sections import RunConfig

OF_DEEPSPEED = ("tensorboard", "csv_monitor")
"""Monitors of section deepspeed that can be a sink: they write files, which a resume replaces."""


class DeepSpeedMonitors(Sink):
    """DeepSpeed's own monitors: OUTPUT/deepspeed, written anew from metrics.jsonl at a resume."""

    def __init__(
        self,
        folder: Path,
        first_step: int,
        earlier: Sequence[Line],
        *,
        section: Mapping[str, Any],
    ) -> None:
        place = folder / "deepspeed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        own = {"output_path": str(place), "job_name": folder.resolve().name}
        self._sections = {name: {**own, **section[name]} for name in _enabled(section)}
        self._earlier = earlier
        self._master: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # Not before there is an engine, which gives DeepSpeed its process groups.
        if self._master is None:
            from deepspeed.monitor.config import get_monitor_config
            from deepspeed.monitor.monitor import MonitorMaster

            self._master = MonitorMaster(get_monitor_config(self._sections))
            for line in self._earlier:
                self._write(line["step"], numbers(line))
            self._earlier = ()
        self._write(step, values)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        points = [(name, value, step) for name, value in shown(values).items()]
        self._master.write_events(points)


def open_log(
    config: RunConfig, *, first_step: int, command: Sequence[str]
) -> AbstractContextManager[MetricLog | None]:
    """The log that rank 0 writes; None on the other ranks.

    Args:
        config: of the run.
        first_step: see `MetricLog`.
        command: words that started the run.
    """
    if not is_first():
        return nullcontext()
    monitor = config.monitor
    ways: dict[str, OpenSink] = {
        "csv": Csv,
        "wandb": partial(Wandb, project=monitor.project),
        "mlflow": partial(Mlflow, project=monitor.project),
        "deepspeed": partial(DeepSpeedMonitors, section=config.deepspeed),
    }
    log = MetricLog(
        config.output,
        first_step=first_step,
        tensorboard=monitor.tensorboard,
        sinks=[ways[name] for name in monitor.sinks],
    )
    resolved = config.resolved()
    log.settings(dict(_flat(resolved)))
    log.text(first_step, "configuration", _fenced(yaml.safe_dump(resolved, sort_keys=False)))
    log.text(first_step, "command", _fenced(" ".join(command)))
    return log


def check_sinks(config: RunConfig) -> None:
    """Check that every sink of section `monitor` can be opened.

    Raises:
        BadInput: a package is missing, or section deepspeed enables no monitor or says where.
    """
    for name in config.monitor.sinks:
        if name in ("wandb", "mlflow") and find_spec(name) is None:
            raise BadInput(
                f"monitor.sinks={name}: needs the package {name}, which is not installed; "
                "pip install 'adaptive-transformers[track]'"
            )
    if "deepspeed" not in config.monitor.sinks:
        return
    enabled = _enabled(config.deepspeed)
    if not enabled:
        raise BadInput(
            "monitor.sinks=deepspeed: needs deepspeed.csv_monitor.enabled=true or "
            "deepspeed.tensorboard.enabled=true"
        )
    for name in enabled:
        if config.deepspeed[name].get("output_path"):
            raise BadInput(
                f"deepspeed.{name}.output_path={config.deepspeed[name]['output_path']}: must be "
                "left out, a sink writes into OUTPUT/deepspeed"
            )


def without_monitors(config: RunConfig) -> dict[str, Any]:
    """Section deepspeed for the engine, which would show samples and learning rates there."""
    served = _enabled(config.deepspeed) if "deepspeed" in config.monitor.sinks else []
    return {key: value for key, value in config.deepspeed.items() if key not in served}


def _enabled(section: Mapping[str, Any]) -> list[str]:
    found = [name for name in OF_DEEPSPEED if isinstance(section.get(name), dict)]
    return [name for name in found if section[name].get("enabled")]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Setting]]:
    """Settings that are one number or word, by the key that sets them."""
    found: list[tuple[str, Setting]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found.append((f"{prefix}{key}", value))
    return found


def _fenced(text: str) -> str:
    return f"```\n{text.rstrip()}\n```"
