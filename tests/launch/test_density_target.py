"""On the default data, a decoder's skip layers reach their target density."""

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive import RoutingTape, start_step
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.routing.gumbel import GumbelSchedule
from launch.data.text import Corpus, TextConfig

STEPS, ROWS, SPAN = 200, 8, 64


def density(tape: RoutingTape) -> float:
    return sum(r.executed / r.tokens for r in tape.records) / len(tape.records)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.25, 0.5])
def test_density_is_within_two_hundredths_of_its_target(target: float) -> None:
    """As recipes/skip_lm.yaml does it, smaller: in training and, without noise, in evaluation."""
    torch.manual_seed(0)
    corpus = Corpus(TextConfig(seq_len=SPAN, validation_rows=64))
    skip = SkipLayerConfig(
        density=target,
        layers=[1, 2, 3],
        density_coefficient=0.5,
        controller_gain=0.01,
        schedule=GumbelSchedule(final_noise=0.0, steps=STEPS // 2),
    )
    model = Decoder(DecoderConfig(dim=48, num_layers=4, num_heads=4, skip_layer=skip))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))

    def ids_of(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(rows))

    seen = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 20, 1.0) * (1 - 0.9 * step / STEPS)
        start_step(model, step)
        ids = ids_of([corpus.train_row(0, step * ROWS + row) for row in range(ROWS)])
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        (loss + tape.loss()).backward()
        optimizer.step()
        seen.append(density(tape))
    assert sum(seen[-50:]) / 50 == pytest.approx(target, abs=0.02)
    ids = ids_of([corpus.validation_row(row) for row in range(corpus.validation_rows)])
    with torch.no_grad(), RoutingTape(model.eval()) as tape:
        model(ids[:, :-1])
    # The last steps still move the routers a little.
    assert density(tape) == pytest.approx(target, abs=0.05)
