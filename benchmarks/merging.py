"""Does a layer that is given merged tokens take its executed share of the dense layer's time?

A layer of a vision transformer (D 384, 6 heads, F 1536, float32) at S 1,024. Dense: all tokens.
Merged: the tokens are matched by the keys of the layer before and merged, once to 0.5 and twice to
0.25, and the layer computes what is left, with attention by size. The time of matching and merging
is in. Forward alone (evaluation), and forward and backward of input and parameters. Executed
operations are the layer's over what is left and those of comparing keys.

    python benchmarks/merging.py [--quick] [--only bsm,random] [--threads 1 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import interleave, median_ratio, medians, save
from torch import Tensor, nn

from adaptive import TokenLayout
from adaptive.blocks.token_merging import Heads, TokenMerging
from adaptive.flops import FlopCounter, Work
from adaptive.models.vision.layers import VisionLayer
from adaptive.ops.merge import merge

KINDS = ("bsm", "random", "adjacent", "pitome", "mctf")
SHARES = {"0.5": 1, "0.25": 2}  # halvings


class Merged(nn.Module):
    """A layer behind `times` halvings of its tokens, none of them the layer's own."""

    def __init__(self, layer: VisionLayer, kind: Any, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times
        self.merging = TokenMerging(layer, kind=kind, amount=0.5)

    def forward(self, x_TD: Tensor, before: list[Heads], layout: TokenLayout) -> Tensor:
        sizes = None
        for heads in before[: self.times]:
            grouping = self.merging.match(heads, layout, sizes)
            x_TD = merge(x_TD, sizes, grouping)
            layout, sizes = grouping.layout, grouping.sizes
        assert sizes is not None
        return self.layer(x_TD, layout=layout, key_bias=sizes.log())

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        for _ in range(self.times):
            self.merging.count_matching(count, work)
            work = work.share(0.5)
        count(self.layer, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, by commas")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    batch, length, dim, rounds = (2, 64, 48, 3) if options.quick else (2, 1024, 384, options.rounds)
    torch.manual_seed(0)
    layer, layout = VisionLayer(dim, 6, ffn_dim=4 * dim), TokenLayout.dense(batch, length)
    x_TD = torch.randn(layout.tokens, dim, requires_grad=True)
    drawn = [torch.randn(2, layout.tokens >> i, 6, dim // 6) for i in range(2)]
    before = [Heads(queries, keys, keys) for queries, keys in drawn]

    def run(forward: Callable[[], Tensor], backward: bool) -> Callable[[], None]:
        def both() -> None:
            x_TD.grad = None
            layer.zero_grad()
            with torch.set_grad_enabled(backward):
                out_GD = forward()
            if backward:
                out_GD.sum().backward()

        return both

    work = Work.dense(batch, length)
    models: dict[str, nn.Module] = {"dense": layer}
    forwards: dict[str, Callable[[], Tensor]] = {"dense": lambda: layer(x_TD, layout=layout)}
    for kind in options.only.split(","):
        for share, times in SHARES.items():
            model = models[f"{kind} {share}"] = Merged(layer, kind, times)
            forwards[f"{kind} {share}"] = partial(model, x_TD, before, layout)
    begun, found = time.perf_counter(), {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, backward in (("forward", False), ("forward and backward", True)):
            cases = {case: run(forward, backward) for case, forward in forwards.items()}
            seconds = interleave(cases, rounds=rounds)
            counted = {case: operations(model, work, backward) for case, model in models.items()}
            for case in cases:
                ratio = median_ratio(seconds, case, "dense")
                share = counted[case] / counted["dense"]
                row = {
                    "seconds": round(medians(seconds)[case], 5),
                    "time_ratio": round(ratio, 4),
                    "executed_share": round(share, 4),
                    "time_over_executed": round(ratio / share, 3),
                }
                found.setdefault(f"{threads} threads", {}).setdefault(name, {})[case] = row
                print(f"{threads} threads  {name:20s} {case:13s} {row}", flush=True)
    print(f"{time.perf_counter() - begun:.0f} s")
    if not options.quick:
        sizes = {"batch": batch, "seq_len": length, "dim": dim, "rounds": rounds}
        save("merging", {**sizes, "goal": "time_over_executed <= 1.15", **found})


def operations(model: nn.Module, work: Work, backward: bool) -> float:
    """Of a forward, and of its backward if asked."""
    counter = FlopCounter()
    counter(model, work)
    total = counter.total()
    return float(total.forward + total.backward * backward)


if __name__ == "__main__":
    main()
