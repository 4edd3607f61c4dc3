"""Ring attention of few long sequences: rows that stay with their ranks, rows moved for the mask.

    python benchmarks/ring_order.py [--quick]

An attention layer, forward and backward, over 2 gloo ranks of one thread each. "stay" is what rows
do where nothing is saved, and did everywhere before `parallel.ring.order`; Ulysses, which needs
heads that divide, is beside. Also the time to find out who attends for what, once a forward.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from adaptive.models.decoder.layers import Attention
from adaptive.routing.layout import TokenLayout
from benchmarks.measure import interleave_on_ranks, median_ratio, medians, save
from parallel.checks.traffic import Traffic
from parallel.mesh import Mesh
from parallel.ranks import on_ranks
from parallel.ring import order as ring_order
from parallel.rows import even_shards

RANKS = 2
HEADS, HEAD_DIM = 8, 32
SIZES = [(1, 1024), (1, 2048), (1, 4096), (1, 8192)]


def measure(sequences: int, length: int, rounds: int) -> dict[str, Any]:
    """On each rank."""
    dim, tokens = HEADS * HEAD_DIM, sequences * length
    sizes = even_shards(tokens, RANKS)
    calls, sent, found = {}, {}, {}
    for name, pairs, scheme in (
        ("stay", math.inf, "ring"),
        ("move", 1, "ring"),
        ("Ulysses", 0, "ulysses"),
    ):
        mesh = Mesh.create(context=RANKS, context_attention=scheme)
        torch.manual_seed(0)
        layer = Attention(dim, HEADS, mesh=mesh)
        hidden = torch.randn(sizes[mesh.context_rank], dim, requires_grad=True)
        layout = replace(TokenLayout.dense(sequences, length), shard_sizes=sizes)
        ring_order.SAVED_PAIRS = pairs
        if mesh.ring:
            start = time.perf_counter()
            layout.ring(mesh)
            found[name] = time.perf_counter() - start

        def call(layer: Any = layer, hidden: Any = hidden, layout: Any = layout) -> None:
            layer(hidden, layout=layout).square().sum().backward()

        with Traffic() as traffic:
            call()
        total = torch.tensor(float(traffic.sent))
        dist.all_reduce(total)
        calls[name], sent[name] = call, float(total) / RANKS
    seconds = interleave_on_ranks(calls, rounds)
    return {
        name: {
            "milliseconds": round(1e3 * medians(seconds)[name], 1),
            "time_ratio": round(median_ratio(seconds, name, "stay"), 3),
            "megabytes_sent": round(sent[name] / 1e6, 3),
            **({"milliseconds_to_find": round(1e3 * found[name], 1)} if name in found else {}),
        }
        for name in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    quick = parser.parse_args().quick
    results = {}
    for sequences, length in [(1, 64)] if quick else SIZES:
        rows = on_ranks(
            measure,
            RANKS,
            sequences,
            length,
            2 if quick else 15 if length < 8192 else 7,
            timeout=600,
        )
        results[f"{sequences} x {length}"] = rows
        for name, row in rows.items():
            print(f"{sequences} x {length:<6} {name:8}", row, flush=True)
    if not quick:
        save("ring_order", {"ranks": RANKS, "heads": HEADS, "head_dim": HEAD_DIM, "cases": results})


if __name__ == "__main__":
    main()
