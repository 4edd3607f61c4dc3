"""What does the loss over a vocabulary cost, forward and backward, beside torch's own?

`adaptive.ops.cross_entropy` in blocks of rows, with a gradient of its own and with one that takes
the place of the logits, against `F.cross_entropy`; float32 logits, the first case of bytes, then
vocabularies of Llama 2, GPT-2 and Llama 3. Logits are copied before every call, in all cases
alike, in place of the product that makes them; "copy" is that alone, and the floor of the rest is
three more passes of its kind: read twice, written once.

Then the same over 2 gloo ranks of one thread that share the vocabulary, against Megatron's, which
writes its softmax over float32 logits.

    python benchmarks/cross_entropy.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    interleave,
    interleave_on_ranks,
    median_ratio,
    medians,
    peak_bytes,
    save,
)
from torch import Tensor

from adaptive.ops.cross_entropy import cross_entropy
from parallel.megatron import core
from parallel.mesh import Mesh
from parallel.ranks import on_ranks
from parallel.vocab_cross_entropy import vocab_cross_entropy

SIZES = [(16384, 256), (2048, 32000), (1024, 50257), (512, 128256)]


def of_torch(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV, targets_T, reduction="none")


def step(
    function: Callable[[Tensor, Tensor], Tensor] | None, source_TV: Tensor, targets_T: Tensor
) -> Callable[[], None]:
    weights_T = torch.rand(targets_T.shape)

    def run() -> None:
        leaf = source_TV.clone()
        if function is None:
            return
        leaf.requires_grad_()
        function(leaf.view_as(leaf), targets_T).backward(weights_T)

    return run


def split(sizes: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    """On each rank: its half of the vocabulary."""
    mesh = Mesh.create(tensor=2)
    torch.manual_seed(0)
    theirs = core("tensor_parallel.cross_entropy").vocab_parallel_cross_entropy
    found = {}
    for tokens, vocabulary in sizes:
        own = 3 * torch.randn(tokens, vocabulary // 2)
        targets_T = torch.randint(vocabulary // 2 * 2, (tokens,))
        ours = partial(vocab_cross_entropy, mesh=mesh)
        functions: dict[str, Callable[..., Tensor] | None] = {
            "copy": None,
            "Megatron": theirs,
            "in blocks": ours,
            "overwriting": partial(ours, overwrite=True),
        }
        cases = {name: step(function, own, targets_T) for name, function in functions.items()}
        seconds = interleave_on_ranks(cases, rounds)
        rows = {}
        for name, function in functions.items():
            rows[name] = {
                "milliseconds": round(1e3 * medians(seconds)[name], 2),
                "time_ratio": round(median_ratio(seconds, name, "Megatron"), 3),
            }
            for dtype in (torch.float32, torch.bfloat16):
                peak = peak_bytes(step(function, own.to(dtype), targets_T))
                held = own.numel() * dtype.itemsize
                rows[name][f"peak_over_{str(dtype)[6:]}_logits"] = round(peak / held, 2)
        found[f"T {tokens} V {vocabulary}"] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = {}
    for tokens, vocabulary in [(8, 100)] if options.quick else SIZES:
        logits_TV = 3 * torch.randn(tokens, vocabulary)
        targets_T = torch.randint(vocabulary, (tokens,))
        cases = {
            "copy": step(None, logits_TV, targets_T),
            "torch": step(of_torch, logits_TV, targets_T),
            "in blocks": step(cross_entropy, logits_TV, targets_T),
            "overwriting": step(partial(cross_entropy, overwrite=True), logits_TV, targets_T),
        }
        seconds = interleave(cases, rounds=3 if options.quick else 21)
        logits_bytes = logits_TV.numel() * 4
        rows = {}
        for name, run in cases.items():
            rows[name] = {
                "milliseconds": round(1e3 * medians(seconds)[name], 2),
                "time_ratio": round(median_ratio(seconds, name, "torch"), 3),
                "peak_over_logits": round(peak_bytes(run) / logits_bytes, 2),
            }
            print(f"T {tokens} V {vocabulary}  {name:12s}", rows[name], flush=True)
        results[f"T {tokens} V {vocabulary}"] = rows
    sizes, rounds = ([(8, 100)], 2) if options.quick else (SIZES, 15)
    shared = on_ranks(split, 2, sizes, rounds, timeout=900)
    for case, rows in shared.items():
        for name, row in rows.items():
            print(f"{case} over 2 ranks  {name:12s}", row, flush=True)
    if not options.quick:
        save("cross_entropy", {"dtype": "float32", "cases": results, "two ranks": shared})


if __name__ == "__main__":
    main()
