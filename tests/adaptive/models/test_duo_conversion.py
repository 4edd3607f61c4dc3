"""Converting a decoder's feed-forwards into two sizes keeps its function."""

import pytest
import torch

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.sized_feed_forward import BIG, SMALL, SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.convert.duo import convert, sized_modules
from adaptive.routing.forced import force_choices


def teacher(**options: object) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, ffn_dim=32, init_std=0.4, **options
    )
    return Decoder(config).double().eval()


@torch.no_grad()
def test_the_big_unit_is_the_feed_forward_and_the_small_one_its_loudest_part() -> None:
    model = teacher()
    # All but six hidden units of each feed-forward are silent: the small unit loses nothing.
    for layer in model.layers:
        layer.ffn.down.weight[:, 3:29] = 0
    batches = [torch.randint(32, (4, 12))]
    student = convert(model, SizedFeedForwardConfig(small_ffn_dim=6), batches)
    ids = torch.randint(32, (2, 9))
    for path in (BIG, SMALL):
        chosen = torch.full((18,), path)
        with force_choices(dict.fromkeys(sized_modules(student).values(), chosen)):
            torch.testing.assert_close(student(ids), model(ids))


def test_other_feed_forwards_are_refused() -> None:
    model = teacher(mixture_of_experts=MixtureOfExpertsConfig(num_experts=2, ffn_dim=16))
    with pytest.raises(ValueError, match="give one of them"):
        convert(model, SizedFeedForwardConfig(), [torch.randint(32, (1, 4))])


@pytest.mark.parametrize(
    "routing",
    [{"mixture_of_depths": MixtureOfDepthsConfig()}, {"skip_layer": SkipLayerConfig()}],
)
def test_layers_that_do_not_see_every_token_are_refused(routing: dict) -> None:
    """Without a token, what a unit adds on average was NaN, and so was every error told."""
    with pytest.raises(ValueError, match=f"{next(iter(routing))}: must be null"):
        convert(teacher(**routing), SizedFeedForwardConfig(), [torch.randint(32, (1, 4))])


def test_hidden_units_cannot_be_judged_on_nothing() -> None:
    with pytest.raises(ValueError, match="batches: must be at least one"):
        convert(teacher(), SizedFeedForwardConfig(), [])
