"""Wrapping other people's blocks: a transformers Llama layer, and ragged rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaRotaryEmbedding,
)

from adaptive import (
    MixtureOfDepths,
    RoutingTape,
    Selection,
    SizedFeedForward,
    SkipLayer,
    SparseDenseFusion,
    recompute_contexts,
)
from adaptive.blocks.wrapping import to_rows


class LlamaRows:
    """The method that docs/wrapping.md shows, for either wrapper."""

    block: nn.Module
    rotary: nn.Module

    def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
        positions_BK = to_rows(selection.positions[:, None], selection.layout)[..., 0]
        kwargs |= {
            "position_embeddings": self.rotary(packed_RD, positions_BK),
            "position_ids": positions_BK,
            "attention_mask": None,
        }
        return super().inner(packed_RD, selection, **kwargs)


class RoutedLlamaLayer(LlamaRows, MixtureOfDepths):
    pass


class SkippedLlamaLayer(LlamaRows, SkipLayer):
    pass


def llama_config(layers: int = 4) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="sdpa",
    )


def wrapped_llama(wrapper: type[nn.Module], **options: Any) -> LlamaForCausalLM:
    """Every second layer wrapped, as docs/wrapping.md does; choices as of a trained model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    layers = model.model.layers
    for index in range(1, len(layers), 2):
        layers[index] = wrapper(layers[index], 32, **options)
        layers[index].rotary = model.model.rotary_emb
    for name, parameter in model.named_parameters():
        if "router" in name or "predictor" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


WRAPPERS = [(RoutedLlamaLayer, {"capacity": 0.5}), (SkippedLlamaLayer, {"keys": "executing"})]


@pytest.mark.parametrize(("wrapper", "options"), WRAPPERS)
def test_a_wrapped_llama_says_of_a_batch_what_it_says_of_each_alone(
    wrapper: type[nn.Module], options: dict[str, Any]
) -> None:
    """Left padding, right padding and another sequence beside it change nothing."""
    model = wrapped_llama(wrapper, **options).eval()
    draw = torch.Generator().manual_seed(2)
    short, long = (
        torch.randint(1, 97, (9,), generator=draw),
        torch.randint(1, 97, (14,), generator=draw),
    )
    alone = [model(input_ids=ids[None]).logits[0] for ids in (short, long)]
    for left in (False, True):
        start = 5 if left else 0
        ids = torch.zeros(2, 14, dtype=torch.long)
        ids[0, start : start + 9], ids[1] = short, long
        mask = ids > 0
        with RoutingTape(model) as tape:
            logits = model(input_ids=ids, attention_mask=mask.long(), token_mask=mask).logits
        assert all(record.tokens == 23 for record in tape.records)
        lengths = [record.executed_lengths for record in tape.records]
        assert any(chosen is not None and chosen.unique().numel() > 1 for chosen in lengths)
        torch.testing.assert_close(logits[0, start : start + 9], alone[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[1], alone[1], atol=1e-5, rtol=1e-4)


def test_a_llama_layer_that_nothing_chose_runs_and_changes_nothing() -> None:
    """As an untrained predictor leaves it: many blocks cannot run on rows without columns."""
    model = wrapped_llama(RoutedLlamaLayer)
    for index in (1, 3):
        model.model.layers[index].threshold.fill_(torch.inf)
    ids = torch.randint(0, 97, (2, 12))
    dense = LlamaForCausalLM(llama_config())
    dense.load_state_dict(
        {name.replace(".block.", "."): value for name, value in model.state_dict().items()},
        strict=False,
    )
    dense.model.layers = nn.ModuleList([dense.model.layers[0], dense.model.layers[2]])
    model.eval()
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, dense(input_ids=ids).logits)
    logits.sum().backward()
    gradient = model.model.layers[1].block.mlp.up_proj.weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_a_wrapped_llama_generates_without_a_cache_and_refuses_one() -> None:
    model = wrapped_llama(RoutedLlamaLayer, capacity=0.5).eval()
    ids = torch.randint(1, 97, (1, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, use_cache=False, **options)
    for place in range(6, 10):
        assert made[0, place] == model(input_ids=made[:, :place]).logits[0, -1].argmax()
    with pytest.raises(ValueError, match=r"past_key_values of 7 tokens: .* use_cache=False"):
        model.generate(ids, use_cache=True, **options)


class Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden_BKD: Tensor) -> Any:
        return self.function(hidden_BKD)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: None, r"Returns returned NoneType: must return the .* \[1, 4, 8\]"),
        (lambda x: {"hidden": x}, "Returns returned dict"),
        # One token for all of them would be added to each.
        (lambda x: x[:, :1], r"Returns returned shape \[1, 1, 8\]: must return"),
        (lambda x: x.add_(1), "Returns changed its input in place"),
    ],
)
def test_a_block_that_returns_no_hidden_states_is_refused(
    function: Callable[[Tensor], Any], message: str
) -> None:
    module = MixtureOfDepths(Returns(function), 8, capacity=0.5, predictor="none")
    hidden = torch.randn(1, 8, 8)
    with pytest.raises(ValueError, match=message):
        module(hidden)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        module.eval()(hidden)


