"""Self-speculative text is greedy text, whatever is drafted; SkipDecode is what it says."""

import pytest
import torch

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.decode_depth import SkipDecode, generate_at_depth
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.speculative import ExitAdapter, Speculator, distil_adapter
from adaptive.routing.layout import TokenLayout

GREEDY = Sampling(temperature=0)
FAMILIES = {
    "dense": {},
    "mixture_of_depths": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5)},
    "skip_layer": {"skip_layer": SkipLayerConfig()},
    "skip_layer_executing_keys": {"skip_layer": SkipLayerConfig(keys="executing")},
    "sized": {"sized_feed_forward": SizedFeedForwardConfig()},
    "experts": {"mixture_of_experts": MixtureOfExpertsConfig(num_experts=4, ffn_dim=16)},
    "pattention": {"pattention": PattentionConfig(tokens=16, ffn_tokens=32)},
}


def decoder(family: str = "dense", layers: int = 4) -> Decoder:
    """Wide initial weights, so that routers and likeliest tokens are decided."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32,
        dim=16,
        num_layers=layers,
        num_heads=2,
        ffn_dim=32,
        max_seq_len=64,
        init_std=0.5,
        **FAMILIES[family],
    )
    return Decoder(config).double().eval()


def greedy(model: Decoder, prompt: list[int], tokens: int) -> list[int]:
    *_, made = generate(model, [prompt], max_new_tokens=tokens, sampling=GREEDY)
    return made.tokens[0]


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_text_is_that_of_greedy_decoding(family: str, threshold: float) -> None:
    model = decoder(family)
    adapter = ExitAdapter.of(model, 2).double()
    speculator = Speculator(model, adapter, threshold=threshold, max_draft=4)
    *_, made = speculator.generate(PROMPT, max_new_tokens=30)
    assert made.tokens == greedy(model, PROMPT, 30)
    assert made.accepted < made.drafted  # an untrained adapter is wrong sometimes
    assert made.accepted + made.rounds + 1 == 30


def test_a_perfect_draft_is_always_accepted_and_saves_rounds() -> None:
    model = decoder()
    adapter = ExitAdapter.of(model, 2).double()
    # Late layers that change nothing, and an adapter that changes nothing but the norm.
    for layer in model.layers[2:]:
        torch.nn.init.zeros_(layer.attention.output.weight)
        torch.nn.init.zeros_(layer.ffn.down.weight)
    torch.nn.init.zeros_(adapter.attention.output.weight)
    speculator = Speculator(model, adapter, threshold=0.0, max_draft=3)
    *_, made = speculator.generate(PROMPT, max_new_tokens=21)
    assert made.tokens == greedy(model, PROMPT, 21)
    assert made.acceptance == 1
    assert made.rounds == 5  # (21 - 1) / (3 + 1)


def test_generation_ends_at_the_longest_sequence_of_the_model() -> None:
    model = decoder()
    speculator = Speculator(model, ExitAdapter.of(model, 1).double(), threshold=0.0)
    *_, made = speculator.generate(PROMPT, max_new_tokens=1000)
    assert made.tokens == greedy(model, PROMPT, 1000)
    assert len(made.tokens) == 64 - len(PROMPT) + 1
    *_, made = speculator.generate(PROMPT, max_new_tokens=1)
    assert made.tokens == greedy(model, PROMPT, 1)


def test_early_layers_are_computed_once_and_late_ones_at_most_once_a_token_kept() -> None:
    model = decoder()
    seen = {0: 0, 3: 0}
    for index in seen:
        model.layers[index].ffn.register_forward_hook(
            lambda _, args, out, index=index: seen.update({index: seen[index] + args[0].shape[0]})
        )
    speculator = Speculator(model, ExitAdapter.of(model, 2).double(), threshold=0.0, max_draft=4)
    *_, made = speculator.generate(PROMPT, max_new_tokens=20)
    # Each draft and each token that follows a round, once; nothing again after a rejection.
    assert seen[0] == seen[3] == len(PROMPT) + made.drafted + made.rounds


def test_a_round_without_drafts_makes_one_token_as_plain_decoding_does() -> None:
    model = decoder()
    speculator = Speculator(model, ExitAdapter.of(model, 2), threshold=1.0)
    *_, made = speculator.generate(PROMPT, max_new_tokens=3)
    assert (made.drafted, made.rounds) == (0, 2)
    assert made.tokens_per_round == 1
    *_, made = speculator.generate(PROMPT, max_new_tokens=1)
    assert made.tokens_per_round == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_has_the_dtype_of_its_model(dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    adapter = ExitAdapter.of(model, 2)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    *_, made = Speculator(model, adapter).generate(PROMPT, max_new_tokens=4)
    assert len(made.tokens) == 4


def test_distilling_makes_drafts_that_are_accepted() -> None:
    model = decoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = ExitAdapter.of(model, 3).double()
    torch.manual_seed(0)
    batches = [torch.randint(32, (8, 24)) for _ in range(60)]
    steps = list(distil_adapter(model, adapter, batches, learning_rate=1e-2))
    assert steps[-1][0] < steps[0][0]
    assert steps[-1][1] > steps[0][1] + 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_models_that_look_ahead_are_refused() -> None:
    torch.manual_seed(0)
    depths = MixtureOfDepthsConfig(predictor="none")
    config = DecoderConfig(dim=16, num_layers=2, num_heads=2, mixture_of_depths=depths)
    model = Decoder(config).eval()
    with pytest.raises(ValueError, match="looking at later ones"):
        Speculator(model, ExitAdapter.of(model, 1))
    with pytest.raises(ValueError, match="looking at later ones"):
        generate_at_depth(model, [[1]], SkipDecode(2, 2, 1, 4), max_new_tokens=2)


def test_skip_decode_layers_shrink_and_keep_bottom_and_top() -> None:
    schedule = SkipDecode(num_layers=8, first=8, last=3, length=11, warm_up=1)
    assert schedule.layers(0) == list(range(8))
    assert schedule.layers(10) == schedule.layers(99) == [0, 6, 7]
    depths = [schedule.depth(p) for p in range(12)]
    assert depths == sorted(depths, reverse=True)
    assert set(depths) == {8, 7, 6, 5, 4, 3}
    for position in range(11):
        assert set(schedule.layers(position + 1)) <= set(schedule.layers(position))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_depth_is_plain_decoding(family: str) -> None:
    model = decoder(family)
    prompts = [PROMPT, PROMPT[:3]]
    drawn = generate_at_depth(
        model, prompts, SkipDecode(4, 4, 4, 10), max_new_tokens=10, sampling=GREEDY
    )
    *_, made = generate(model, prompts, max_new_tokens=10, sampling=GREEDY)
    assert drawn == made.tokens


@pytest.mark.parametrize("prompts", [[[1, 2], []], [[]], [], [[1] * 65]])
def test_skip_decode_refuses_prompts_that_it_cannot_continue(prompts: list[list[int]]) -> None:
    """An empty one took the tokens of its neighbour, one too long gave none."""
    model = decoder()
    assert model.config.max_seq_len == 64
    with pytest.raises(ValueError, match="prompt"):
        generate_at_depth(model, prompts, SkipDecode(4, 4, 1, 4), max_new_tokens=2)


def test_skip_decode_is_the_prefix_with_each_token_at_its_depth() -> None:
    """Without a cache: every token passes its own layers, among the tokens that passed them too."""
    model = decoder()
    schedule = SkipDecode(4, first=3, last=1, length=6)
    (drawn,) = generate_at_depth(model, [PROMPT], schedule, max_new_tokens=8, sampling=GREEDY)
    tokens, expected = list(PROMPT), []
    while len(expected) < 8:
        ids = torch.tensor(tokens)
        layers_of = [
            range(4) if n < len(PROMPT) else schedule.layers(n - len(PROMPT) + 1)
            for n in range(len(tokens))
        ]
        with torch.no_grad():
            hidden = model.embedding(ids)
            for index, layer in enumerate(model.layers):
                here = torch.tensor([n for n, own in enumerate(layers_of) if index in own])
                lengths = torch.tensor([0, len(here)], dtype=torch.int32)
                layout = TokenLayout(lengths, len(here), here)
                hidden = hidden.index_copy(0, here, layer(hidden[here], layout=layout))
            token = int(model.output(model.norm(hidden[-1])).argmax())
        expected.append(token)
        tokens.append(token)
    assert drawn == expected


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 5, 1, 3), "must satisfy 1 <= last <= first <= 4"),
        ((4, 2, 3, 3), "must satisfy"),
        ((4, 4, 1, 0), "length=0: must be at least 1"),
        ((4, 4, 1, 3, 2), "warm_up=2: must be between 0 and last=1"),
    ],
)
def test_wrong_schedules_are_named(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipDecode(*numbers)


def test_no_tokens_asked_for_are_none() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, vocab_size=32)).eval()
    speculator = Speculator(model, ExitAdapter.of(model, 1))
    assert list(speculator.generate([1, 2], max_new_tokens=0)) == []
