"""generate with a cache in which a routed layer holds what it processed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from adaptive import RoutingTape
from adaptive.hub import adapt
from adaptive.hub.cache import RoutedCacheLayer
from tests.adaptive.hub.families import DEPTHS, FAMILIES, some_ids, tiny, trained

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


def routed(family: str, method: str, options: dict[str, Any], attention: str) -> Any:
    return trained(adapt(tiny(family, attention), method, layers=[0, 2, 3], **options))


def padded_prompts() -> dict[str, torch.Tensor]:
    ids = some_ids(2, 9)
    ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        (family, *depth)
        for family in FAMILIES
        for depth in DEPTHS[: None if family in ("Llama", "GPT2", "Mistral", "Gemma3") else 2]
    ],
)
def test_with_a_cache_it_says_what_it_says_without(
    family: str, method: str, options: dict[str, Any]
) -> None:
    """Prompts of two lengths, padded on the left; the text outgrows every window."""
    model = routed(family, method, options, "eager" if family == "Gemma2" else "sdpa")
    known = (method, options) in DEPTHS[:2]  # the others differ in what they hold, not in how
    for way in WAYS.values() if known else [WAYS["greedy"]]:
        said = []
        for use_cache in (False, True):
            torch.manual_seed(3)
            out = model.generate(
                **padded_prompts(),
                max_new_tokens=7,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_logits=True,
                **way,
            )
            said.append(out)
        assert said[0].sequences.tolist() == said[1].sequences.tolist()
        for without, with_cache in zip(said[0].logits, said[1].logits, strict=True):
            torch.testing.assert_close(with_cache, without, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_routed_layer_holds_what_it_processed_and_no_more(attention: str) -> None:
    model = routed("Mistral", "mixture_of_depths", {"capacity": 0.5}, attention)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    ids, cache = some_ids(1, 20), DynamicCache()
    executed = torch.zeros(3, dtype=torch.long)
    logits = []
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:12], ids[:, 12:]):
        with RoutingTape(model) as tape:
            logits.append(model(part, past_key_values=cache).logits)
        executed += torch.tensor([int(record.executed) for record in tape.records])
    held = [layer for layer in cache.layers if isinstance(layer, RoutedCacheLayer)]
    assert [layer.keys.shape[2] for layer in held] == executed.tolist()
    assert 0 < executed.sum() < 60
    assert cache.get_seq_length() == cache.get_seq_length(1) == 20
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-4, rtol=1e-4)
    cache.crop(-8)
    again = model(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(again, logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [[1, 3], [0, 2], [0, 1, 2, 3], [3]])
@torch.no_grad()
def test_a_cache_that_is_not_its_own_is_refused_whatever_layer_asks(layers: list[int]) -> None:
    model = adapt(tiny("Llama"), "skip_layer", layers=layers)
    dense = tiny("Llama")
    ids = some_ids()
    foreign = dense(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values of \d+ tokens: .* use_cache=False"):
        model(ids[:, 6:], past_key_values=foreign)
    own = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a routed layer processed of 6 tokens, and this"):
        dense(ids[:, 6:], past_key_values=own)
    with pytest.raises(ValueError, match=r"past_key_values of StaticCache: a routed layer keeps"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))


@torch.no_grad()
def test_what_was_chosen_by_later_tokens_is_no_text_to_continue() -> None:
    ids = some_ids()
    for predictor, training in (("none", False), ("both", True)):
        model = adapt(tiny("Llama"), "mixture_of_depths", capacity=0.5, predictor=predictor)
        cache = model.train(training)(ids[:, :6], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids[:, 6:], past_key_values=cache)


@torch.no_grad()
def test_what_left_costs_no_layer_above_its_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(tiny("Llama"), "early_exit", layers=[2])
    model.model.layers[2].routing.router.bias[1] = -1.0  # from now on, everybody leaves
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    out = model(some_ids(2, 5), use_cache=True)
    assert ran == [0, 1, 2, 3]  # what a layer returns has to be seen once
    ran.clear()
    out = model(some_ids(2, 1), past_key_values=out.past_key_values)
    assert ran == [0, 1]
    states = model(some_ids(2, 5), output_hidden_states=True).hidden_states
    assert states[2].equal(states[3])
    assert out.past_key_values.get_seq_length(3) == 6


def test_prompt_lookup_takes_back_what_it_guessed_wrong() -> None:
    model = routed("Llama", "skip_layer", {}, "sdpa")
    ids = some_ids(1, 4).repeat(1, 3)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    guessed = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert guessed.tolist() == expected.tolist()


transformers.logging.set_verbosity_error()
