"""SkipDecode is what it says."""

import pytest
import torch

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.decode_depth import SkipDecode, generate_at_depth
from adaptive.models.decoder.generate import generate
from adaptive.routing.layout import TokenLayout
from tests.adaptive.models.test_speculative import FAMILIES, GREEDY, PROMPT, decoder


def test_models_that_look_ahead_are_refused() -> None:
    torch.manual_seed(0)
    depths = MixtureOfDepthsConfig(predictor="none")
    config = DecoderConfig(dim=16, num_layers=2, num_heads=2, mixture_of_depths=depths)
    model = Decoder(config).eval()
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
