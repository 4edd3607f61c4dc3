"""The cache: what comes out is what the whole prefix at once gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from adaptive import MixtureOfDepths, RoutingTape
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.cache import Cache

VOCAB = 53
DENSE = DecoderConfig(vocab_size=VOCAB, dim=32, num_layers=4, num_heads=4, num_kv_heads=2)
ROUTED = dataclasses.replace(DENSE, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25))
CONFIGS = {
    "dense": DENSE,
    "mixture_of_depths": ROUTED,
    "keys_of_all_tokens": dataclasses.replace(
        DENSE, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.5, keys="all")
    ),
    "mixture_of_depths_ffn": dataclasses.replace(
        DENSE, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.5, granularity="ffn")
    ),
    "sliding_windows": dataclasses.replace(ROUTED, sliding_window=7, window_layers=[0, 3]),
    "mixture_of_depths_and_experts": dataclasses.replace(
        ROUTED, mixture_of_experts=MixtureOfExpertsConfig(num_experts=4)
    ),
    "mixture_of_experts": dataclasses.replace(
        DENSE, mixture_of_experts=MixtureOfExpertsConfig(num_experts=4)
    ),
    "pattention": dataclasses.replace(
        DENSE, num_kv_heads=None, norm="parameter_free", pattention=PattentionConfig()
    ),
    "skip_layer": dataclasses.replace(DENSE, skip_layer=SkipLayerConfig()),
    "skip_layer_executing_keys": dataclasses.replace(
        DENSE, skip_layer=SkipLayerConfig(keys="executing")
    ),
    "skip_layer_attention": dataclasses.replace(
        DENSE, skip_layer=SkipLayerConfig(granularity="attention")
    ),
    "skip_layer_ffn": dataclasses.replace(DENSE, skip_layer=SkipLayerConfig(granularity="ffn")),
    "adaptive_computation": dataclasses.replace(
        DENSE, adaptive_computation=AdaptiveComputationConfig()
    ),
    "sized_feed_forward": dataclasses.replace(DENSE, sized_feed_forward=SizedFeedForwardConfig()),
}
SAME = 1e-9  # float64: in float32 a router's tie may fall the other way on another machine.


def build(name: str) -> Decoder:
    """A model in evaluation mode whose routed layers really choose some tokens and skip others."""
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name]).double().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, MixtureOfDepths):
            nn.init.normal_(module.router.weight, std=0.3)
    return model


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Decoder:
    return build(request.param)


@torch.no_grad()
def test_one_token_at_a_time_gives_the_logits_of_the_whole_prefix(model: Decoder) -> None:
    tokens_BS = ids(3, 40)
    whole = model(tokens_BS)
    cache = Cache(model, 3)
    for start in range(40):
        step = model(tokens_BS[:, start : start + 1], cache=cache)
        torch.testing.assert_close(step[:, 0], whole[:, start], atol=SAME, rtol=0)
    assert cache.counts.tolist() == [40, 40, 40]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[7, 1, 1, 20, 11], [40], [39, 1]])
def test_pieces_of_any_length_give_the_logits_of_the_whole_prefix(
    model: Decoder, pieces: list[int]
) -> None:
    tokens_BS = ids(2, 40)
    whole = model(tokens_BS)
    cache = Cache(model, 2)
    parts = [model(piece, cache=cache) for piece in tokens_BS.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=SAME, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths(model: Decoder, side: str) -> None:
    """Each sequence continues as if it were alone; padding is nowhere."""
    tokens_BS, lengths = ids(3, 24), [9, 1, 17]
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    prompts = torch.where(mask, tokens_BS[:, :17], 0)
    if side == "left":
        rolled = [row.roll(17 - n) for row, n in zip(prompts, lengths, strict=True)]
        prompts, mask = torch.stack(rolled), mask.flip(1)
    cache = Cache(model, 3)
    model(prompts, mask, cache=cache)
    for offset in range(5):
        column = torch.tensor(lengths)[:, None] + offset
        step = model(tokens_BS.gather(1, column), cache=cache)
        for row, n in enumerate(lengths):
            alone = model(tokens_BS[row : row + 1, : n + offset + 1])[0, -1]
            torch.testing.assert_close(step[row, 0], alone, atol=SAME, rtol=0)


@torch.no_grad()
def test_a_sequence_may_rest(model: Decoder) -> None:
    tokens_BS = ids(2, 12)
    whole = model(tokens_BS)
    cache = Cache(model, 2)
    model(tokens_BS[:, :8], cache=cache)
    only_second = torch.tensor([[False], [True]])
    for column in range(8, 12):
        step = model(tokens_BS[:, column : column + 1], only_second, cache=cache)
        torch.testing.assert_close(step[1, 0], whole[1, column], atol=SAME, rtol=0)
    step = model(tokens_BS[:, 8:9], ~only_second, cache=cache)
    torch.testing.assert_close(step[0, 0], whole[0, 8], atol=SAME, rtol=0)


@torch.no_grad()
def test_rewinding_forgets_the_rejected_tokens(model: Decoder) -> None:
    tokens_BS = ids(2, 30)
    whole = model(tokens_BS)
    cache = Cache(model, 2)
    model(tokens_BS[:, :10], cache=cache)
    model(ids(2, 25)[:, 10:], cache=cache)
    cache.rewind(torch.tensor([10, 7]))
    rest = torch.stack([tokens_BS[0, 10:20], tokens_BS[1, 7:17]])
    out = model(rest, cache=cache)
    torch.testing.assert_close(out[0], whole[0, 10:20], atol=SAME, rtol=0)
    torch.testing.assert_close(out[1], whole[1, 7:17], atol=SAME, rtol=0)


@torch.no_grad()
def test_routed_layers_hold_only_the_tokens_that_they_processed() -> None:
    model = build("mixture_of_depths")
    cache = Cache(model, 2)
    with RoutingTape(model) as tape:
        for column in ids(2, 50).split(1, dim=1):
            model(column, cache=cache)
    for index, layer in enumerate(model.layers):
        held = cache.layer(index).lengths
        if not isinstance(layer, MixtureOfDepths):
            assert held.tolist() == [50, 50]
            continue
        records = [r for r in tape.records if r.name == f"layers.{index}"]
        processed = torch.stack([r.executed_lengths for r in records]).sum(0)
        assert held.tolist() == processed.tolist()
        assert 0 < int(held.sum()) < 100, "the test must see both choices"
        assert records[-1].key_lengths is not None
        assert records[-1].key_lengths.tolist() == held.tolist()


@torch.no_grad()
def test_another_number_of_sequences_is_refused() -> None:
    model = build("dense")
    with pytest.raises(ValueError, match="2 sequences: the cache was made for 3"):
        model(ids(2, 4), cache=Cache(model, 3))


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 11, 30])
def test_a_later_token_changes_no_earlier_logit(model: Decoder, changed: int) -> None:
    """Causal evaluation of the whole prefix, token by token tested above.

    Logits are of order ten, and matrices of other sizes round differently: 5e-6 was seen. A token
    that moved to another choice would change them by more than 1e-3.
    """
    tokens_BS = ids(2, 31)
    other_BS = tokens_BS.clone()
    other_BS[:, changed] = (other_BS[:, changed] + 1) % VOCAB
    before, after = model(tokens_BS), model(other_BS)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=2e-5, rtol=0)
    assert not torch.allclose(before[:, changed:], after[:, changed:])


@torch.no_grad()
def test_expert_choice_would_let_the_future_through() -> None:
    """The control of the test above: with the choice of training, earlier logits do move."""
    model = build("mixture_of_depths")
    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            module.causal = False
    tokens_BS = ids(2, 31)
    other_BS = tokens_BS.clone()
    other_BS[:, 30] = (other_BS[:, 30] + 1) % VOCAB
    assert not torch.allclose(model(tokens_BS)[:, :30], model(other_BS)[:, :30], atol=1e-3)
