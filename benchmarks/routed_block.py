"""Does skipped compute become saved time? A routed block against the dense one.

Forward and backward of a decoder layer (d 512, S 512, B 4, float32) inside Mixture-of-Depths at
capacities 1, 0.5, 0.25, 0.125, against the layer alone. The claim: wall-clock ratio divided by
executed-FLOP ratio is at most 1.15 at every capacity, on 1 thread and 2.

    python benchmarks/routed_block.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import interleave, median_ratio, medians, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive import MixtureOfDepths, TokenLayout
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from parallel.flop_formulas import torch_flop_counter

CAPACITIES = (1.0, 0.5, 0.25, 0.125)


def step(module: nn.Module, hidden_TD: torch.Tensor, layout: TokenLayout) -> Callable[[], None]:
    """One forward and backward, gradients of input and parameters."""

    def run() -> None:
        module.zero_grad()
        hidden_TD.grad = None
        module(hidden_TD, layout=layout).sum().backward()

    return run


def flops(run: Callable[[], None]) -> int:
    # torch counts no operations of its CPU flash attention; this backend's products it does.
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    quick = parser.parse_args().quick
    dim, seq_len, batch, rounds = (64, 64, 2, 3) if quick else (512, 512, 4, 15)
    torch.manual_seed(0)
    ffn_dim = -(-dim * 8 // (3 * 64)) * 64
    layer = DecoderLayer(RMSNorm(dim), Attention(dim, 8), RMSNorm(dim), SwiGLU(dim, ffn_dim))
    layout = TokenLayout.dense(batch, seq_len)
    hidden = torch.randn(batch * seq_len, dim, requires_grad=True)
    cases = {"dense": step(layer, hidden, layout)}
    for capacity in CAPACITIES:
        routed = MixtureOfDepths(layer, dim, capacity=capacity)
        cases[f"capacity {capacity}"] = step(routed, hidden, layout)
    counted = {name: flops(run) for name, run in cases.items()}
    threads_results = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = interleave(cases, rounds=rounds)
        rows = {}
        for name in cases:
            time_ratio = median_ratio(seconds, name, "dense")
            flop_ratio = counted[name] / counted["dense"]
            rows[name] = {
                "seconds": round(medians(seconds)[name], 5),
                "time_ratio": round(time_ratio, 4),
                "flop_ratio": round(flop_ratio, 4),
                "time_over_flops": round(time_ratio / flop_ratio, 4),
            }
            print(f"{threads} thread(s)  {name:16s} {rows[name]}")
        threads_results[str(threads)] = rows
    sizes = {"dim": dim, "seq_len": seq_len, "batch": batch, "rounds": rounds}
    if not quick:
        save("routed_block", {**sizes, "claim": "time_over_flops <= 1.15", **threads_results})


if __name__ == "__main__":
    main()
