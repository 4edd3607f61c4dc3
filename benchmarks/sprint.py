"""Do dropped middle tokens become saved time? A SPRINT step against the dense step.

Forward and backward of a diffusion transformer (D 384, 6 heads, 256 tokens, depth 2/8/2, B 8,
float32, 2 threads). Dense: every token in every layer, no path dropped. Stage 1 keeps a quarter of
the tokens in the middle and drops a tenth of the samples from it, stage 2 drops the samples alone.
Of 8 samples 0.8 are dropped on average: times and operations are a fifth of those of a step that
drops none and four fifths of those of a step that drops one. The claims: time ratio of stage 1 at
most 0.48, and at most 1.05 times the ratio of executed operations. Also one guided evaluation
(forward): path-drop against classifier-free.

Every step allocates and frees hundreds of MB. Where the C library hands memory back between steps,
the page faults of getting it again cost the dense step most; `minor_faults` counts them. To measure
without: MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=500000000 MALLOC_MMAP_MAX_=0.

    python benchmarks/sprint.py [--quick]
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable

import torch
from measure import interleave, median_ratio, medians, save
from torch import Tensor

from adaptive.flops import executed_flops
from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.routing.tape import RoutingTape

TIME_RATIO_BOUND, OVER_FLOPS_BOUND = 0.48, 1.05
ONE_DROPPED = ", one dropped"


def build(config: DiffusionConfig) -> DiffusionTransformer:
    """A model in which no layer is left at zero: every gradient is a real one."""
    torch.manual_seed(0)
    model = DiffusionTransformer(config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = DiffusionConfig(dim=384, num_heads=6)
    batch, rounds = 8, 31
    if options.quick:
        config = DiffusionConfig(image_size=16, dim=64, num_heads=4)
        batch, rounds = 2, 3
    model = build(config)
    x = torch.randn(batch, config.channels, config.image_size, config.image_size)
    t, y = torch.rand(batch), torch.arange(batch)

    faults: dict[str, list[int]] = {}

    def step(name: str, keep: float, dropped: int) -> Callable[[], None]:
        drop_path = torch.arange(batch) < dropped

        def run() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            model.train()
            model.trunk.keep = keep
            model.zero_grad()
            forward(drop_path).square().sum().backward()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            faults.setdefault(name, []).append(after - before)

        return run

    def forward(drop_path: Tensor) -> Tensor:
        return model(x, t, y, drop_path=drop_path)

    def executed(keep: float, dropped: int) -> int:
        model.train().trunk.keep = keep
        with RoutingTape(model) as tape, torch.no_grad():
            forward(torch.arange(batch) < dropped)
        return round(
            float(executed_flops(model, tape.records, batch, config.tokens, backward=True))
        )

    def guided(guidance: str) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model.eval().guided(x, t, y, scale=2.0, guidance=guidance)

        return run

    cases = {"dense": (1.0, 0), "stage 1": (0.25, 0)}
    cases |= {"stage 1" + ONE_DROPPED: (0.25, 1), "stage 2" + ONE_DROPPED: (1.0, 1)}
    # Steps and evaluations apart: an evaluation between two steps moves what the allocator has.
    steps = {name: step(name, *case) for name, case in cases.items()}
    evaluations = {name: guided(name) for name in ("classifier_free", "path_drop")}
    operations = {name: executed(*case) for name, case in cases.items()}
    for guidance in evaluations:
        operations[guidance] = model.guided_flops(batch, guidance=guidance)
    seconds = interleave(steps, rounds=rounds) | interleave(evaluations, rounds=rounds)

    def compare(case: str, baseline: str) -> tuple[float, float]:
        return median_ratio(seconds, case, baseline), operations[case] / operations[baseline]

    def expected(none: tuple[float, float], one: tuple[float, float]) -> tuple[float, float]:
        """Time and operations of a step that drops `path_drop · batch` samples on average."""
        share = config.path_drop * batch
        mean = [
            (1 - share) * before + share * after for before, after in zip(none, one, strict=True)
        ]
        return mean[0], mean[1]

    one_of = {name: compare(name + ONE_DROPPED, "dense") for name in ("stage 1", "stage 2")}
    ratios = {
        "stage 1 / dense": expected(compare("stage 1", "dense"), one_of["stage 1"]),
        "stage 1 without path drop / dense": compare("stage 1", "dense"),
        "stage 2 / dense": expected((1.0, 1.0), one_of["stage 2"]),
        "path_drop / classifier_free": compare("path_drop", "classifier_free"),
    }
    result: dict[str, object] = {
        "shape": f"D {config.dim}, {config.num_heads} heads, {config.tokens} tokens, B {batch}, "
        f"depth {config.encoder_depth}/{config.middle_depth}/{config.decoder_depth}",
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in medians(seconds).items()},
        "operations": operations,
        "minor_faults": {name: statistics.median(counts) for name, counts in faults.items()},
    }
    for name, (time_ratio, flop_ratio) in ratios.items():
        result[name] = {
            "time_ratio": round(time_ratio, 4),
            "flop_ratio": round(flop_ratio, 4),
            "time_over_flops": round(time_ratio / flop_ratio, 4),
        }
        print(
            f"{name}: time {time_ratio:.3f}, operations {flop_ratio:.3f}, "
            f"time over operations {time_ratio / flop_ratio:.3f}"
        )
    time_ratio, flop_ratio = ratios["stage 1 / dense"]
    result["holds"] = time_ratio <= TIME_RATIO_BOUND and time_ratio / flop_ratio <= OVER_FLOPS_BOUND
    print(f"claims hold: {result['holds']}; seconds {result['seconds']}")
    print(f"page faults a step: {result['minor_faults']}")
    if not options.quick:
        save("sprint", result)


if __name__ == "__main__":
    main()
