"""Monitoring over ranks: one all-reduce a writing, and the numbers of all tokens together."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from adaptive.models.decoder.generate import Sampling, generate
from adaptive.observe.metric_log import MetricLog, read_metrics
from adaptive.observe.monitor import Monitor
from adaptive.routing.summary import RoutingWindow
from adaptive.routing.tape import RoutingRecord
from launch.checkpoint.contents import WEIGHTS
from launch.checkpoint.files import find_checkpoint
from launch.checkpoint.models import load_decoder
from launch.run.config import load_config
from launch.run.training import run
from launch.tasks.samples import shown_samples
from tests.ranks import run_ranks

RECIPE = {
    "task": "language_model",
    "model": {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_seq_len": 32,
        "mixture_of_depths": {"capacity": 0.25},
    },
    "data": {"seq_len": 32, "validation_rows": 4},
    "train": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "calibrate_rows": 4},
    "monitor": {
        "every": 1,
        "samples": {"prompts": ["def f(", "x"], "tokens": 6, "temperature": 0},
    },
}


def record(rank: int, batch: int, *, extra: bool = False) -> RoutingRecord:
    """A record that differs from rank to rank, in its fields too: some ranks execute nothing."""
    executed = 3 * rank * (batch + 1)
    made = RoutingRecord("layers.1", "kind", 10 + rank, torch.tensor(executed))
    made.entropy = torch.tensor(0.1 * rank + 0.05)
    if executed:
        made.weight_mean, made.weight_std = torch.tensor(float(rank)), torch.tensor(0.5)
    made.load = torch.tensor([executed, 0, rank])
    made.losses = {"balance": torch.tensor(0.01 * (rank + 1))}
    if extra:
        made.statistics = {"late": torch.tensor(float(rank))}
    return made


def reduced(ranks: int) -> tuple[Any, Any]:
    """What one process makes of all ranks' records."""
    window = RoutingWindow()
    window.add([record(rank, batch) for rank in range(ranks) for batch in range(2)])
    first = window.reduce([sum(range(ranks))])
    window.add([record(rank, 0, extra=rank == 1) for rank in range(ranks)])
    return first, window.reduce()


def reduce_here() -> tuple[Any, Any, list[int]]:
    """The same over ranks, and how many all-reduces each writing took."""
    rank, counts = dist.get_rank(), []
    calls = [0]
    all_reduce = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    window = RoutingWindow(dist.group.WORLD)
    results = []
    for extra in (False, True, True):
        before = calls[0]
        batches = range(1) if extra else range(2)
        window.add([record(rank, batch, extra=extra and rank == 1) for batch in batches])
        results.append(window.reduce([] if extra else [rank]))
        counts.append(calls[0] - before)
    dist.all_reduce = all_reduce
    return results[0], results[1], counts


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_reduce_to_what_one_process_computes(ranks: int) -> None:
    first, second = reduced(ranks)
    for got_first, got_second, counts in run_ranks(reduce_here, ranks):
        for got, want in ((got_first, first), (got_second, second)):
            assert got[1] == want[1]
            assert got[0]["layers.1"] == pytest.approx(want[0]["layers.1"])
        # The statistic that one rank alone has is agreed upon once; then one all-reduce again.
        assert counts == [1, 2, 1]


def monitor_here(folder: str) -> list[str]:
    rank = dist.get_rank()
    log = MetricLog(folder, tensorboard=False) if rank == 0 else None
    monitor = Monitor(torch.nn.Linear(1, 1), log=log, every=2, group=dist.group.WORLD)
    said: list[str] = []
    for step in range(200, 205):
        tape = type("Tape", (), {"records": [record(rank, 0)], "lengths": []})()
        monitor.observe(tape)
        said += map(str, monitor.end_step(step, {"loss/train": 1.0}, tokens=4, seconds=1.0))
    if log is not None:
        log.close()
    return said


def test_every_rank_raises_the_same_alarms_and_one_writes(tmp_path: Path) -> None:
    first, second = run_ranks(monitor_here, 2, str(tmp_path))
    assert first == second
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "alarm" not in line] == [200, 202, 204]
    assert lines[1]["routing/layers.1/tokens"] == 2 * (10 + 11)


def run_here(words: list[str]) -> None:
    with redirect_stdout(io.StringIO()):
        run(load_config(words[0], words[1:]))


def samples(output: Path) -> str:
    """What TensorBoard shows of the texts that were sampled last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard" / output.name), {"tensors": 0}).Reload()
    shown = events.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0]
    return str(shown.decode())


def test_every_mesh_logs_the_same_numbers_and_texts(tmp_path: Path) -> None:
    """Losses, routing, operations, gradients and samples do not depend on how ranks share a run."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    logs, texts = [], []
    for name, ranks, mesh in (
        ("one", 1, []),
        ("sequence", 2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
        ("context", 2, ["parallel.context=2"]),
        ("sharded", 2, ["deepspeed.zero_optimization.stage=3"]),
    ):
        run_ranks(run_here, ranks, [str(path), f"output={tmp_path / name}", *mesh], timeout=120)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        texts.append(samples(tmp_path / name))
        logs.append(
            [
                {k: v for k, v in line.items() if not re.search("second|memory|waiting", k)}
                for line in lines
            ]
        )
    # Watching draws nothing, moves nothing: the same weights, bit for bit, as where nobody looks.
    unwatched = [f"output={tmp_path / 'unwatched'}", "monitor.every=9", "monitor.tensorboard=false"]
    run_ranks(run_here, 1, [str(path), *unwatched, "monitor.samples.tokens=0"], timeout=120)
    watched, alone = (
        load_file(find_checkpoint(tmp_path / name) / WEIGHTS) for name in ("one", "unwatched")
    )
    assert watched.keys() == alone.keys()
    assert all(torch.equal(watched[name], alone[name]) for name in watched)
    one, *others = logs
    assert [line["step"] for line in one] == [1, 2, 2]
    assert one[0]["gradients/layers.1/attention"] > 0
    for other in others:
        for line, wanted in zip(other, one, strict=True):
            # Sums in another order: gradients of two steps differ by less than 1e-5.
            assert line == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    # As the finished checkpoint generates, with a cache and one text at a time.
    saved = load_decoder(tmp_path / "one", device="cpu")
    for prompt in (b"def f(", b"x"):
        *_, made = generate(
            saved.model, [list(prompt)], max_new_tokens=6, sampling=Sampling(0), end=0
        )
        text = bytes(made.tokens[0]).decode(errors="replace")
        assert shown_samples([prompt.decode()], [text]) in texts[0]
    assert texts == [texts[0]] * 4
