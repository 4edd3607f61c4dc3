"""Does an adapted layer of transformers take its executed share of the dense layer's time?

A Llama layer of SmolLM2-135M's shape (D 576, 9 heads, 3 of keys, F 1536) and one of D 1024 (16
heads, F 2816), float32, sdpa, called as its model calls it: forward alone (evaluation, by the
predictor's threshold) and forward and backward (training, the k highest scores), for
Mixture-of-Depths, and for SkipLayer and an early exit whose gates are set to that share.
The claim: time ratio over executed-operation ratio at most 1.10, causal attention counted as half
of its square. Beside it the floor, by hand: the dense layer on as many tokens as rows of their own,
a layer norm and a product for a router of all tokens, the chosen rows taken out and put back. What
is above 1.10 of the share and at the floor cannot be less.

    python benchmarks/adapted.py [--quick] [--threads 1] [--rounds 7]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import interleave, median_ratio, medians, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adaptive import RoutingTape
from adaptive.flops import records_by_module
from adaptive.hub import adapt
from adaptive.hub.flops import count_rules
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.forced import force_choices

SHAPES = {
    "D576": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"intermediate_size": 1536},
    "D1024": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2816},
}
SHARES = (0.5, 0.25, 0.125)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture_of_depths": ("mixture_of_depths", {}),
    "skip_layer": ("skip_layer", {"skipped_gradient": "none"}),
    "skip_layer, all keys": ("skip_layer", {"skipped_gradient": "none", "keys": "all"}),
    "early_exit": ("early_exit", {"density": 0.5}),
}


class HalfSquare(FlopCounter):
    """Counts of causal attention what its kernel computes, half of what the ledger does."""

    def attention(self, heads: int, head_dim: int, work: Work) -> None:
        super().attention(heads, head_dim / 2, work)  # type: ignore[arg-type]


class Case:
    """One layer, dense or adapted to compute a share of its tokens, and how it is called."""

    def __init__(self, shape: dict[str, Any], method: str, share: float, rows: Tensor) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **shape))
        self.share, self.rows = share, rows
        if method in METHODS:
            name, options = METHODS[method]
            if name == "mixture_of_depths":
                options = {"capacity": share}
            adapt(self.model, name, layers=[0], **options)
        else:
            count_rules(self.model)
        self.layer: Any = self.model.model.layers[0]
        batch, length, _ = rows.shape
        positions = torch.arange(length)[None]
        self.given = {
            "position_ids": positions,
            "position_embeddings": self.model.model.rotary_emb(rows, positions),
            "attention_mask": None,
        }
        self.floor_width = round(share * length) if method == "floor" else 0
        self.router_2D = torch.randn(2, rows.shape[-1]) * 0.02
        # The same number of tokens in each row, anywhere.
        scores_BS = torch.rand(batch, length)
        kept = max(round(share * length), 1)
        self.choice_T = (scores_BS >= scores_BS.topk(kept).values[:, -1:]).flatten().long()
        self.forced = {}
        routing = getattr(self.layer, "routing", None)
        if method == "mixture_of_depths":
            with torch.no_grad():
                scores_T = routing.decides(rows.flatten(0, 1)).flatten()
                routing.threshold.fill_(scores_T.quantile(1 - share))
        elif method in METHODS:
            self.forced = {routing: self.choice_T}
        if self.floor_width:
            some = torch.arange(self.floor_width)[None]
            self.given["position_ids"] = some
            self.given["position_embeddings"] = self.model.model.rotary_emb(rows, some)

    def forward(self) -> Tensor:
        if self.floor_width:
            return self.floor(self.layer, self.floor_width)
        with force_choices(self.forced):
            return self.layer(self.rows, **self.given)

    def floor(self, layer: Any, width: int) -> Tensor:
        """What cannot be left out, with a dense layer on `width` tokens a row, whichever."""
        rows_TD = self.rows.flatten(0, 1)
        scores_T2 = F.linear(F.layer_norm(rows_TD, rows_TD.shape[-1:]), self.router_2D)
        index_R = scores_T2[:, 0].view(len(self.rows), -1).topk(width).indices.sort().values
        starts_B1 = torch.arange(len(self.rows))[:, None] * self.rows.shape[1]
        index_R = (index_R + starts_B1).flatten()
        taken_RD = rows_TD.index_select(0, index_R)
        out_BKD = layer(taken_RD.view(len(self.rows), width, -1), **self.given)
        return rows_TD.index_copy(0, index_R, out_BKD.flatten(0, 1))

    def infer(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.forward()

    def step(self) -> None:
        self.model.train()
        self.model.zero_grad()
        self.rows.grad = None
        self.forward().sum().backward()

    def operations(self, run: Callable[[], None]) -> float:
        """Executed by the records of a run; backward if it has one."""
        with RoutingTape(self.model) as tape:
            run()
        counter = HalfSquare(records_by_module(self.model, tape.records))
        counter(self.layer, Work.dense(*self.rows.shape[:2]))
        total = counter.total()
        return float(total.forward + total.backward * (run == self.step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, length, rounds = (2, 64, 3) if options.quick else (2, 1024, options.rounds)
    found: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        rows = torch.randn(batch, length, shape["hidden_size"], requires_grad=True)
        cases: dict[str, Case] = {"dense": Case(shape, "", 1.0, rows)}
        for method in METHODS:
            for share in SHARES:
                cases[f"{method} {share}"] = Case(shape, method, share, rows)
        floors = {f"floor {share}": Case(shape, "floor", share, rows) for share in SHARES}
        for kind in ("infer", "step"):
            runs = {name: getattr(case, kind) for name, case in (cases | floors).items()}
            counted = {name: cases[name].operations(runs[name]) for name in cases}
            seconds = interleave(runs, rounds=rounds)
            for name in cases:
                ratio = median_ratio(seconds, name, "dense")
                share = counted[name] / counted["dense"]
                row = {
                    "seconds": round(medians(seconds)[name], 5),
                    "time_ratio": round(ratio, 4),
                    "executed_share": round(share, 4),
                    "time_over_executed": round(ratio / share, 3),
                }
                if name != "dense" and "all keys" not in name:
                    floor = f"floor {name.split()[-1]}"
                    row["floor_over_executed"] = round(
                        median_ratio(seconds, floor, "dense") / share, 3
                    )
                    row["time_over_floor"] = round(median_ratio(seconds, name, floor), 3)
                found.setdefault(label, {}).setdefault(kind, {})[name] = row
                print(f"{label} {kind:6s} {name:28s} {row}", flush=True)
    sizes = {"batch": batch, "seq_len": length, "rounds": rounds}
    if not options.quick:
        save("adapted", {**sizes, "claim": "time_over_executed <= 1.10", **found})


if __name__ == "__main__":
    main()
