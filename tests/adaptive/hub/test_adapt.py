"""adapt: layers of transformers that route, in every family, by their interface."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.flex_attention
import transformers.masking_utils
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from adaptive import MixtureOfDepths, RoutingTape
from adaptive.hub import adapt
from tests.adaptive.hub.families import DEPTHS, FAMILIES, STRANGERS, some_ids, tiny, trained

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # sums of another order


@pytest.fixture(autouse=True)
def flex_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers compiles flex attention at each shape: half a minute a time on a CPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool, **options: Any) -> Any:
        return flex_attention(query, key, value, **options)

    def block_mask(*args: Any, _compile: bool = False, **options: Any) -> BlockMask:
        return create_block_mask(*args, **options)

    home = transformers.integrations.flex_attention
    monkeypatch.setattr(home, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", block_mask)


BOTH = ("sdpa", "eager")
ATTENTIONS = {"Gemma2": ("eager",)}  # it caps scores, and has no sdpa
EVERYWHERE = [
    *((family, attention) for family in FAMILIES for attention in ATTENTIONS.get(family, BOTH)),
    pytest.param("Mistral", "flex_attention", marks=pytest.mark.slow),
    pytest.param("Llama", "flex_attention", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "attention"), EVERYWHERE)
@torch.no_grad()
def test_a_model_that_chooses_every_token_is_the_dense_one(family: str, attention: str) -> None:
    model = tiny(family, attention)
    ids = some_ids(2)
    expected = model(ids).logits
    same = adapt(tiny(family, attention), "mixture_of_depths", layers="all", capacity=1.0)
    torch.testing.assert_close(same(ids).logits, expected)
    for keys in ("all", "executing"):  # nobody leaves or skips before training
        for method in ("early_exit", "skip_layer"):
            begun = adapt(tiny(family, attention), method, layers=[0, 2], keys=keys)
            torch.testing.assert_close(begun(ids).logits, expected, **CLOSE)
    adapt(model, "mixture_of_depths", layers="all", capacity=0.5)
    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            module.threshold.fill_(-torch.inf)
    with RoutingTape(model) as tape:
        logits = model(ids).logits
    assert [record.executed for record in tape.records] == [ids.numel()] * 4
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize(("method", "options"), DEPTHS)
@pytest.mark.parametrize(("family", "attention"), EVERYWHERE)
@torch.no_grad()
def test_later_tokens_padding_and_neighbours_change_nothing(
    family: str, attention: str, method: str, options: dict[str, Any]
) -> None:
    model = trained(adapt(tiny(family, attention), method, layers=[0, 1, 3], **options))
    ids = some_ids()
    other = ids.clone()
    other[:, 9:] = 7
    with RoutingTape(model) as tape:
        logits = model(ids).logits[0]
    assert any(0 < record.executed < 14 for record in tape.records)
    torch.testing.assert_close(model(other).logits[0, :9], logits[:9], **CLOSE)
    for left in (False, True):
        padded = torch.zeros(2, 14, dtype=torch.long)
        start = 5 if left else 0
        padded[0, start : start + 9], padded[1] = ids[0, :9], other[0]
        mask = (padded > 0).long()
        given: dict[str, Any] = {}
        if left:  # generate does so
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with RoutingTape(model) as tape:
            beside = model(padded, attention_mask=mask, **given).logits
        assert all(record.tokens == 23 for record in tape.records)
        torch.testing.assert_close(beside[0, start : start + 9], logits[:9], **CLOSE)
        torch.testing.assert_close(beside[1, :9], logits[:9], **CLOSE)


@pytest.mark.parametrize("family", STRANGERS)
@torch.no_grad()
def test_families_that_nothing_names_are_served_by_their_interface(family: str) -> None:
    ids, other = some_ids(2), some_ids(2)
    other[:, 9:] = 7
    settings = STRANGERS[family]
    expected = tiny(family, **settings)(ids).logits
    for method, options in (DEPTHS[0], DEPTHS[2], DEPTHS[3]):
        model = adapt(tiny(family, **settings), method, layers=[0, 2], **options)
        if method == "early_exit":
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        logits = trained(model)(ids).logits
        torch.testing.assert_close(model(other).logits[:, :9], logits[:, :9], **CLOSE)
        torch.testing.assert_close(model(ids[:1]).logits, logits[:1], **CLOSE)
        cache = model(ids[:, :9], use_cache=True).past_key_values
        rest = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(rest, logits[:, 9:], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_output_and_gradients_are_those_of_the_formula(attention: str) -> None:
    """A Llama in float64: chosen tokens alone, at their positions, weighed by their router."""
    model = trained(adapt(tiny("Llama", attention).double(), "mixture_of_depths", capacity=0.5))
    model.train()
    ids = some_ids(2, 10)
    logits = model(ids).logits
    target = torch.randn(logits.shape, dtype=torch.float64)
    got = torch.autograd.grad((logits * target).sum(), list(model.parameters()), allow_unused=True)

    dense = model.model
    hidden = dense.embed_tokens(ids)
    for index, layer in enumerate(dense.layers):
        rows = []
        for row in hidden:
            chosen = torch.arange(10)
            weight = torch.ones(10, 1, dtype=torch.float64)
            if index % 2:
                r = row @ layer.routing.router.weight[0]
                chosen = r.topk(5).indices.sort().values
                weight = 0.2 * torch.tanh(r[chosen, None]) + 1
            picked = row[None, chosen]
            attend = torch.zeros(1, 1, len(chosen), len(chosen), dtype=torch.float64)
            attend += torch.full_like(attend, -torch.inf).triu(1)
            h = layer.input_layernorm(picked)
            h = (
                picked
                + layer.self_attn(
                    hidden_states=h,
                    position_embeddings=dense.rotary_emb(picked, chosen[None]),
                    attention_mask=attend,
                )[0]
            )
            h = h + layer.mlp(layer.post_attention_layernorm(h))
            rows.append(row.index_put((chosen,), row[chosen] + weight * (h - picked)[0]))
        hidden = torch.stack(rows)
    formula = model.lm_head(dense.norm(hidden))
    torch.testing.assert_close(logits, formula)
    expected = torch.autograd.grad(
        (formula * target).sum(), list(model.parameters()), allow_unused=True
    )
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        if b is None:  # a predictor, which has a loss of its own
            assert a is None or not a.any(), name
        else:
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("method", ["skip_layer", "early_exit"])
def test_skipped_tokens_give_keys_and_gates_learn_by_the_formula(method: str) -> None:
    """A Llama in float64, every key of it: skipped ones too, of the state that they are left in."""
    options: dict[str, Any] = {"layers": [1, 2], "keys": "all", "schedule": {"noise": 0.0}}
    options |= {"skipped_gradient": "none"} if method == "skip_layer" else {}
    model = trained(adapt(tiny("Llama").double(), method, **options)).train()
    ids = some_ids(1, 10)
    with RoutingTape(model) as tape:
        logits = model(ids, use_cache=False).logits
    target = torch.randn(logits.shape, dtype=torch.float64)
    got = torch.autograd.grad((logits * target).sum(), list(model.parameters()))

    hidden = (dense := model.model).embed_tokens(ids)
    mask = torch.full((1, 1, 10, 10), -torch.inf, dtype=torch.float64).triu(1)
    rotary = dense.rotary_emb(hidden, torch.arange(10)[None])
    gate, records = torch.ones(10, dtype=torch.float64), iter(tape.records)
    for layer in dense.layers:
        h = layer.input_layernorm(hidden)
        h = hidden + layer.self_attn(h, position_embeddings=rotary, attention_mask=mask)[0]
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        if (routing := getattr(layer, "routing", None)) is None:
            hidden = h
            continue
        if routing.router is not None:
            scores = routing.router(torch.nn.functional.layer_norm(hidden[0], (16,)))
            soft = scores.softmax(-1)[:, 1] * (gate if method == "early_exit" else 1)
            taken = (scores.argmax(-1) == 1).double()
            taken = taken * gate.detach() if method == "early_exit" else taken
            gate = taken + soft - soft.detach()
        chosen = next(records).chosen
        assert chosen.equal(gate > 0)
        assert 0 < chosen.sum() < 10
        # What was not computed has no gradient: that of its gate is zero.
        hidden = torch.where(chosen[:, None], hidden + gate[:, None] * (h - hidden), hidden)
    formula = model.lm_head(dense.norm(hidden))
    torch.testing.assert_close(logits, formula)
    expected = torch.autograd.grad((formula * target).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    copied = copy.deepcopy(model.eval())  # gates of a forward are no part of a model
    torch.testing.assert_close(copied(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("method", "options"), [("mixture_of_depths", {"capacity": 0.5}), ("early_exit", {})]
)
def test_checkpointing_replays_the_choices(method: str, options: dict[str, Any]) -> None:
    from adaptive import recompute_contexts

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(7)
        model = trained(adapt(tiny("Qwen3"), method, layers=[1, 3], **options)).train()
        if recompute:
            options = {"use_reentrant": False, "context_fn": recompute_contexts}
            model.gradient_checkpointing_enable(options)
        ids = some_ids(2)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        with RoutingTape(model) as tape:
            loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        (loss + tape.loss()).backward()
        names = {f"model.layers.{layer}.routing" for layer in (1, 3)}
        assert names <= {record.name for record in tape.records}
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_weights_keep_their_names_and_hidden_states_their_shape() -> None:
    model, dense = tiny("Qwen2"), tiny("Qwen2")
    adapt(model, "skip_layer", layers=[1])
    added = set(model.state_dict()) - set(dense.state_dict())
    assert set(dense.state_dict()) <= set(model.state_dict())
    assert added
    assert all(name.startswith("model.layers.1.routing.") for name in added)
    assert isinstance(model.model.layers[1], type(dense.model.layers[1]))
    states = model(some_ids(2), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 14, 16)] * 5


@torch.no_grad()
def test_positional_arguments_and_documents_in_a_row() -> None:
    model = trained(adapt(tiny("GPT2"), "skip_layer", layers=[0, 2]))
    hidden = torch.randn(1, 6, 16)
    layer = model.transformer.h[0]
    assert layer(hidden, None, None, None, use_cache=False).equal(layer(hidden_states=hidden))
    model = trained(adapt(tiny("Llama"), "skip_layer", layers=[0, 2]))
    one, two = some_ids(1, 8, 1), some_ids(1, 6, 2)
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None]
    packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :8], model(one).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 8:], model(two).logits, **CLOSE)


def test_what_cannot_be_served_is_refused_in_one_line_and_left_as_it_was() -> None:
    def bloom() -> Any:
        return tiny("Bloom", "eager", num_hidden_layers=2)

    def gpt_neo() -> Any:
        kinds = [[["global", "local"], 2]]
        return tiny("GPTNeo", "eager", attention_types=kinds, window_size=4)

    def chosen_flash() -> Any:
        model = tiny("Llama")
        model.config._attn_implementation = "flash_attention_2"
        return model

    no_attention = "BloomBlock: has no attention modules with is_causal and config"
    columns = r"GPTNeoBlock: its attn\.attention\.bias is a mask by columns"
    cases: list[tuple[Any, str, dict[str, Any], str]] = [
        (bloom, "skip_layer", {"layers": [1]}, no_attention),
        (gpt_neo, "skip_layer", {"layers": [0, 1]}, columns),
        (chosen_flash, "mixture_of_depths", {}, "LlamaDecoderLayer: attn_implementation='flash"),
        (lambda: tiny("Llama"), "early_exit", {"layers": "all"}, "layers='all': must be a list"),
        (lambda: tiny("Llama"), "skip_layer", {"layers": [4]}, r"layers=\[4\]"),
        (lambda: tiny("Llama"), "skip_layer", {"depth": 1}, "depth: skip_layer has no such option"),
        (lambda: tiny("Llama"), "mixture_of_dephts", {}, "is no method; must be one of"),
        (lambda: tiny("Llama"), "token_merging", {}, "runs no layers of transformers; must be one"),
    ]
    for make, method, options, message in cases:
        model = make()
        names = set(model.state_dict())
        with pytest.raises(ValueError, match=message) as refusal:
            adapt(model, method, **options)
        assert "\n" not in str(refusal.value)
        assert set(model.state_dict()) == names
    twice = adapt(tiny("Llama"), "skip_layer", layers=[1])
    with pytest.raises(ValueError, match="AdaptedLlamaDecoderLayer: is routed already"):
        adapt(twice, "mixture_of_depths", layers=[1])
    with pytest.raises(ValueError, match="LlamaDecoderLayer: its model gives it alibi of shape"):
        twice.model.layers[1](torch.randn(1, 4, 16), alibi=torch.zeros(1, 4))
