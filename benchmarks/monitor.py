"""What monitoring costs: time in its calls as a share of the training step.

A Mixture-of-Depths decoder trains (forward, backward, AdamW; float32) while everything that
`launch/train.py` watches is on: operations counted, records, and every 10 steps gradient norms by
part, memory, JSON lines, TensorBoard and alarms. Each call is timed where it is made, so that the
noise of steps does not drown it; a second figure is the difference of process time with and
without, TensorBoard's thread included. The claim: at most 0.5% of the step, and the weights at the
end are the same bit for bit. Pictures, drawn at evaluations, are reported by themselves.

    python benchmarks/monitor.py [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from measure import save

from adaptive import RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.flops import Work, executed_flops, nominal_flops
from adaptive.models import Decoder, DecoderConfig
from adaptive.observe.metric_log import MetricLog
from adaptive.observe.monitor import Monitor
from adaptive.observe.pictures import chosen_by_layer, depth_map, text_map
from launch.run.gradient_groups import gradient_norms
from launch.run.memory import memory_in_use
from parallel.mesh import Mesh

EVERY = 10
Result = TypeVar("Result")


class Run:
    """A model that trains, watched or not; times its steps and the calls of the monitor."""

    def __init__(self, config: DecoderConfig, *, batch: int, seq_len: int, log: Path | None):
        torch.manual_seed(0)
        self.model = Decoder(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.ids = torch.randint(0, config.vocab_size, (batch, seq_len))
        self.log = None if log is None else MetricLog(log)
        self.monitor = None if log is None else Monitor(self.model, log=self.log, every=EVERY)
        calls = ("gradients", "operations", "observe", "end_step")
        self.calls: dict[str, list[float]] = {name: [] for name in calls}
        self.steps: list[float] = []
        self.processor: list[float] = []
        self.number = 0

    def step(self) -> RoutingTape:
        self.number += 1
        begun, processor = time.perf_counter(), time.process_time()
        with RoutingTape(self.model) as tape:
            loss = self.model.token_losses(self.ids, self.ids).mean()
        self.optimizer.zero_grad()
        (loss + tape.loss()).backward()
        norms: dict[str, float] = {}
        if self.monitor is not None and self.monitor.due(self.number):
            norms = self._timed("gradients", self._gradients)
        self.optimizer.step()
        if self.monitor is not None:
            self._watch(tape, float(loss.detach()), begun, norms)
        self.steps.append(time.perf_counter() - begun)
        self.processor.append(time.process_time() - processor)
        return tape

    def _gradients(self) -> dict[str, float]:
        norms = gradient_norms(self.model.named_parameters(), Mesh.single(), self.optimizer)
        return norms | memory_in_use(torch.device("cpu"))

    def _watch(self, tape: RoutingTape, loss: float, begun: float, norms: dict[str, float]) -> None:
        assert self.monitor is not None
        batch, seq_len = self.ids.shape
        work = Work.dense(batch, seq_len)
        executed, nominal = self._timed(
            "operations",
            lambda: (
                float(executed_flops(self.model, tape.records, work, backward=True)),
                float(nominal_flops(self.model, work, backward=True)),
            ),
        )
        self._timed("observe", lambda: self.monitor.observe(tape))
        self._timed(
            "end_step",
            lambda: self.monitor.end_step(
                self.number,
                {"loss/train": loss, "learning_rate": 1e-3},
                tokens=self.ids.numel(),
                seconds=time.perf_counter() - begun,
                operations=(executed, nominal),
                details={f"gradients/{name}": norm for name, norm in norms.items()},
            ),
        )

    def _timed(self, name: str, call: Callable[[], Result]) -> Result:
        begun = time.perf_counter()
        result = call()
        self.calls[name].append(time.perf_counter() - begun)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    quick = parser.parse_args().quick
    dim, layers, batch, seq_len, rounds = (32, 4, 2, 32, 2) if quick else (192, 6, 16, 256, 3)
    config = DecoderConfig(
        dim=dim,
        num_layers=layers,
        num_heads=2 if quick else 6,
        max_seq_len=seq_len,
        mixture_of_depths=MixtureOfDepthsConfig(capacity=0.125),
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain = Run(config, batch=batch, seq_len=seq_len, log=None)
        watched = Run(config, batch=batch, seq_len=seq_len, log=Path(folder))
        for run in (plain, watched):
            run.step()  # warms up
        for run in (plain, watched):
            run.steps, run.processor = [], []
            run.calls = {name: [] for name in run.calls}
        watched.number = 0
        for _ in range(rounds * EVERY):
            plain.step()
            tape = watched.step()
        begun = time.perf_counter()
        names, routed, chosen_LT = chosen_by_layer(tape.records, layers)
        text = ["x"] * seq_len
        depth_map(text, names, routed, chosen_LT)
        text_map(text, chosen_LT)
        assert watched.monitor is not None
        watched.monitor.histograms(watched.number, tape.records)
        pictures = time.perf_counter() - begun
        assert watched.log is not None
        watched.log.close()
    weights = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    same_bits = all(torch.equal(a, b) for a, b in weights)
    steps = len(watched.steps)
    step = median(plain.steps)
    calls = {name: sum(times) / steps for name, times in watched.calls.items()}
    share = sum(calls.values()) / step
    processor = median(watched.processor) / median(plain.processor) - 1
    result = {
        "dim": dim,
        "layers": layers,
        "batch": batch,
        "seq_len": seq_len,
        "steps": steps,
        "threads": 1,
        "written_every": EVERY,
        "claim": "share_of_step <= 0.005",
        "seconds_per_step": round(step, 5),
        "seconds_per_step_in": {name: round(seconds, 7) for name, seconds in calls.items()},
        "share_of_step": round(share, 5),
        "process_time_difference": round(processor, 4),
        "seconds_for_pictures": round(pictures, 4),
        "same_bits": same_bits,
    }
    for name, value in result.items():
        print(f"{name:24s} {value}")
    assert same_bits
    if not quick:
        save("monitor", result)


if __name__ == "__main__":
    main()
