"""Does a skipped layer become saved time, in training, when sequences execute unevenly?

Forward and backward of a decoder layer (d 512, S 512, B 8, float32) inside SkipLayer at densities
0.25, 0.5, 0.75, against the layer alone. Sequences have different densities, from all of their
tokens to none at 0.5; executing tokens attend to all. The executed-FLOP ratio counts the keys and
values of all tokens, the router, and every query-key pair of the dense layer's square. The claim:
wall-clock ratio over executed-FLOP ratio is at most 1.2, on 1 thread and 2.

    python benchmarks/skip_layer.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import interleave, median_ratio, medians, save
from torch import Tensor, nn

from adaptive import RoutingTape, SkipLayer, TokenLayout
from adaptive.flops import executed_flops, nominal_flops
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU

DENSITIES = (0.25, 0.5, 0.75)
VARIANTS = ("masked", "none", "exact")


def uneven(density: float, batch: int, seq_len: int) -> Tensor:
    """bool [B*S]: executing tokens; a sequence's share goes linearly around `density`."""
    spread = min(density, 1 - density)
    shares = torch.linspace(density - spread, density + spread, batch)
    return (torch.rand(batch, seq_len) < shares[:, None]).flatten()


def decide_by_first_channel(layer: SkipLayer) -> None:
    """Make the router execute a token exactly where its first channel is high."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 4.0
    layer.noise = 0.0


def step(module: nn.Module, hidden_TD: Tensor, layout: TokenLayout) -> Callable[[], None]:
    """One forward and backward, gradients of input and parameters."""

    def run() -> None:
        module.zero_grad()
        hidden_TD.grad = None
        module(hidden_TD, layout=layout).sum().backward()

    return run


def forward(module: nn.Module, hidden_TD: Tensor, layout: TokenLayout) -> Callable[[], None]:
    """One forward without gradients, as in evaluation."""

    @torch.no_grad()
    def run() -> None:
        module(hidden_TD, layout=layout)

    return run


def flop_ratio(
    model: nn.Module, tape: RoutingTape, batch: int, seq_len: int, *, backward: bool
) -> float:
    """Executed over nominal operations. The extra forward of "exact" is no part of them."""
    executed = executed_flops(model, tape.records, batch, seq_len, backward=backward)
    return float(executed) / nominal_flops(model, batch, seq_len, backward=backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    dim, seq_len, batch, rounds = (64, 64, 4, 3) if arguments.quick else (512, 512, 8, 11)
    torch.manual_seed(0)
    ffn_dim = -(-dim * 8 // (3 * 64)) * 64
    block = DecoderLayer(RMSNorm(dim), Attention(dim, 8), RMSNorm(dim), SwiGLU(dim, ffn_dim))
    layout = TokenLayout.dense(batch, seq_len)
    cases, flop_ratios = {}, {}
    for density in DENSITIES:
        executes = uneven(density, batch, seq_len)
        hidden = torch.randn(batch * seq_len, dim)
        hidden[:, 0] = torch.where(executes, 3.0, -3.0)
        hidden.requires_grad_()
        cases.setdefault("dense", step(block, hidden, layout))
        cases.setdefault("dense forward", forward(block, hidden, layout))
        for variant in VARIANTS if density == 0.5 else VARIANTS[:1]:
            layer = SkipLayer(block, dim, density=density, skipped_gradient=variant)
            decide_by_first_channel(layer)
            model = nn.Sequential(layer)
            with RoutingTape(model) as tape:
                layer(hidden, layout=layout)
            assert tape.records[0].executed == int(executes.sum())
            name = f"density {density} {variant}"
            cases[name] = step(layer, hidden, layout)
            flop_ratios[name] = flop_ratio(model, tape, batch, seq_len, backward=True)
            if variant == "masked":
                name = f"density {density} forward"
                cases[name] = forward(layer, hidden, layout)
                flop_ratios[name] = flop_ratio(model, tape, batch, seq_len, backward=False)
    results = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds = interleave(cases, rounds=rounds)
        middle = medians(seconds)
        rows = {name: {"seconds": round(middle[name], 5)} for name in ("dense", "dense forward")}
        for name, flops in flop_ratios.items():
            baseline = "dense forward" if name.endswith("forward") else "dense"
            time_ratio = median_ratio(seconds, name, baseline)
            rows[name] = {
                "seconds": round(middle[name], 5),
                "time_ratio": round(time_ratio, 4),
                "flop_ratio": round(flops, 4),
                "time_over_flops": round(time_ratio / flops, 4),
            }
            print(f"{threads} thread(s)  {name:20s} {rows[name]}")
        results[str(threads)] = rows
    sizes = {"dim": dim, "seq_len": seq_len, "batch": batch, "rounds": rounds}
    if not arguments.quick:
        claim = "time_over_flops <= 1.2 where skipped_gradient is masked (the default) or none"
        save("skip_layer", {**sizes, "claim": claim, **results})


if __name__ == "__main__":
    main()
