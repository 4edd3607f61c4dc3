"""What `train.compile` brings: a training step with compiled layers against the same step without.

    PYTHONPATH=. python benchmarks/compiled_step.py [--quick] [--only mod,dense] [--threads 2]

Forward, backward and AdamW of each family at one size (D 192, 6 layers, 8
rows of 256 tokens), of a DiT with SPRINT and a ViT that merges; eager and compiled steps in turn.
`ratio` is the median over rounds of compiled / eager, `processor_ratio` that of processor time, in
which other work on the machine does not count; `graphs` how many were compiled in all and
after the first step; `seconds_to_compile` the first compiled step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import interleave, median_ratio, medians, save
from step import decoders, flow_loss, language_loss
from torch import Tensor, nn

from adaptive import RoutingTape
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.token_merging import TokenMergingConfig
from adaptive.compiling import compile_layers, graphs
from adaptive.models import (
    Decoder,
    DecoderConfig,
    DiffusionConfig,
    DiffusionTransformer,
    VisionConfig,
    VisionTransformer,
)


def families() -> dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]]:
    """name -> (makes the model, its loss)."""
    base = DecoderConfig(dim=192, num_layers=6, num_heads=6, max_seq_len=256)
    device = torch.device("cpu")
    configs = decoders(base)
    configs["duo"] = base.with_method(SizedFeedForwardConfig())
    configs["acm"] = base.with_method(AdaptiveComputationConfig())
    found: dict[str, Any] = {
        name: (lambda config=config: Decoder(config), language_loss(config, 8, device))
        for name, config in configs.items()
    }
    images = DiffusionConfig(dim=192, num_heads=6, image_size=32, middle_depth=8)
    found["sprint"] = lambda: DiffusionTransformer(images), flow_loss(images, 8, device)
    vision = VisionConfig(dim=192, num_layers=6, num_heads=6, image_size=32, patch_size=2)
    vision = vision.with_method(TokenMergingConfig())
    x_BCHW = torch.randn(8, vision.channels, 32, 32)
    y_B = torch.randint(0, vision.num_classes, (8,))
    found["token_merging"] = (
        lambda: VisionTransformer(vision),
        lambda model: nn.functional.cross_entropy(model(x_BCHW), y_B),
    )
    return found


def stepping(model: nn.Module, loss_of: Callable[..., Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        torch.manual_seed(0)
        with RoutingTape(model) as tape:
            loss = loss_of(model)
        (loss + tape.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(make: Callable[[], nn.Module], loss_of: Callable[..., Tensor], rounds: int) -> Any:
    steps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = make()
        if compiled:
            compile_layers(model)
        steps.append(stepping(model, loss_of))
    before, begun = graphs(), time.perf_counter()
    losses = [[steps[1]()]]
    seconds_to_compile, first = time.perf_counter() - begun, graphs() - before
    losses[0] += [steps[1]() for _ in range(2)]
    losses.append([steps[0]() for _ in range(3)])
    processor: dict[str, list[float]] = {"eager": [], "compiled": []}

    def timed(name: str, step: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            spent = time.process_time()
            step()
            processor[name].append(time.process_time() - spent)

        return call

    cases = {name: timed(name, step) for name, step in zip(processor, steps, strict=True)}
    seconds = interleave(cases, rounds=rounds, warmup=1)
    ratios = [a / b for a, b in zip(seconds["compiled"], seconds["eager"], strict=True)]
    return {
        "seconds": medians(seconds),
        "ratio": median_ratio(seconds, "compiled", "eager"),
        "processor_ratio": median_ratio(processor, "compiled", "eager"),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "graphs": [graphs() - before, graphs() - before - first],
        "seconds_to_compile": seconds_to_compile,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is saved")
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only, results = set(filter(None, options.only.split(","))), {}
    for name, (make, loss_of) in families().items():
        if only and name not in only:
            continue
        found = results[name] = measure(make, loss_of, 3 if options.quick else 15)
        eager, taken = found["seconds"]["eager"] * 1e3, found["seconds_to_compile"]
        print(
            f"{name:14} {found['ratio']:.3f} ({found['processor_ratio']:.3f} of processor time) "
            f"of eager's {eager:.0f} ms, graphs {found['graphs']}, {taken:.0f} s to compile, "
            f"losses within {found['loss_difference']:.1e}",
            flush=True,
        )
    if not options.quick and not only:
        save("compiled_step", {"families": results})


if __name__ == "__main__":
    main()
