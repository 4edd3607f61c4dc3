"""Densities and controllers of skip layers, and decoders made of them."""

import pytest
import torch
from torch import Tensor, nn

from adaptive import BatchScope, RoutingTape
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.cache import Cache
from adaptive.routing.summary import RoutingWindow
from tests.adaptive.blocks.skip_layers import (
    D,
    hidden_for,
    skipping,
)


def test_density_loss_is_the_papers_and_moves_the_density() -> None:
    layer = skipping(density=0.25)
    hidden = torch.randn(4, 30, D, dtype=torch.float64)
    with RoutingTape() as tape:
        layer(hidden)
    density = tape.records[0].executed / 120
    assert tape.loss().item() == pytest.approx(0.1 * (density - 0.25) ** 2)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=5.0)
    for _ in range(60):
        with RoutingTape() as tape:
            layer(hidden)
        optimizer.zero_grad()
        tape.loss().backward()
        optimizer.step()
    assert abs(tape.records[0].executed / 120 - 0.25) < 0.1


def test_recorded_weights_are_those_of_executing_tokens_over_all_batches() -> None:
    """The window counts a record by its executing tokens, so the mean must be over these."""
    torch.manual_seed(0)
    layer = skipping().eval()
    window, executing = RoutingWindow(), []
    for tokens in (5, 40, 3):
        hidden = torch.randn(2, tokens, D, dtype=torch.float64)
        with RoutingTape() as tape:
            layer(hidden)
        (record,) = tape.records
        assert record.weights is not None
        assert record.chosen is not None
        assert 0 < record.executed < record.tokens
        executing.append(record.weights[record.chosen].float())
        window.add(tape.records)
    (summary,) = window.reduce()[0].values()
    weights = torch.cat(executing)
    assert summary["weight_mean"] == pytest.approx(weights.mean().item(), abs=1e-6)
    assert summary["weight_std"] == pytest.approx(weights.std(correction=0).item(), abs=1e-6)


def test_density_loss_does_not_depend_on_how_the_batch_is_split() -> None:
    layer = skipping(density=0.3).eval()
    executes = torch.zeros(4, 6, dtype=torch.bool)
    executes[0] = True
    executes[3, :2] = True
    hidden = hidden_for(executes).detach()

    def gradient(parts: list[Tensor]) -> tuple[float, Tensor]:
        scope = BatchScope(tokens=24, replicas=len(parts), micro_batches=len(parts))
        if len(parts) > 1:
            scope.start_census()
            for part in parts:
                with torch.no_grad(), RoutingTape(scope=scope):
                    layer(part)
            scope.finish_census()
        layer.zero_grad()
        value = 0.0
        for part in parts:
            with RoutingTape(scope=scope) as tape:
                layer(part)
            loss = tape.loss() / len(parts)  # what an engine does
            loss.backward()
            value += loss.item()
        return value, layer.router.weight.grad.clone()

    whole, parts = gradient([hidden]), gradient(list(hidden.split([1, 3])))
    assert parts[0] == pytest.approx(whole[0])
    assert whole[0] == pytest.approx(0.1 * (8 / 24 - 0.3) ** 2)
    torch.testing.assert_close(parts[1], whole[1])


def test_a_density_over_the_model_lets_layers_differ() -> None:
    torch.manual_seed(0)
    config = SkipLayerConfig(density=0.5, density_over="model", density_coefficient=1.0)
    model = Decoder(DecoderConfig(dim=D, num_layers=2, num_heads=2, ffn_dim=24, skip_layer=config))
    for layer, sign in zip(model.layers, (1.0, -1.0), strict=True):
        # One layer runs for every token, the other for none: the mean is at the target.
        layer.router = Constant(sign)
    with RoutingTape(model) as tape:
        model(torch.randint(256, (2, 8)))
    assert [record.executed for record in tape.records] == [16, 0]
    assert tape.loss().item() == pytest.approx(0.0, abs=1e-6)
    model.layers[1].router = Constant(1.0)
    with RoutingTape(model) as tape:
        model(torch.randint(256, (2, 8)))
    # Two layers, each as strongly pulled as by a target of its own.
    assert tape.loss().item() == pytest.approx(2 * (1.0 - 0.5) ** 2)


class Constant(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.stack([0 * x_TD[:, 0], 0 * x_TD[:, 0] + 50 * self.sign], -1)


def test_losses_and_statistics_have_names_of_their_own() -> None:
    """A monitor writes both under the layer's name: one would hide the other."""
    layer = skipping(controller_gain=0.01)
    with RoutingTape() as tape:
        layer(torch.randn(1, 4, D, dtype=torch.float64))
    (record,) = tape.records
    assert set(record.losses) == {"density_penalty", "density_payment"}
    assert set(record.statistics) == {"density", "density_price"}


def test_controller_is_saved_with_the_layer() -> None:
    layer, other = skipping(controller_gain=0.01), skipping(controller_gain=0.01)
    layer.control.controller.price.fill_(0.25)
    other.load_state_dict(layer.state_dict())
    assert other.control.controller.price.item() == 0.25


def test_evaluation_and_census_leave_the_controller_alone() -> None:
    layer = skipping(controller_gain=0.01)
    scope = BatchScope()
    scope.start_census()
    with torch.no_grad(), RoutingTape(scope=scope):
        layer(torch.randn(1, 4, D, dtype=torch.float64))
    with RoutingTape():
        layer.eval()(torch.randn(1, 4, D, dtype=torch.float64))
    assert layer.control.controller.seen.item() == 0


def test_decoder_with_padding_equals_its_rows_alone() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(dim=D, num_layers=3, num_heads=2, ffn_dim=24, init_std=0.3)
    config = DecoderConfig(**{**config.__dict__, "skip_layer": SkipLayerConfig(layers=[0, 2])})
    model = Decoder(config).eval()
    assert [type(layer).__name__ for layer in model.layers] == [
        "SkipLayer",
        "DecoderLayer",
        "SkipLayer",
    ]
    ids = torch.randint(256, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    out = model(ids, mask)
    torch.testing.assert_close(out[0], model(ids[:1])[0])
    torch.testing.assert_close(out[1, :5], model(ids[1:, :5])[0])


@pytest.mark.parametrize("keys", ["all", "executing"])
@pytest.mark.parametrize("granularity", ["block", "attention", "ffn"])
@torch.no_grad()
def test_one_token_at_a_time_with_a_cache_is_the_whole_sequence(
    keys: str, granularity: str
) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        dim=D,
        num_layers=3,
        num_heads=2,
        ffn_dim=24,
        init_std=0.5,
        skip_layer=SkipLayerConfig(keys=keys, granularity=granularity),
    )
    model = Decoder(config).double().eval()
    ids = torch.randint(256, (2, 12))
    with RoutingTape(model) as tape:
        whole = model(ids)
    executed = [int(record.executed) for record in tape.records]
    assert min(executed) > 0
    assert max(executed) < 24  # something skips in every layer
    cache = Cache(model, 2)
    parts = [model(part, cache=cache) for part in ids.split([5, 1, 1, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
