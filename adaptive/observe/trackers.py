"""Trackers as sinks: wandb and mlflow (extra `track`), which keep what they were given.

A killed run has given them steps that come again when it resumes. mlflow tells what it has, and is
given the rest: of those steps it keeps what the clock said the first time. wandb's runs on a server
are asked for their last step; those written offline cannot be asked, and are written anew from
metrics.jsonl.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive.observe.sinks import Line, Setting, Sink, numbers, shown, shown_name


class Wandb(Sink):
    """A run of wandb; WANDB_MODE, WANDB_BASE_URL, … are wandb's own. Offline: OUTPUT/wandb.

    Args:
        folder, first_step, earlier: as every sink.
        project: it goes to.
    """

    def __init__(
        self, folder: Path, first_step: int, earlier: Sequence[Line], *, project: str
    ) -> None:
        import wandb

        self._wandb: Any = wandb
        name = folder.resolve().name
        identity = _identity(folder / "wandb" / "run_id", first_step, lambda: secrets.token_hex(4))
        own = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=identity,
            dir=str(folder),
            resume="allow",
            settings=own,
        )
        offline = bool(self._run.offline)
        # On a server `step` is the one after the last that it has.
        self._next = 0 if offline else int(self._run.step)
        for line in earlier:
            self.scalars(line["step"], numbers(line))
        if offline:
            written = Path(self._run.dir).parent
            for older in written.parent.glob(f"offline-run-*-{identity}"):
                if older != written:
                    shutil.rmtree(older)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, shown(values))

    def text(self, step: int, name: str, text: str) -> None:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self._log(step, {name: self._wandb.Html(f"<pre>{escaped}</pre>", inject=False)})

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        self._log(step, {shown_name(name): self._wandb.Histogram(values.numpy())})

    def image(self, step: int, name: str, image_HWC: Tensor) -> None:
        self._log(step, {shown_name(name): self._wandb.Image(image_HWC.numpy())})

    def settings(self, values: Mapping[str, Setting]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # It has no two rows of a step: what is said of one later is merged into its row.
        if values and step >= self._next:
            self._run.log(dict(values), step=step)


class Mlflow(Sink):
    """A run of mlflow; MLFLOW_TRACKING_URI is mlflow's own, by default OUTPUT/mlflow.db.

    Args:
        folder, first_step, earlier: as every sink.
        project: the experiment that it belongs to.
    """

    def __init__(
        self, folder: Path, first_step: int, earlier: Sequence[Line], *, project: str
    ) -> None:
        from mlflow import MlflowClient

        folder = folder.resolve()
        place = os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = MlflowClient(tracking_uri=place or f"sqlite:///{folder}/mlflow.db")
        self._waiting: list[Any] = []

        def made() -> str:
            found = self._client.get_experiment_by_name(project)
            if found is None:
                artifacts = None if place else (folder / "mlflow").as_uri()
                experiment = self._client.create_experiment(project, artifact_location=artifacts)
            else:
                experiment = found.experiment_id
            run = self._client.create_run(experiment, run_name=folder.name)
            return str(run.info.run_id)

        self._run = _identity(folder / "mlflow" / "run_id", first_step, made)
        self._client.update_run(self._run, status="RUNNING")
        self._last = {
            name: max(point.step for point in self._client.get_metric_history(self._run, name))
            for name in self._client.get_run(self._run).data.metrics
        }
        for line in earlier:
            self.scalars(line["step"], numbers(line))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(name, value, now, step)
            for name, value in map(_named, shown(values).items())
            if step > self._last.get(name, -1)
        ]
        if len(self._waiting) > 1000:
            self.flush()
        for start in range(0, len(new), 1000):  # as many as its servers take at once
            part = new[start : start + 1000]
            self._waiting.append(self._client.log_batch(self._run, metrics=part, synchronous=False))

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run, text, f"{name}/step-{step:08d}.md")

    def image(self, step: int, name: str, image_HWC: Tensor) -> None:
        self._client.log_image(
            self._run, image_HWC.numpy(), key=shown_name(name).replace("/", "."), step=step
        )

    def settings(self, values: Mapping[str, Setting]) -> None:
        for key, value in values.items():
            self._client.set_tag(self._run, f"config.{key}", str(value)[:5000])

    def flush(self) -> None:
        for one in self._waiting:
            one.wait()
        self._waiting = []

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._run)


def _named(item: tuple[str, float]) -> tuple[str, float]:
    """A number under a name that mlflow takes: sources of data may be called what they like."""
    return re.sub(r"[^\w.\- :/]", "_", item[0]), item[1]


def _identity(path: Path, first_step: int, make: Any) -> str:
    """By what a tracker knows the run: a new name where it starts anew, else that from before."""
    if first_step > 0 and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    name = str(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name, encoding="utf-8")
    return name
