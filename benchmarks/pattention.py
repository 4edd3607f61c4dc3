"""What does Pattention cost beside the two linear layers with the same products?

Forward and backward (gradients of the input and of both weights) of Pattention against a pair of
nn.Linear with the same FLOPs: width 512, n = 512 and 2,048 parameter tokens, 2,048 tokens,
float32, 2 threads. The claims: at most 1.08x the pair's time; in the memory-saving mode at most
1.1x the pair's peak memory at n = 2,048. "our pair" is the pair by this library's linear layers,
whose products, as Pattention's, may run through another library (parallel/linear.py).

    python benchmarks/pattention.py [--quick]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleave, median_ratio, medians, peak_bytes, save
from torch import Tensor, nn

from adaptive import Pattention
from parallel.flop_formulas import torch_flop_counter
from parallel.linear import linear

TIME_LIMIT, MEMORY_LIMIT = 1.08, 1.10


def eager(layer: Pattention, x_TD: Tensor) -> Tensor:
    """The formula in plain torch, for comparison."""
    scores_TN = x_TD @ layer.key_tokens.T
    norm_T1 = scores_TN.norm(dim=-1, keepdim=True)
    return F.gelu(scores_TN * (math.sqrt(layer.num_tokens) / norm_T1)) @ layer.value_tokens


def through_pair(x_TD: Tensor, up_ND: Tensor, down_DN: Tensor) -> Tensor:
    return linear(linear(x_TD, up_ND), down_DN)


def step(
    function: Callable[[Tensor], Tensor], x_TD: Tensor, weights: list[nn.Parameter]
) -> Callable[[], None]:
    grad_TD = torch.randn_like(x_TD)

    def run() -> None:
        for leaf in (x_TD, *weights):
            leaf.grad = None
        function(x_TD).backward(grad_TD)

    return run


def flops(run: Callable[[], None]) -> int:
    with torch_flop_counter(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    width, tokens, sizes, rounds = 512, 2048, (512, 2048), 41
    if options.quick:
        width, tokens, sizes, rounds = 64, 256, (64, 256), 3
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, width, requires_grad=True)
    results = {}
    for count in sizes:
        up = nn.Linear(width, count, bias=False)
        down = nn.Linear(count, width, bias=False)
        layer = Pattention(width, width, count)
        saving = Pattention(width, width, count, save_memory=True)
        saving.load_state_dict(layer.state_dict())
        pair_weights, own = [up.weight, down.weight], [layer.key_tokens, layer.value_tokens]
        cases = {
            "pair": step(lambda x, up=up, down=down: down(up(x)), x_TD, pair_weights),
            "pattention": step(layer, x_TD, own),
            "save_memory": step(saving, x_TD, [saving.key_tokens, saving.value_tokens]),
            "eager": step(lambda x, layer=layer: eager(layer, x), x_TD, own),
        }
        cases["our pair"] = step(
            lambda x, pair=pair_weights: through_pair(x, *pair), x_TD, pair_weights
        )
        seconds = interleave(cases, rounds=rounds)
        memory = {name: peak_bytes(run) for name, run in cases.items()}
        counted = {name: flops(run) for name, run in cases.items()}
        rows = {}
        for name in cases:
            rows[name] = {
                "milliseconds": round(1e3 * medians(seconds)[name], 2),
                "time_ratio": round(median_ratio(seconds, name, "pair"), 4),
                "fastest_ratio": round(min(seconds[name]) / min(seconds["pair"]), 4),
                "peak_mib": round(memory[name] / 2**20, 1),
                "memory_ratio": round(memory[name] / memory["pair"], 4),
                "flop_ratio": round(counted[name] / counted["pair"], 4),
            }
            print(f"n {count:5d}  {name:20s}", *(f"{k} {v}" for k, v in rows[name].items()))
        results[f"n {count}"] = rows
    if options.quick:
        return
    largest = results[f"n {sizes[-1]}"]
    met = {
        "time": all(rows["pattention"]["time_ratio"] <= TIME_LIMIT for rows in results.values()),
        "memory": largest["save_memory"]["memory_ratio"] <= MEMORY_LIMIT,
    }
    print(f"time at most {TIME_LIMIT}x: {met['time']}; memory at most {MEMORY_LIMIT}x: ", end="")
    print(met["memory"])
    save("pattention", {"width": width, "tokens": tokens, "cases": results, "met": met})


if __name__ == "__main__":
    main()
