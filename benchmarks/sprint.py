"""Do dropped middle tokens become saved time? A SPRINT step against the dense step.

Forward and backward of a diffusion transformer (D 384, 6 heads, 256 tokens, depth 2/8/2, B 8,
float32, 2 threads): stage 1 keeps a quarter of the tokens in the middle, stage 2 all of them. The
claims: time ratio at most 0.48, and at most 1.05 times the ratio of executed operations. Also one
guided evaluation (forward): path-drop against classifier-free.

    python benchmarks/sprint.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import interleave, median_ratio, medians, save

from adaptive.flops import planned_flops
from adaptive.models import DiffusionConfig, DiffusionTransformer

TIME_RATIO_BOUND, OVER_FLOPS_BOUND = 0.48, 1.05


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

    def step(keep: float) -> Callable[[], None]:
        def run() -> None:
            model.train()
            model.trunk.keep = keep
            model.zero_grad()
            model(x, t, y).square().sum().backward()

        return run

    def guided(guidance: str) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model.eval().guided(x, t, y, scale=2.0, guidance=guidance)

        return run

    # Each pair on its own: an evaluation between two steps moves what the allocator hands out.
    steps = {"dense": step(1.0), "stage 1": step(0.25)}
    evaluations = {name: guided(name) for name in ("classifier_free", "path_drop")}
    operations = {}
    for name, keep in (("dense", 1.0), ("stage 1", 0.25)):
        model.train().trunk.keep = keep
        operations[name] = planned_flops(model, batch, config.tokens, backward=True)
    for guidance in evaluations:
        operations[guidance] = model.guided_flops(batch, guidance=guidance)
    seconds = interleave(steps, rounds=rounds) | interleave(evaluations, rounds=rounds)
    result: dict[str, object] = {
        "shape": f"D {config.dim}, {config.num_heads} heads, {config.tokens} tokens, B {batch}, "
        f"depth {config.encoder_depth}/{config.middle_depth}/{config.decoder_depth}",
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in medians(seconds).items()},
        "operations": operations,
    }
    for case, baseline in (("stage 1", "dense"), ("path_drop", "classifier_free")):
        time_ratio = median_ratio(seconds, case, baseline)
        flop_ratio = operations[case] / operations[baseline]
        result[f"{case} / {baseline}"] = {
            "time_ratio": round(time_ratio, 4),
            "flop_ratio": round(flop_ratio, 4),
            "time_over_flops": round(time_ratio / flop_ratio, 4),
        }
        print(
            f"{case} / {baseline}: time {time_ratio:.3f}, operations {flop_ratio:.3f}, "
            f"time over operations {time_ratio / flop_ratio:.3f}"
        )
    stage = result["stage 1 / dense"]
    assert isinstance(stage, dict)
    result["holds"] = (
        stage["time_ratio"] <= TIME_RATIO_BOUND and stage["time_over_flops"] <= OVER_FLOPS_BOUND
    )
    print(f"claims hold: {result['holds']}; seconds {result['seconds']}")
    if not options.quick:
        save("sprint", result)


if __name__ == "__main__":
    main()
