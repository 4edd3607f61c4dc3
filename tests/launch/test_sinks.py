"""Sinks hold the same numbers, whoever was killed: no step twice, none missing."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import struct
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from adaptive.observe.metric_log import MetricLog, read_metrics
from adaptive.observe.sinks import numbers, shown
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.log import check_sinks, without_monitors
from launch.run.training import run
from launch.run.trust import trust
from launch.tasks import TrainedModel
from launch.tasks.language_model import LanguageModelTask
from tests.distributed.runs import tiny_config, write_text
from tests.ranks import RankError, run_ranks

Points = dict[tuple[str, int], float]
SECTION = {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}}
CLOCK = "second|waiting|memory"
TRACKERS = [name for name in ("wandb", "mlflow") if find_spec(name)]


class Dying(LanguageModelTask):
    """Kills its process at step 7, when all sinks have been given it, the first time."""

    def report(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:
        died = Path(self.config.output) / "died"
        if step == 7 and not died.exists():
            died.touch()
            assert log is not None
            log.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        super().report(engine, step, log)


def train(tree: dict[str, Any]) -> None:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    trust([tree["task"]])
    run(from_mapping(tree))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with every sink, killed at step 7, continued from the checkpoint of 4."""
    folder = tmp_path_factory.mktemp("sinks")
    write_text(folder)
    tree = tiny_config(
        folder,
        task="tests.launch.test_sinks:Dying",
        model={"num_layers": 4},
        train={"steps": 12, "batch_size": 4, "evaluate_every": 5},
        checkpoint={"every": 4},
        monitor={
            "every": 1,
            "images_every": 7,
            "tensorboard": True,
            "sinks": ["csv", "deepspeed", *TRACKERS],
            "project": "tests",
            "samples": {"tokens": 2},
        },
        deepspeed=SECTION,
    )
    with pytest.raises(RankError, match="died without a result"):
        run_ranks(train, 1, tree, timeout=120)
    run_ranks(train, 1, tree, timeout=120)
    return folder / "run"


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, without alarms; every step is there once, and evaluations beside."""
    found = [line for line in read_metrics(folder / "metrics.jsonl") if "alarm" not in line]
    trained = [line["step"] for line in found if "loss/train" in line]
    evaluated = [line["step"] for line in found if "validation/loss" in line]
    assert trained == list(range(1, 13))
    assert evaluated == [5, 10, 12]
    return found


@pytest.fixture(scope="module")
def wanted(lines: list[dict[str, float]]) -> Points:
    """Points under the names that people are shown."""
    return {
        (name, int(line["step"])): value
        for line in lines
        for name, value in shown(numbers(line)).items()
    }


def once(found: list[tuple[str, int, float]]) -> Points:
    """Points, none of them there twice."""
    twice = [key for key, n in Counter((name, step) for name, step, _ in found).items() if n > 1]
    assert not twice
    return {(name, step): value for name, step, value in found}


def same(found: Points, wanted: Points) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def values(step: int) -> dict[str, float]:
    layers = {f"routing/layers.{n}/executed_share": 0.125 * n + step for n in (1, 10)}
    return {"loss/train": 1 / step, **layers}


def events(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    names = read.Tags()["scalars"]
    return [(name, point.step, point.value) for name in names for point in read.Scalars(name)]


def test_csv(folder: Path, lines: list[dict[str, float]]) -> None:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["name"], int(row["step"]), float(row["value"])) for row in rows]
    told = [(name, int(line["step"]), v) for line in lines for name, v in numbers(line).items()]
    assert once(found) == once(told)


def test_tensorboard(folder: Path, wanted: Points) -> None:
    same(once(events(folder / "tensorboard" / "run")), wanted)
    assert ("routing_summary/executed_share/mean", 12) in wanted
    assert ("gradients/attention/layer_03", 12) in wanted


def test_deepspeed_monitors(folder: Path, wanted: Points) -> None:
    place = folder / "deepspeed" / "run"
    same(once(events(place)), wanted)
    names = {name.replace("/", "_"): name for name, _ in wanted}
    found = []
    for path in place.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.reader(file))[1:]
        found += [(names[path.stem], int(step), float(value)) for step, value in rows]
    assert once(found) == wanted


@pytest.mark.skipif("wandb" not in TRACKERS, reason="needs wandb (extra track)")
def test_wandb(folder: Path, wanted: Points) -> None:
    (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    same(once(wandb_points(written)), wanted)


@pytest.mark.skipif("mlflow" not in TRACKERS, reason="needs mlflow (extra track)")
def test_mlflow(folder: Path, wanted: Points) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == "run"
    found = []
    for name in run.data.metrics:
        found += [(name, m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
    points = once(found)
    assert points.keys() == wanted.keys()
    # It drops nothing: of steps that came again it has what the clock said the first time.
    for key in [key for key in points if 5 <= key[1] <= 7 and re.search(CLOCK, key[0])]:
        points[key] = wanted[key]
    same(points, wanted)


def wandb_points(path: Path) -> list[tuple[str, int, float]]:
    """Rows of a .wandb file: protocol buffers in a log of LevelDB's format, behind a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no header
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):  # a whole record, or its last part
            continue
        record, parts = Record.FromString(parts), b""
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                # Parts of a picture are items too, one level down.
                key, *deeper = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                if not deeper and key[:1] != "_" and isinstance(value, int | float):
                    found.append((key, record.history.step.num, value))
    return found


