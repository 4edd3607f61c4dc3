"""Monitoring: the numbers are right, written once, and change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive import MixtureOfExperts, RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import ExpertsWithIdle
from adaptive.flops import executed_flops, nominal_flops
from adaptive.models import Decoder, DecoderConfig, DiffusionConfig, DiffusionTransformer
from adaptive.observe.alarms import AlarmLimits
from adaptive.observe.metric_log import MetricLog, read_metrics
from adaptive.observe.monitor import Monitor
from adaptive.observe.sinks import shown_name
from adaptive.routing.summary import RoutingWindow
from adaptive.routing.tape import RoutingRecord

CONFIG = DecoderConfig(
    vocab_size=31,
    dim=32,
    num_layers=4,
    num_heads=4,
    mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25),
)


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


def batch(step: int, rows: int = 4, length: int = 24) -> Tensor:
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(step))


def train(steps: int, monitor_to: Path | None, *, every: int = 3) -> tuple[Decoder, list[float]]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    log = None if monitor_to is None else MetricLog(monitor_to)
    monitor = None if monitor_to is None else Monitor(net, log=log, every=every)
    losses = []
    for step in range(steps):
        ids_BS = batch(step)
        with RoutingTape(net) as tape:
            loss = net.token_losses(ids_BS, ids_BS.roll(-1, 1)).mean()
        optimizer.zero_grad()
        (loss + tape.loss()).backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            monitor.observe(tape)
            monitor.end_step(step + 1, {"loss/train": losses[-1]}, tokens=96, seconds=0.5)
            monitor.histograms(step + 1, tape.records)
    if log is not None:
        log.close()
    return net, losses


def test_monitoring_never_changes_the_training(tmp_path: Path) -> None:
    """Bit for bit: same losses, same parameters, same state of the random generator."""
    watched, watched_losses = train(7, tmp_path)
    watched_state = torch.get_rng_state()
    alone, losses = train(7, None)
    assert losses == watched_losses
    assert torch.equal(watched_state, torch.get_rng_state())
    for (name, a), (_, b) in zip(
        watched.state_dict().items(), alone.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_every_name_of_the_issue_is_written(tmp_path: Path) -> None:
    train(6, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6]
    for name in (
        "loss/train",
        "throughput/tokens_per_second",
        "throughput/executed_flops_per_second",
        "throughput/nominal_flops_per_second",
        "routing/layers.1/executed_share",
        "routing/layers.3/predictor_accuracy",
        "routing/layers.3/router_bce",
        "routing/layers.3/weight_std",
    ):
        assert math.isfinite(lines[1][name]), name
    over_layers = sum(lines[1][f"routing/layers.{i}/router_bce"] for i in (1, 3))
    assert lines[1]["loss/router_bce"] == pytest.approx(over_layers)
    assert lines[1]["routing/layers.1/executed_share"] == pytest.approx(0.25)
    assert lines[1]["routing/layers.1/tokens"] == 3 * 96
    assert lines[1]["throughput/tokens_per_second"] == pytest.approx(2 * 96)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(6, tmp_path)
    everything = {"scalars": 0, "histograms": 0}
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name), everything).Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for line in lines:
        for name, value in line.items():
            if name == "step":
                continue
            at_step = {e.step: e.value for e in events.Scalars(shown_name(name))}
            assert at_step[line["step"]] == pytest.approx(value, rel=1e-6), name
    assert len(events.Histograms("routing/weights/layer_01")) == 6


def test_flop_throughput_is_that_of_the_tokens_really_run(tmp_path: Path) -> None:
    net = model()
    monitor = Monitor(net, every=2)
    executed, nominal = 0.0, 0
    for step, rows in enumerate([2, 5]):
        ids_BS = batch(step, rows)
        with RoutingTape(net) as tape:
            net.token_losses(ids_BS, ids_BS)
        monitor.observe(tape)
        monitor.end_step(step + 1, {}, tokens=rows * 24, seconds=2.0)
        executed += float(executed_flops(net, tape.records, rows, 24, backward=True))
        nominal += nominal_flops(net, rows, 24, backward=True)
    latest = monitor.latest
    assert latest["throughput/executed_flops_per_second"] == pytest.approx(executed / 4)
    assert latest["throughput/nominal_flops_per_second"] == pytest.approx(nominal / 4)
    assert latest["throughput/executed_share_of_nominal"] == pytest.approx(executed / nominal)


def test_observing_reads_nothing_from_the_device() -> None:
    """Between writings no operation runs at all, so none can wait for the device."""
    net = model()
    ids_BS = batch(0)
    with RoutingTape(net) as tape:
        net.token_losses(ids_BS, ids_BS)
    monitor = Monitor(net, every=10)

    class NoOperation(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, *_: Any, **__: Any) -> None:
            raise AssertionError(f"{func} ran")

    with NoOperation():
        monitor.observe(tape)
        monitor.end_step(1, {"loss/train": 1.0}, tokens=96, seconds=1.0)


def test_window_means_are_those_of_all_tokens_together() -> None:
    """Against the statistics of the joined data, from micro-batches of unequal size."""
    generator = torch.Generator().manual_seed(3)
    window, everything, entropies = RoutingWindow(), [], []
    for executed, tokens in ((5, 9), (1, 4), (0, 3), (12, 12)):
        weights = torch.randn(executed, generator=generator, dtype=torch.float64)
        entropy = torch.rand(tokens, generator=generator, dtype=torch.float64)
        everything.append(weights)
        entropies.append(entropy)
        record = RoutingRecord("a", "kind", tokens, torch.tensor(executed))
        record.entropy = entropy.mean()
        if executed:
            record.weight_mean, record.weight_std = weights.mean(), weights.std(correction=0)
        record.load = torch.tensor([executed, 0, 1])
        record.losses = {"balance": torch.tensor(0.25)}
        window.add([record])
    summaries, extra = window.reduce([torch.tensor(2.0), 3], steps=2)
    summary, joined = summaries["a"], torch.cat(everything)
    assert extra == [2.0, 3.0]
    assert summary["tokens"] == 28
    assert summary["executed"] == 18
    assert summary["weight_mean"] == pytest.approx(joined.mean().item())
    assert summary["weight_std"] == pytest.approx(joined.std(correction=0).item())
    assert summary["entropy"] == pytest.approx(torch.cat(entropies).mean().item())
    assert summary["dead_units"] == 1
    assert summary["load_over_mean"] == pytest.approx(18 * 3 / 22)
    assert summary["balance"] == pytest.approx(4 * 0.25 / 2)
    assert window.reduce()[0] == {}, "a window starts empty"


@pytest.mark.parametrize("idle", [False, True])
def test_entropy_of_a_router_without_preference_is_the_whole_of_its_maximum(idle: bool) -> None:
    """Idle experts are choices too."""
    experts = ExpertsWithIdle(16, 16, 4, idle_experts=3) if idle else MixtureOfExperts(16, 16, 4)
    torch.nn.init.zeros_(experts.router.weight)
    with RoutingTape(experts) as tape:
        experts(torch.randn(2, 8, 16))
    window = RoutingWindow()
    window.add(tape.records)
    (summary,) = window.reduce()[0].values()
    assert summary["units"] == 4
    assert summary["entropy_share"] == pytest.approx(1, abs=1e-6)


def test_resuming_writes_no_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path) as log:
        for step in range(8):
            log.scalars(step, {"loss/train": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/tr')  # what a killed run leaves
    with MetricLog(tmp_path, first_step=5) as log:
        for step in range(5, 10):
            log.scalars(step, {"loss/train": 100.0 + step})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["loss/train"] for line in lines[4:6]] == [4.0, 105.0]
    points = (
        EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
        .Reload()
        .Scalars("loss/train")
    )
    assert [point.step for point in points] == list(range(10))
    assert points[5].value == 105.0


@pytest.mark.parametrize("line", ['{"step": "1"}', "[1]", "[" * 100_000, "{"])
def test_a_log_is_kept_up_to_what_is_no_line_of_it(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl: line 2 cannot be read"):
        MetricLog(tmp_path, first_step=3, tensorboard=False).close()
    assert read_metrics(path) == [{"step": 0}]


def test_starting_anew_forgets_an_earlier_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        with MetricLog(tmp_path) as log:
            log.scalars(0, {"loss/train": value})
    assert [x["loss/train"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]
    points = (
        EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
        .Reload()
        .Scalars("loss/train")
    )
    assert [point.value for point in points] == [2.0]


def test_not_finite_is_null_and_valid_json(tmp_path: Path) -> None:
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.scalars(0, {"loss/train": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 0, "loss/train": None}


def test_alarm_reaches_caller_and_log(tmp_path: Path) -> None:
    net = model()
    with MetricLog(tmp_path, tensorboard=False) as log:
        monitor = Monitor(net, log=log, every=1, limits=AlarmLimits(patience=0))
        ids_BS = batch(0)
        with RoutingTape(net) as tape:
            net.token_losses(ids_BS, ids_BS)
        wrong = {"predictor_accuracy": torch.tensor(0.05)}
        tape.records = [dataclasses.replace(record, **wrong) for record in tape.records]
        monitor.observe(tape)
        alarms = monitor.end_step(0, {"loss/train": float("inf")}, tokens=96, seconds=1.0)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "alarm" in line]
    assert [str(alarm).split(":")[0] for alarm in alarms] == ["alarm at step 0"] * 3
    assert [(a.layer, a.kind) for a in alarms] == [
        ("", "non_finite"),
        ("layers.1", "predictor"),
        ("layers.3", "predictor"),
    ]
    assert [(line["layer"], line["alarm"]) for line in lines] == [(a.layer, a.kind) for a in alarms]


def test_evaluation_is_kept_apart(tmp_path: Path) -> None:
    net = model().eval()
    with MetricLog(tmp_path, tensorboard=False) as log, torch.no_grad():
        monitor = Monitor(net, log=log, limits=AlarmLimits(patience=0, drift=0.0))
        with RoutingTape(net) as tape:
            net(batch(0))
        monitor.observe_evaluation(tape)
        alarms = monitor.end_evaluation(4, {"validation/loss": 3.5})
    (line,) = (x for x in read_metrics(tmp_path / "metrics.jsonl") if "alarm" not in x)
    assert line["validation/loss"] == 3.5
    assert line["validation_routing/layers.1/planned_share"] == pytest.approx(0.25)
    assert {alarm.kind for alarm in alarms if alarm.layer == "layers.1"} >= {"drift"}


def test_a_writing_reads_from_the_device_once() -> None:
    net = model()
    window = RoutingWindow()
    for step in range(3):
        with RoutingTape(net) as tape:
            net.token_losses(batch(step), batch(step))
        window.add(tape.records)
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item"):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    with Reads():
        window.reduce([torch.tensor(1.0)], steps=3)
    # `tolist` of one vector is one copy to the host, which reads no single element.
    assert reads == []


def test_patches_that_a_diffusion_model_keeps_are_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.manual_seed(0)
    config = DiffusionConfig(
        image_size=8, patch_size=1, channels=1, dim=16, num_heads=2, num_classes=3
    )
    net = DiffusionTransformer(config).train()
    with MetricLog(tmp_path) as log:
        monitor = Monitor(net, log=log, every=1)
        with RoutingTape(net) as tape:
            net(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2]))
        monitor.observe(tape)
        monitor.end_step(1, {}, tokens=3 * 64, seconds=1.0)
        monitor.histograms(1, tape.records)
    assert 0 < monitor.latest["throughput/executed_share_of_nominal"] < 1
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["routing/kept/trunk"]
