"""Generation: cached equals uncached, sampling draws what it says, operations are counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive import MixtureOfDepths
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.decode_depth import SkipDecode, generate_at_depth
from adaptive.models.decoder.generate import Generation, Sampling, generate, non_causal_layers
from adaptive.models.decoder.speculation.drafts import NgramDraft
from adaptive.models.decoder.speculative import speculate
from parallel.flop_formulas import torch_flop_counter
from parallel.mesh import Mesh

DENSE = DecoderConfig(vocab_size=40, dim=32, num_layers=4, num_heads=4, max_seq_len=48)
ROUTED = dataclasses.replace(DENSE, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25))
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [1, 8, 2, 8]]


def build(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, MixtureOfDepths):
            nn.init.normal_(module.router.weight, std=0.3)
    return model


def run(model: Decoder, prompts: list[list[int]], **kwargs: object) -> Generation:
    made = None
    for made in generate(model, prompts, **kwargs):  # type: ignore[arg-type] # noqa: B007
        pass
    assert made is not None
    return made


@pytest.mark.parametrize("config", [DENSE, ROUTED], ids=["dense", "routed"])
def test_cached_generation_is_uncached_generation(config: DecoderConfig) -> None:
    model = build(config)
    draw = {"max_new_tokens": 20, "sampling": Sampling(temperature=0.7, top_k=12)}
    with_cache = run(model, PROMPTS, generator=torch.Generator().manual_seed(5), **draw)
    without = run(model, PROMPTS, generator=torch.Generator().manual_seed(5), cached=False, **draw)
    assert with_cache.tokens == without.tokens
    assert with_cache.layers == without.layers
    assert [len(layers) for layers in with_cache.layers] == [len(p) + 19 for p in PROMPTS]


def test_a_batch_is_its_sequences_alone() -> None:
    model = build(ROUTED)
    greedy = {"max_new_tokens": 12, "sampling": Sampling(temperature=0)}
    together = run(model, PROMPTS, **greedy)
    for prompt, tokens, layers in zip(PROMPTS, together.tokens, together.layers, strict=True):
        alone = run(model, [prompt], **greedy)
        assert alone.tokens == [tokens]
        assert alone.layers == [layers]


def test_generation_stops_at_the_longest_sequence_trained_on() -> None:
    made = run(build(DENSE), PROMPTS, max_new_tokens=1000, sampling=Sampling(temperature=0))
    # The last token drawn need not go through the model any more.
    assert len(PROMPTS[0]) + len(made.tokens[0]) == DENSE.max_seq_len + 1


@pytest.mark.parametrize("cached", [True, False])
def test_a_full_sequence_ends_none_beside_it(cached: bool) -> None:
    """Prompts of 45, 1 and 48 tokens with 48: the short one is cut where it is cut alone."""
    model = build(ROUTED)
    prompts = [list(range(40)) + [1] * 5, [7], [3] * 48]
    options = {"max_new_tokens": 30, "sampling": Sampling(temperature=0), "cached": cached}
    together = run(model, prompts, **options)
    assert [len(tokens) for tokens in together.tokens] == [4, 30, 1]
    for prompt, tokens, layers in zip(prompts, together.tokens, together.layers, strict=True):
        alone = run(model, [prompt], **options)
        assert alone.tokens == [tokens]
        assert alone.layers == [layers]
    if cached:
        flops = sum(run(model, [p], **options).executed_flops(model) for p in prompts)
        assert together.executed_flops(model) == pytest.approx(flops)


def test_a_full_sequence_ends_none_beside_it_at_fewer_layers() -> None:
    model = build(DENSE)
    prompts = [[2] * 45, [7]]
    depths = SkipDecode(4, 4, 2, 30)
    options = {"max_new_tokens": 30, "sampling": Sampling(temperature=0)}
    together = generate_at_depth(model, prompts, depths, **options)
    alone = [generate_at_depth(model, [prompt], depths, **options)[0] for prompt in prompts]
    assert [len(tokens) for tokens in alone] == [4, 30]
    assert together == alone


@pytest.mark.parametrize("config", [DENSE, ROUTED], ids=["dense", "routed"])
def test_operations_are_those_that_torch_counts(config: DecoderConfig) -> None:
    model = build(config)
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as mode:
        made = run(model, PROMPTS, max_new_tokens=10, sampling=Sampling(temperature=0))
    executed = made.executed_flops(model)
    assert executed == pytest.approx(mode.get_total_flops(), rel=0.01)
    nominal = made.nominal_flops(model)
    assert nominal == executed if config is DENSE else nominal > executed


def test_probabilities_against_a_loop() -> None:
    logits_BV = torch.randn(6, 30, generator=torch.Generator().manual_seed(2)) * 2
    got_BV = Sampling(temperature=0.8, top_k=9, top_p=0.7).probabilities(logits_BV)
    for logits, got in zip(logits_BV.tolist(), got_BV.tolist(), strict=True):
        best = sorted(range(30), key=lambda i: -logits[i])[:9]
        weight = {i: torch.tensor(logits[i] / 0.8, dtype=torch.float64).exp().item() for i in best}
        total, kept, reached = sum(weight.values()), [], 0.0
        for i in best:
            if reached < 0.7:
                kept.append(i)
            reached += weight[i] / total
        share = sum(weight[i] for i in kept)
        want = [weight[i] / share if i in kept else 0.0 for i in range(30)]
        assert got == pytest.approx(want, abs=1e-6)


def test_of_equal_logits_no_more_than_k_are_drawn_from() -> None:
    """In 16 bits many are equal to the k-th: 52 tokens passed for 50."""
    logits_BV = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert ((Sampling(top_k=50).probabilities(logits_BV) > 0).sum(1) == 50).all()
    got = Sampling(top_k=2).probabilities(torch.tensor([[1.0, 3.0, 3.0, 3.0]]))
    assert got.tolist() == [[0.0, 0.5, 0.5, 0.0]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits_BV = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 50
    drawn = Sampling(temperature=temperature, top_k=5, top_p=0.9).draw(logits_BV)
    assert torch.equal(drawn, logits_BV.argmax(1))


def test_draws_follow_the_probabilities() -> None:
    logits_BV = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    sampling = Sampling(temperature=1.5, top_k=3)
    drawn = sampling.draw(logits_BV, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20000
    # Four standard deviations of a share of 20,000 draws.
    torch.testing.assert_close(share, sampling.probabilities(logits_BV[:1])[0], atol=0.015, rtol=0)
    assert share[3] == 0


def test_padded_vocabulary_is_never_drawn() -> None:
    made = run(build(DENSE), PROMPTS, max_new_tokens=30, vocab_size=5)
    assert max(token for tokens in made.tokens for token in tokens) < 5


def test_layers_that_look_ahead_are_named() -> None:
    assert non_causal_layers(build(ROUTED)) == []
    config = dataclasses.replace(ROUTED, mixture_of_depths=MixtureOfDepthsConfig(predictor="none"))
    assert non_causal_layers(build(config)) == ["layers.1", "layers.3"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "at least one token"),
        ([[1] * 49], "prompt of 49 tokens: must be at most max_seq_len=48"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(build(DENSE), prompts, max_new_tokens=1))


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_a_model_that_ranks_share_does_not_generate(axis: str) -> None:
    """Each tensor rank drew from its own part of the vocabulary, and went on with that."""
    model = build(DENSE)
    model.mesh = Mesh(**{axis: 2})
    message = f"{axis}=2: must be 1 to generate"
    with pytest.raises(ValueError, match=message):
        next(generate(model, PROMPTS, max_new_tokens=1))
    with pytest.raises(ValueError, match=message):
        generate_at_depth(model, PROMPTS, SkipDecode(4, 4, 1, 4), max_new_tokens=1)
    with pytest.raises(ValueError, match=message):
        next(speculate(model, PROMPTS, NgramDraft(), max_new_tokens=1))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_sampling_out_of_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        Sampling(**wrong)


@pytest.mark.parametrize("cached", [True, False])
def test_each_sequence_rests_behind_its_end_and_the_others_go_on(cached: bool) -> None:
    """Greedy text is the text without an end, cut behind the first one: alone or beside others."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(dim=32, num_layers=2, num_heads=4, max_seq_len=64)).eval()
    prompts = [[1, 2, 3], [7], [9, 9]]
    options = {"max_new_tokens": 20, "sampling": Sampling(temperature=0), "cached": cached}
    *_, free = generate(model, prompts, **options)  # type: ignore[arg-type]
    whole = [list(tokens) for tokens in free.tokens]
    end = whole[0][4]
    *_, made = generate(model, prompts, end=end, **options)  # type: ignore[arg-type]
    for tokens, ended in zip(whole, made.tokens, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert ended == tokens[:stop]
    assert len(made.tokens[0]) <= 5