def test_names_are_statistic_first_and_layers_are_summed_up() -> None:
    told = shown({"routing/layers.7/share": 1.0, "routing/layers.10/share": 4.0, "loss/train": 2.0})
    assert told == {
        "routing/share/layer_07": 1.0,
        "routing/share/layer_10": 4.0,
        "loss/train": 2.0,
        "routing_summary/share/least": 1.0,
        "routing_summary/share/most": 4.0,
        "routing_summary/share/mean": 2.5,
    }
    nan = shown({"routing/layers.1/a": math.nan, "routing/layers.2/a": 1.0})
    assert math.isnan(nan["routing_summary/a/mean"])


def test_a_run_of_an_earlier_version_continues_under_todays_names(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    log = MetricLog(tmp_path, tensorboard=False)
    with SummaryWriter(str(tmp_path / "tensorboard")) as before:
        for step in (1, 2):
            log.scalars(step, values(step))
            before.add_scalar("routing/layers.1/executed_share", 0.5, step)
    log.close()
    with MetricLog(tmp_path, first_step=3) as log:
        log.scalars(3, values(3))
    found = once(events(tmp_path / "tensorboard" / tmp_path.name))
    assert [step for name, step in found if name == "routing/executed_share/layer_01"] == [1, 2, 3]
    assert any((tmp_path / "tensorboard").glob("events*")), "what was there is kept"


def test_tensorboard_is_given_one_event_a_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many curves there are: each event is a checksum and a turn of its thread."""
    from torch.utils.tensorboard import FileWriter

    with MetricLog(tmp_path) as log:
        log.scalars(1, values(1))  # lays out the tab of curves over layers, once
        given: list[int] = []
        monkeypatch.setattr(FileWriter, "add_event", lambda *_: given.append(1))
        for step in (2, 3):
            log.scalars(step, values(step))
        assert len(given) == 2


@pytest.mark.parametrize(
    ("monitor", "deepspeed", "said"),
    [
        (["deepspeed"], {}, "needs deepspeed.csv_monitor.enabled=true"),
        (
            ["deepspeed"],
            {"csv_monitor": {"enabled": True, "output_path": "x"}},
            "deepspeed.csv_monitor.output_path=x: must be left out",
        ),
    ],
)
def test_a_sink_that_cannot_be_opened_is_one_line(
    monitor: list[str], deepspeed: dict[str, object], said: str
) -> None:
    config = from_mapping({"monitor": {"sinks": monitor}, "deepspeed": deepspeed})
    with pytest.raises(BadInput, match=said) as caught:
        check_sinks(config)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.run.log.find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"monitor.sinks=wandb: needs the package wandb"):
        check_sinks(from_mapping({"monitor": {"sinks": ["wandb"]}}))


def test_the_engine_is_not_given_the_monitors_of_the_sink() -> None:
    section = {**SECTION, "zero_optimization": {"stage": 1}}
    config = from_mapping({"monitor": {"sinks": ["deepspeed"]}, "deepspeed": section})
    assert without_monitors(config) == {"zero_optimization": {"stage": 1}}
