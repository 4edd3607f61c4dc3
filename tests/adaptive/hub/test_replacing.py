"""Methods in place of feed-forwards and linear layers of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from adaptive import RoutingTape
from adaptive.flops import executed_flops
from adaptive.hub import adapt
from parallel.flop_formulas import torch_flop_counter
from tests.adaptive.hub.families import (
    FAMILIES,
    FEED_FORWARDS,
    STRANGERS,
    some_ids,
    tiny,
    trained,
)

EXACT = {"atol": 1e-5, "rtol": 1e-5}
SPARSE = ("Mixtral", "Qwen3Moe")
SERVED: dict[str, dict[str, Any]] = {
    family: STRANGERS.get(family, {})
    for family in (*FAMILIES, *STRANGERS)
    if family not in (*SPARSE, "DeepseekV3")
}


@pytest.mark.parametrize(("method", "options"), FEED_FORWARDS)
@pytest.mark.parametrize("family", SERVED)
@torch.no_grad()
def test_it_begins_as_the_dense_model_and_tokens_stand_alone(
    family: str, method: str, options: dict[str, Any]
) -> None:
    model = tiny(family, "eager" if family == "Gemma2" else "sdpa", **SERVED[family])
    ids = some_ids(2)
    expected = model(ids).logits
    adapt(model, method, **options)
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)

    trained(model)
    with RoutingTape(model) as tape:
        logits = model(ids).logits
    assert len(tape.records) == 4
    if method != "mixture_of_experts":  # whose copies are alike
        assert not torch.allclose(logits, expected, atol=1e-2)
    other, mask = ids.clone(), torch.ones_like(ids)
    other[:, 9:], mask[0, 9:] = 7, 0
    with RoutingTape(model) as tape:
        changed = model(other, attention_mask=mask).logits
    assert all(int(record.tokens) == 23 for record in tape.records)
    torch.testing.assert_close(changed[:, :9], logits[:, :9], **EXACT)
    said = [
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=cached).tolist()
        for cached in (False, True)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_output_and_gradients_are_those_of_the_formula(family: str) -> None:
    """Learners, in float64: the first of the hidden units that weigh most, or all of them."""
    model = tiny(family).double()
    layer = (model.model.layers if family == "Llama" else model.transformer.h)[1]
    weights = {name: p.detach().clone() for name, p in layer.mlp.named_parameters()}
    adapt(model, "adaptive_computation", layers=[1], num_learners=2)
    row = layer.mlp.routing
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    row.gate.down.weight.data.normal_(std=3)
    row.gate.down.bias.data.zero_()
    out = layer.mlp(x)
    target = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad((out * target).sum(), [u.up.weight for u in row.learners])

    if family == "Llama":
        gate, up, down = (weights[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
        order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
    else:
        up, down = weights["c_fc.weight"].t(), weights["c_proj.weight"].t()
        order = (up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
    up = up.clone().requires_grad_()
    halves = order.chunk(2)
    counts = row.gate(x[0]).argmax(-1)
    assert counts.unique().numel() > 1
    rows = []
    for token, count in zip(x[0], counts, strict=True):
        total = torch.zeros(16, dtype=torch.float64)
        for units in halves[: int(count)]:
            if family == "Llama":
                hidden = F.silu(gate[units] @ token) * (up[units] @ token)
            else:
                hidden = F.gelu(up[units] @ token + weights["c_fc.bias"][units], approximate="tanh")
            total = total + down[:, units] @ hidden
        rows.append(total + (weights.get("c_proj.bias", 0) if count else 0))
    formula = torch.stack(rows)[None]
    torch.testing.assert_close(out, formula)
    (expected,) = torch.autograd.grad((formula * target).sum(), up)
    torch.testing.assert_close(got, tuple(expected[units] for units in halves))


@torch.no_grad()
def test_new_weights_and_parameter_tokens_are_drawn() -> None:
    ids = some_ids()
    dense = tiny("GPT2")(ids).logits
    for method, options in [*FEED_FORWARDS, ("pattention", {"tokens": 7, "ffn_tokens": 9})]:
        model = tiny("GPT2")
        adapt(model, method, **options, **({} if method == "pattention" else {"new_weights": True}))
        logits = model(ids).logits
        assert logits.isfinite().all()
        assert not torch.allclose(logits, dense, atol=1e-2)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Pattention"
    assert model.transformer.h[0].attn.c_attn.num_tokens == 7


@torch.no_grad()
def test_encoders_of_pictures_are_served() -> None:
    pictures = torch.randn(2, 3, 16, 16)
    for family in ("ViT", "Dinov2"):
        for method, options in FEED_FORWARDS:
            config = getattr(transformers, f"{family}Config")(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=4,
            )
            model = getattr(transformers, f"{family}Model")(config).eval()
            dense = model(pictures).last_hidden_state
            adapt(model, method, **options)
            torch.testing.assert_close(model(pictures).last_hidden_state, dense, **EXACT)


def test_what_cannot_be_served_is_refused_in_one_line_and_left_as_it_was() -> None:
    sparse = "has no gated or plain feed-forwards"
    shared = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
    cases: list[tuple[str, dict[str, Any], str, dict[str, Any], str]] = [
        ("Mixtral", {}, "mixture_of_experts", {}, f"MixtralDecoderLayer: {sparse}"),
        ("Qwen2Moe", shared, "sized_feed_forward", {}, f"Qwen2MoeDecoderLayer: {sparse}"),
        (
            "OPT",
            {"word_embed_proj_dim": 16},
            "sized_feed_forward",
            {},
            f"OPTDecoderLayer: {sparse}",
        ),
        (
            "Bloom",
            {},
            "mixture_of_experts",
            {},
            r"BloomBlock: its mlp \(BloomMLP\) takes more than",
        ),
        ("Bloom", {}, "pattention", {}, "BloomBlock: has no attention modules with is_causal"),
        (
            "Starcoder2",
            {"residual_dropout": 0.5},
            "sized_feed_forward",
            {},
            r"its mlp \(Starcoder2MLP\) computes, in training, something else",
        ),
        (
            "Llama",
            {},
            "mixture_of_experts",
            {"top_k": 1},
            "LlamaDecoderLayer: top_k=1: an upcycled",
        ),
        ("Llama", {}, "adaptive_computation", {"num_learners": 5}, "num_learners=5: must divide"),
        ("Llama", {}, "pattention", {"layers": [1]}, "layers: pattention takes none"),
        ("Llama", {}, "skip_layer", {"new_weights": True}, "new_weights=True: skip_layer keeps"),
    ]
    for family, settings, method, options, message in cases:
        model = tiny(family, "eager", **settings)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=message) as refusal:
            adapt(model, method, **options)
        assert "\n" not in str(refusal.value)
        assert before == {name: type(module) for name, module in model.named_modules()}
    twice = adapt(tiny("Llama"), "sized_feed_forward", layers=[1])
    with pytest.raises(ValueError, match="LlamaDecoderLayer: is routed already"):
        adapt(twice, "mixture_of_experts", layers=[1])


@pytest.mark.parametrize("first", ["mixture_of_experts", "skip_layer"])
@torch.no_grad()
def test_experts_in_a_layer_that_routes_see_its_tokens_alone(first: str) -> None:
    """Staged MoDE, whatever came first: rows of different lengths, padding, a cache, the ledger."""
    kinds: dict[str, dict[str, Any]] = {
        "mixture_of_experts": {"num_experts": 3},
        "skip_layer": {"keys": "all"},
    }
    model = tiny("Llama", "eager")
    for method in sorted(kinds, key=lambda name: name != first):
        adapt(model, method, layers=[1, 2], **kinds[method])
    trained(model)
    ids, mask = some_ids(2), torch.ones(2, 14, dtype=torch.long)
    mask[0, 9:] = 0
    with RoutingTape(model) as tape:
        logits = model(ids, attention_mask=mask).logits
    depth = {r.name: int(r.executed) for r in tape.records if r.kind == "skip_layer"}
    width = {r.name: int(r.tokens) for r in tape.records if r.kind == "mixture_of_experts"}
    assert {f"model.layers.{n}.routing" for n in (1, 2)} == set(depth)
    assert list(width.values()) == list(depth.values())
    assert all(0 < count < 23 for count in width.values())
    torch.testing.assert_close(model(ids[:1, :9]).logits, logits[:1, :9], **EXACT)
    cache = model(ids[1:, :6], use_cache=True).past_key_values
    rest = model(ids[1:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits[1:, 6:], **EXACT)
    with torch_flop_counter(display=False) as counted, RoutingTape(model) as tape:
        model(ids[1:], use_cache=False)
    executed = float(executed_flops(model, tape.records, 1, 14))
    assert executed == pytest.approx(counted.get_total_flops(), rel=1e-3)
