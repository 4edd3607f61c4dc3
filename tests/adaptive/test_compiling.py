"""Compiled layers compute what they computed, in few graphs; what routes is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptive import RoutingTape
from adaptive.blocks.method import Method, methods
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.compiling import compile_layers, compiled_parts, graphs
from adaptive.models import Decoder, DecoderConfig, DiffusionConfig, DiffusionTransformer
from adaptive.routing.layout import TokenLayout

TINY = DecoderConfig(dim=32, num_layers=2, num_heads=4, ffn_dim=64)
DEPTHS = TINY.with_method(MixtureOfDepthsConfig(capacity=0.25))


def losses(model: Decoder, *, steps: int = 3, layout: TokenLayout | None = None) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw, out = torch.Generator().manual_seed(0), []
    for step in range(steps):
        torch.manual_seed(step)
        ids_BS = torch.randint(0, 256, (2, 32), generator=draw)
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids_BS, ids_BS, layout=layout).mean()
        (loss + tape.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(loss.detach()))
    return out


def built(config: DecoderConfig = DEPTHS) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config)


def test_compiled_layers_train_as_before_and_layers_of_a_kind_share_a_graph() -> None:
    expected = losses(built())
    torch._dynamo.reset()
    model = built()
    names = dict(model.named_parameters()).keys()
    found = compile_layers(model, backend="aot_eager")
    assert found == ["layers.0", "layers.1.block", "layers.1.predictor"]
    assert dict(model.named_parameters()).keys() == names
    before = graphs()
    first = losses(model, steps=1)
    # The dense layer, the same on fewer tokens, the predictor.
    assert graphs() - before == 3
    model = built()
    compile_layers(model, backend="aot_eager")
    assert losses(model) == pytest.approx(expected, abs=1e-5)
    assert first[0] == pytest.approx(expected[0], abs=1e-5)
    assert graphs() - before == 3
    # Without gradients nothing is compiled, whatever is chosen.
    with torch.no_grad():
        model.eval().token_losses(torch.ones(1, 7, dtype=torch.long), torch.ones(1, 7).long())
    assert graphs() - before == 3


def test_attention_over_documents_is_left_out_of_graphs() -> None:
    config, layout = TINY, TokenLayout.from_lengths([5, 27, 32])
    expected = losses(built(config), layout=layout)
    torch._dynamo.reset()
    model = built(config)
    compile_layers(model, backend="eager")
    assert losses(model, layout=layout) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", methods("linear", "feed_forward", "layer"))
def test_nothing_that_routes_is_compiled(method: type[Method]) -> None:
    model = built(TINY.with_method(method()))
    parts = list(compiled_parts(model))
    assert parts
    names = {id(module): name for name, module in model.named_modules()}
    inside = {names[id(m)] for part in parts for m in part.modules()}
    assert not any("router" in name.split(".") for name in inside)
    assert not any("experts" in name.split(".") for name in inside)


def test_layers_of_a_diffusion_transformer_are_found_and_what_is_no_layer_is_not() -> None:
    model = DiffusionTransformer(DiffusionConfig(dim=32, num_heads=2, image_size=16))
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(part)].rsplit(".", 1)[0] for part in compiled_parts(model)}
    assert found == {"trunk.encoder", "trunk.middle", "trunk.decoder"}
    assert not list(compiled_parts(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
