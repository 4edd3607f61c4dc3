"""Sinks hold the same numbers, whoever was killed: no step twice, none missing."""

from __future__ import annotations

import csv
import json
import math
import os
import struct
import subprocess
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from adaptive.observe.metric_log import MetricLog, read_metrics
from adaptive.observe.sinks import Csv, OpenSink, numbers, shown
from adaptive.observe.trackers import Mlflow, Wandb
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.log import DeepSpeedMonitors, check_sinks, without_monitors

Points = dict[tuple[str, int], float]
SECTION = {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}}


def openers(names: list[str]) -> list[OpenSink]:
    ways: dict[str, OpenSink] = {
        "csv": Csv,
        "wandb": partial(Wandb, project="tests"),
        "mlflow": partial(Mlflow, project="tests"),
        "deepspeed": partial(DeepSpeedMonitors, section=SECTION),
    }
    return [ways[name] for name in names]


def values(step: int) -> dict[str, float]:
    layers = {f"routing/layers.{n}/executed_share": 0.125 * n + step for n in (1, 10)}
    return {"loss/train": 1 / step, **layers}


def write(folder: Path, names: list[str], first: int, last: int, *, dies: bool) -> None:
    """Steps of a run, a checkpoint at 4, an evaluation at every fifth."""
    log = MetricLog(folder, first_step=first, sinks=openers(names))
    for step in range(max(first, 1), last + 1):
        log.scalars(step, values(step))
        if step % 5 == 0:
            log.scalars(step, {"validation/loss": float(step)})
            log.image(step, "samples", torch.zeros(4, 4, 3, dtype=torch.uint8))
        if step == 4:
            log.flush()
            log.alarm(step, layer="layers.1", kind="load", message="collapsed")
    if dies:
        log.flush()
        os._exit(9)
    log.close()


def killed_and_resumed(folder: Path, name: str) -> Points:
    """A run of 12 steps, killed after step 7 (in a process of its own), continued from step 4."""
    code = (
        f"import torch.distributed as d; d.init_process_group('gloo', "
        f"init_method='file://{folder.parent}/group-{{}}', rank=0, world_size=1)\n"
        f"if {name == 'deepspeed'}:\n import deepspeed\n"
        " deepspeed.init_distributed('gloo', auto_mpi_discovery=False)\n"
        "from pathlib import Path; from tests.launch.test_sinks import write\n"
        f"write(Path({str(folder)!r}), [{name!r}], {{}}, {{}}, dies={{}})"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    for number, (first, last, dies) in enumerate(((0, 7, True), (5, 12, False))):
        words = [sys.executable, "-c", code.format(number, first, last, dies)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == (9 if dies else 0), done.stderr
    lines = read_metrics(folder / "metrics.jsonl")
    points: Points = {}
    for line in lines:
        if "alarm" not in line:
            told = numbers(line) if name == "csv" else shown(numbers(line))
            points |= {(key, line["step"]): value for key, value in told.items()}
    assert sorted(step for k, step in points if k == "loss/train") == list(range(1, 13))
    return points


def once(found: list[tuple[str, int, float]]) -> Points:
    """Points, none of them there twice."""
    twice = [key for key, n in Counter((name, step) for name, step, _ in found).items() if n > 1]
    assert not twice
    return {(name, step): value for name, step, value in found}


def same(found: Points, wanted: Points) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def events(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    names = read.Tags()["scalars"]
    return [(name, point.step, point.value) for name in names for point in read.Scalars(name)]


def test_csv_and_tensorboard(tmp_path: Path) -> None:
    wanted = killed_and_resumed(tmp_path / "run", "csv")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["name"], int(row["step"]), float(row["value"])) for row in rows]
    assert once(found) == wanted
    by_people = {}
    for step in range(1, 13):
        of_step = {name: value for (name, at), value in wanted.items() if at == step}
        by_people |= {(name, step): value for name, value in shown(of_step).items()}
    same(once(events(tmp_path / "run" / "tensorboard" / "run")), by_people)


@pytest.mark.slow
def test_deepspeed_monitors(tmp_path: Path) -> None:
    wanted = killed_and_resumed(tmp_path / "run", "deepspeed")
    place = tmp_path / "run" / "deepspeed" / "run"
    same(once(events(place)), wanted)
    names = {name.replace("/", "_"): name for name, _ in wanted}
    found = []
    for path in place.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.reader(file))[1:]
        found += [(names[path.stem], int(step), float(value)) for step, value in rows]
    assert once(found) == wanted


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb (extra track)")
def test_wandb(tmp_path: Path) -> None:
    wanted = killed_and_resumed(tmp_path / "run", "wandb")
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    same(once(wandb_points(written)), wanted)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow (extra track)")
def test_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    wanted = killed_and_resumed(tmp_path / "run", "mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == "run"
    found = []
    for name in run.data.metrics:
        found += [(name, m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
    same(once(found), wanted)


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
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            step = record.history.step.num
            # Sizes of pictures are items of their own.
            row = {
                k: json.loads(v) for k, v in items.items() if k[:1] != "_" and "samples" not in k
            }
            found += [(k, step, v) for k, v in row.items() if isinstance(v, int | float)]
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
