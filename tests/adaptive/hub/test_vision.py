"""Encoders of pictures: rows of different lengths, and nobody looks at what is no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from adaptive import RoutingTape
from adaptive.flops import executed_flops
from adaptive.hub import adapt, load_adapted
from parallel.flop_formulas import torch_flop_counter
from tests.adaptive.hub.families import trained

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mixture_of_depths", {"capacity": 0.5}),
    ("skip_layer", {}),
    ("early_exit", {}),
]


def tiny(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=5,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    return getattr(transformers, f"{family}ForImageClassification")(config).eval()


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2"])
@torch.no_grad()
def test_chosen_tokens_see_the_chosen_and_nothing_else(
    family: str, attention: str, method: str, options: dict[str, Any], tmp_path: Any
) -> None:
    pictures = torch.randn(3, 3, 16, 16)
    model = tiny(family, attention)
    dense = model(pictures).logits
    same = adapt(tiny(family, attention), "mixture_of_depths", layers="all", capacity=1.0)
    torch.testing.assert_close(same(pictures).logits, dense)
    if method != "mixture_of_depths":
        with pytest.raises(ValueError, match=f"{family}Layer: keys='all': "):
            adapt(model, method, layers=[0], keys="all")
    trained(adapt(model, method, layers=[0, 2], **options))
    with RoutingTape(model) as tape:
        logits = model(pictures).logits
    assert tape.records[0].executed_lengths.unique().numel() > 1
    with torch_flop_counter(display=False) as counted, RoutingTape(model) as tape:
        model(pictures[:1])  # rows of a batch count without what fills them up
    if attention == "eager":  # torch counts no sdpa on a CPU
        executed = float(executed_flops(model, tape.records, 1, 17 + (family == "DeiT")))
        assert executed == pytest.approx(counted.get_total_flops(), rel=1e-3)
    alone = torch.cat([model(picture[None]).logits for picture in pictures])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)

    # The layer itself, of the chosen tokens alone: its attention has no order.
    layer = next(module for module in model.modules() if hasattr(module, "routing"))
    hidden = torch.randn(2, 9, 16)
    with RoutingTape() as tape:
        out = layer(hidden)
    for row, chosen, got in zip(hidden, tape.records[0].chosen.view(2, 9), out, strict=True):
        assert torch.equal(got[~chosen], row[~chosen])
        expected = layer.dense_forward(row[None, chosen])[0]
        if method == "mixture_of_depths":
            weight = 0.2 * torch.tanh(row[chosen] @ layer.routing.router.weight.T) + 1
            expected = row[chosen] + weight * (expected - row[chosen])
        torch.testing.assert_close(got[chosen], expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = load_adapted(tmp_path, attn_implementation=attention)
    torch.testing.assert_close(loaded(pictures).logits, logits)


transformers.logging.set_verbosity_error()
