"""Learned budgets against fixed ones: held-out loss of a ViT at 0.65 of the operations.

scikit-learn's digits, 30 % held out, tokens of 2x2 pixels; every arm is trained from the beginning
with its method, by AdamW, and evaluated as it then is. Fixed amounts are the nearest that cost no
less than the target. Quality, not speed: what else the machine does changes nothing.

    python benchmarks/learned_budget.py [--quick] [--steps 400] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import time
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from measure import save
from torch import Tensor

from adaptive import RoutingTape, TokenMergingConfig, start_step
from adaptive.blocks.learned_budget import LearnedBudgetConfig
from adaptive.blocks.protocol import Method
from adaptive.flops import executed_flops, nominal_flops
from adaptive.models import VisionConfig, VisionTransformer
from launch.run.optimizer import parameter_groups, rate_of
from launch.run.sections import TrainConfig

TARGET, BATCH, RATE = 0.65, 64, 1e-3
MODEL = VisionConfig(
    image_size=8, channels=1, patch_size=2, num_classes=10, dim=64, num_layers=6, num_heads=4
)
# 0.17 of what reaches a layer: 2, then 1 of the 17 tokens.
ARMS: dict[str, Method | None] = {
    "dense": None,
    "ltmp": LearnedBudgetConfig(kind="ltmp", target=TARGET),
    "diffrate": LearnedBudgetConfig(kind="diffrate", target=TARGET),
    "ltmp, no controller": LearnedBudgetConfig(kind="ltmp", target=TARGET, controller_gain=0.0),
    "fixed bsm": TokenMergingConfig(kind="bsm", amount=0.17),
    "fixed random": TokenMergingConfig(kind="random", amount=0.17),
}


def digits() -> tuple[Tensor, Tensor]:
    """All images [N, 1, 8, 8] in -1 … 1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, a smoke test")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    steps, seeds = (4, [0]) if options.quick else (options.steps, options.seeds)
    torch.set_num_threads(1)
    x_NCHW, y_N = digits()
    order = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(0))
    held, trained = order.split([len(order) * 3 // 10, len(order) - len(order) * 3 // 10])
    begun, rows = time.perf_counter(), {}
    for seed in seeds:
        for name, method in ARMS.items():
            model = train(method, x_NCHW[trained], y_N[trained], steps=steps, seed=seed)
            found = evaluate(model, x_NCHW[held], y_N[held])
            rows.setdefault(name, []).append(found)
            spent = time.perf_counter() - begun
            print(f"seed {seed}  {name:20s} {found}  {spent:.0f} s", flush=True)
    table = {name: summary(found) for name, found in rows.items()}
    for name, found in table.items():
        print(f"{name:20s} {found}")
    if not options.quick:
        save("learned_budget", {"steps": steps, "target": TARGET, "arms": table, "runs": rows})


def train(
    method: Method | None, x_NCHW: Tensor, y_N: Tensor, *, steps: int, seed: int
) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(MODEL if method is None else MODEL.with_method(method))
    settings = TrainConfig(steps=steps, weight_decay=0.05)
    groups: list[dict[str, Any]] = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups)
    for step in range(steps):
        start_step(model, step)
        shape = min(1.0, (step + 1) / 30) * (1 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = RATE * shape * rate_of(group["params"][0])
        rows = torch.randint(len(y_N), (BATCH,))
        with RoutingTape(model) as tape:
            loss = F.cross_entropy(model(x_NCHW[rows]), y_N[rows]) + tape.loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: VisionTransformer, x_NCHW: Tensor, y_N: Tensor) -> dict[str, float]:
    """Loss, accuracy, and the executed share of all operations."""
    with RoutingTape(model) as tape:
        logits = model(x_NCHW)
    shape = len(y_N), MODEL.tokens
    share = float(executed_flops(model, tape.records, *shape)) / nominal_flops(model, *shape)
    return {
        "loss": round(float(F.cross_entropy(logits, y_N)), 4),
        "accuracy": round(float((logits.argmax(-1) == y_N).float().mean()), 4),
        "share": round(share, 4),
    }


def summary(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and standard deviation over seeds."""
    values = {key: [row[key] for row in found] for key in found[0]}
    return {
        key: [round(mean(v), 4), round(stdev(v), 4) if len(v) > 1 else 0.0]
        for key, v in values.items()
    }


if __name__ == "__main__":
    main()