def test_a_llama_layer_computes_the_chosen_tokens_at_their_own_positions() -> None:
    torch.manual_seed(0)
    config = llama_config()
    layer = LlamaDecoderLayer(config, 0).double()
    module = RoutedLlamaLayer(layer, 32, capacity=0.5).double()
    torch.nn.init.normal_(module.router.weight)
    hidden = torch.randn(2, 10, 32, dtype=torch.float64)
    rotary = module.rotary = LlamaRotaryEmbedding(config)
    position_ids = torch.arange(10)[None]
    out = module(hidden, position_embeddings=rotary(hidden, position_ids))
    for b in range(2):
        r = hidden[b] @ module.router.weight[0]
        chosen = sorted(r.argsort(descending=True)[:5].tolist())
        picked = hidden[b, chosen][None]
        tables = rotary(picked, torch.tensor([chosen]))
        update = layer(picked, position_embeddings=tables, attention_mask=None)[0] - picked[0]
        expected = hidden[b].clone()
        expected[chosen] = expected[chosen] + r[chosen, None] * update
        torch.testing.assert_close(out[b], expected)


def test_a_llama_model_with_routed_layers_trains_with_its_own_checkpointing() -> None:
    gradients = []
    for recompute in (False, True):
        model = wrapped_llama(RoutedLlamaLayer, capacity=0.5)
        if recompute:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": recompute_contexts}
            )
        model.train()
        ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
        with RoutingTape(model) as tape:
            loss = model(input_ids=ids, labels=ids).loss
        (loss + tape.loss()).backward()
        assert [record.name for record in tape.records] == ["model.layers.1", "model.layers.3"]
        assert [record.executed for record in tape.records] == [12, 12]
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, gradients[1][name])


def test_a_llama_layer_that_tokens_skip_computes_the_others_at_their_own_positions() -> None:
    torch.manual_seed(0)
    config = llama_config()
    layer = LlamaDecoderLayer(config, 0).double()
    module = SkippedLlamaLayer(layer, 32, keys="executing").double().eval()
    torch.nn.init.normal_(module.router.weight)
    hidden = torch.randn(3, 10, 32, dtype=torch.float64)
    rotary = module.rotary = LlamaRotaryEmbedding(config)
    tables = rotary(hidden, torch.arange(10)[None])
    with RoutingTape() as tape:
        out = module(hidden, position_embeddings=tables)
    executes = tape.records[0].chosen.view(3, 10)
    counts = executes.sum(1)
    assert counts.min() != counts.max()
    for b in range(3):
        chosen = executes[b].nonzero().squeeze(1)
        picked = hidden[b, chosen][None]
        expected = hidden[b].clone()
        expected[chosen] = layer(
            picked, position_embeddings=rotary(picked, chosen[None]), attention_mask=None
        )[0]
        torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixtureOfDepths(nn.Linear(8, 8), 8),
        lambda: SkipLayer(nn.Linear(8, 8), 8, keys="executing"),
        lambda: SizedFeedForward(8, 16),
        lambda: SparseDenseFusion([nn.Linear(8, 8)], [nn.Linear(8, 8)], [nn.Linear(8, 8)], 8),
    ],
)
def test_a_batch_of_no_sequence_has_every_gradient(make: Callable[[], nn.Module]) -> None:
    """As a rank may have that got no rows: others wait for it where weights are gathered."""
    module = make()
    with RoutingTape() as tape:
        out = module(torch.randn(0, 6, 8))
    assert out.shape == (0, 6, 8)
    (out.sum() + tape.loss()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
