"""What engine, ranks and data add to a training step, and how fast its products are.

    PYTHONPATH=. python benchmarks/run_step.py [--recipe mod_lm] [--ranks 2] [--quick]

On every rank at once, in turn: `run`, a step of `launch.run.loop` (DeepSpeed, batches, metrics),
and `plain`, the same model, rows and AdamW in a few lines of torch, which send nothing. Both run
on all ranks meanwhile, so that what ranks take from each other (caches, clock) is in both.
`overhead` is the median over rounds of run / plain, less 1; `processor_overhead` the same of rank
0's processor time, in which other work on the machine and waiting for other ranks do not count.

`exchange` is what ranks cannot do without at ZeRO 1, alone: gradients summed, weights gathered.

Where the rest goes is told by `launch.run.profiling`; how fast products are, by torch's profiler on
`plain`: their operations over the time in them, as a share of the rate of one large product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from measure import interleave, interleave_on_ranks, medians, save
from torch import Tensor

from adaptive import RoutingTape, start_step
from adaptive.flops import executed_flops
from launch.checkpoint.state import RunState
from launch.run.config import load_config
from launch.run.engine import Engine
from launch.run.loop import Loop
from launch.run.optimizer import parameter_groups
from launch.run.profiling import numbers, profile_run
from launch.run.ranks import StopRequest, join_ranks
from launch.tasks.registry import task_class
from parallel.linear import Linear
from parallel.mesh import Mesh
from parallel.ranks import on_ranks

PRODUCTS = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm")


class Plain:
    """A step of torch alone on this rank's rows."""

    def __init__(self, config: Any, task: Any, rows: range) -> None:
        torch.manual_seed(config.train.seed)
        self.task, self.model, self.batch = task, task.build_model(), task.batch(rows)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
        )
        self.targets = task.targets(rows)
        self.tape = RoutingTape(self.model)

    def step(self) -> None:
        start_step(self.model, 0)
        with RoutingTape(self.model) as self.tape:
            loss = self.task.loss_sum(self.model, self.batch) / self.targets
        (loss + self.tape.loss()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(recipe: str, overrides: list[str], rounds: int) -> dict[str, Any]:
    device = join_ranks()
    config = load_config(recipe, overrides).phase_configs()[0]
    mesh = Mesh.create(**vars(config.parallel))
    task = task_class(config.task)(config, mesh=mesh, device=device)
    engine = Engine(config, task, mesh=mesh, device=device)
    loop = Loop(config, task, engine, state=RunState(), stop=StopRequest())
    rows = config.train.batch_size // mesh.data
    single = task_class(config.task)(config, mesh=Mesh.single(), device=device)
    plain = Plain(config, single, range(mesh.data_rank * rows, (mesh.data_rank + 1) * rows))
    processor: dict[str, list[float]] = {"run": [], "plain": []}

    def timed(name: str, step: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            begun = time.process_time()
            step()
            processor[name].append(time.process_time() - begun)

        return call

    numbers_sent = sum(p.numel() for p in plain.model.parameters())
    gradients = torch.ones(numbers_sent)
    part = torch.ones(-(-numbers_sent // dist.get_world_size()))
    weights = torch.empty(part.numel() * dist.get_world_size())

    def exchange() -> None:
        dist.all_reduce(gradients)
        dist.all_gather_into_tensor(weights, part)

    cases = {
        "run": timed("run", loop.step),
        "plain": timed("plain", plain.step),
        "exchange": exchange,
    }
    seconds = interleave_on_ranks(cases, rounds, warmup=3)
    ratios = [a / b for a, b in zip(seconds["run"], seconds["plain"], strict=True)]
    spent = {name: statistics.median(times[3:]) for name, times in processor.items()}
    loop.close()
    products = _products(plain, config)
    costs, clock = profile_run(config, None, warmup=5, steps=5)
    return {
        "recipe": recipe,
        "overrides": overrides,
        "ranks": dist.get_world_size(),
        "rounds": rounds,
        "seconds": medians(seconds),
        "overhead": statistics.median(ratios) - 1,
        "overhead_quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)[::2]],
        "processor_seconds": spent,
        "processor_overhead": spent["run"] / spent["plain"] - 1,
        "exchange_share": medians(seconds)["exchange"] / medians(seconds)["plain"],
        "products": products,
        "profile": numbers(costs, clock),
    }


def _products(plain: Plain, config: Any) -> dict[str, float]:
    """How fast the products of a plain step are, beside one large one; all ranks at once."""
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            plain.step()
    events = profiler.profiler.kineto_results.events()
    inside = sum(e.duration_ns() for e in events if e.name() in PRODUCTS) / 1e9 / 5
    work = plain.task.work(plain.batch)
    operations = float(executed_flops(plain.model, plain.tape.records, work, backward=True))
    layer, x = Linear(1024, 1024, bias=False), torch.randn(1024, 1024)

    def large() -> Tensor:
        return layer(x)

    with torch.no_grad():
        rate = 2 * 1024**3 / medians(interleave({"large": large}, rounds=15))["large"]
    whole = medians(interleave({"plain": plain.step}, rounds=9))["plain"]
    return {
        "seconds_in_products": inside,
        "share_of_plain_step": inside / whole,
        "operations": operations,
        "rate": operations / inside,
        "rate_of_a_large_product": rate,
        "share_of_rate": operations / inside / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="mod_lm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="3 rounds, nothing is saved")
    parser.add_argument("overrides", nargs="*", help="keys of the recipe")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    found = on_ranks(measure, options.ranks, options.recipe, options.overrides, rounds, timeout=800)
    for name, value in found.items():
        if name != "profile":
            print(f"{name:20} {value}")
    if not options.quick:
        save("run_step", found)


if __name__ == "__main__":
    main()
