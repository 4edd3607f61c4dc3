"""Depth methods on two ranks whose routers choose differently, under DeepSpeed's ZeRO 0 to 3."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive import BatchScope, RoutingTape, start_step
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayer, SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.routing.gumbel import GumbelSchedule
from tests.ranks import run_ranks

STEPS = 3


QUIET = GumbelSchedule(noise=0.0)
SKIP = SkipLayerConfig(schedule=QUIET, controller_gain=0.05, density_over="layer")
SIZED = SizedFeedForwardConfig(schedule=QUIET, controller_gain=0.05)
LEARNERS = AdaptiveComputationConfig(num_learners=2, schedule=QUIET, controller_gain=0.05)
FAMILIES: dict[str, dict[str, Any]] = {
    "skip_layer": {"skip_layer": SKIP},
    "sized_feed_forward": {"sized_feed_forward": SIZED},
    "adaptive_computation": {"adaptive_computation": LEARNERS},
}


def model_for(family: str, recompute: bool) -> Decoder:
    """Where layers are skipped, layer 0 executes the tokens above 127 and no other."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24}
    model = Decoder(DecoderConfig(**sizes, recompute=recompute, **FAMILIES[family]))
    first = model.layers[0]
    if isinstance(first, SkipLayer):
        with torch.no_grad():
            model.embedding.weight[:128, 0] = -1.0
            model.embedding.weight[128:, 0] = 1.0
            first.router.weight.zero_()
            first.router.weight[1, 0] = 5.0
    return model


def ids_of(rank: int, step: int) -> Tensor:
    """Rank 0 has low tokens only, rank 1 high ones: 0 and all of them execute in layer 0."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(128, (2, 9), generator=generator) + 128 * rank


def loss_of(model: nn.Module, ids_BS: Tensor, scope: BatchScope) -> tuple[Tensor, RoutingTape]:
    with RoutingTape(scope=scope) as tape:
        per_token = model(ids_BS[:, :-1], ids_BS[:, 1:])
    task = scope.share_of(per_token.sum(), per_token.numel()) * scope.replicas
    return task + tape.loss(), tape


class Losses(nn.Module):
    """Gives engines a forward that returns losses."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return self.model.token_losses(ids_BS, targets_BS)


def train(family: str, stage: int, recompute: bool) -> tuple[list[float], list[int], list[float]]:
    """Loss share of every step, tokens executed in layer 0, and the controller's last prices."""
    import deepspeed
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_for(family, recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(
        model=Losses(model),
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 2**31,
            # DeepSpeed's default clips at 1.
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )
    losses, executed = [], []
    for step in range(STEPS):
        start_step(model, step)
        scope = BatchScope(tokens=2 * 8 * world, replicas=world, group=dist.group.WORLD)
        loss, tape = loss_of(engine, ids_of(rank, step), scope)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item() / world)
        executed.append(int(tape.records[0].executed))
    return losses, executed, prices(model)


def prices(model: Decoder) -> list[float]:
    return [m.price.item() for name, m in model.named_modules() if name.endswith("controller")]


def train_alone(family: str) -> tuple[list[float], list[float]]:
    """The same steps on one rank with the whole batch, in plain torch."""
    model = model_for(family, recompute=False)
    objective = Losses(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        start_step(model, step)
        ids = torch.cat([ids_of(0, step), ids_of(1, step)])
        loss, _ = loss_of(objective, ids, BatchScope())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, prices(model)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_ranks_that_choose_differently_train_as_one(stage: int, recompute: bool) -> None:
    results = check_trains_as_one("skip_layer", stage, recompute)
    assert results[0][1][0] == 0
    assert results[1][1][0] == 16


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("family", ["sized_feed_forward", "adaptive_computation"])
def test_units_without_tokens_on_a_rank_train_as_one(family: str, stage: int) -> None:
    check_trains_as_one(family, stage, recompute=True)


def check_trains_as_one(family: str, stage: int, recompute: bool) -> list[Any]:
    results = run_ranks(train, 2, family, stage, recompute, timeout=120)
    losses, held = train_alone(family)
    together = [sum(shares) for shares in zip(*(r[0] for r in results), strict=True)]
    # float32 through three steps of Adam, summed in another order.
    assert together == pytest.approx(losses, rel=2e-5)
    assert results[0][2] == results[1][2]
    assert results[0][2] == pytest.approx(held, rel=1e-6)
    assert any(price != 0 for price in held)
    return results
