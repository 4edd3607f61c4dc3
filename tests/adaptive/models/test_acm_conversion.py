"""Converting a decoder's feed-forwards into rows of learners: what each stage promises."""

import pytest
import torch

from adaptive import AdaptiveComputationModule, TokenLayout
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.convert.acm import (
    convert,
    distil,
    gate_labels,
    rows_of_learners,
    train_gates,
)
from adaptive.routing.forced import force_choices

ACM = AdaptiveComputationConfig(num_learners=4)


def teacher(**options: object) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, ffn_dim=32, init_std=0.4, **options
    )
    return Decoder(config).double().eval()


def batches(number: int, seed: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(32, (4, 12), generator=draw) for _ in range(number)]


def converted(model: Decoder) -> Decoder:
    return convert(model, ACM, batches(2)).double()


def everywhere(student: Decoder, count: int, tokens: int):  # type: ignore[no-untyped-def]
    chosen = torch.full((tokens,), count)
    return force_choices(dict.fromkeys(rows_of_learners(student).values(), chosen))


@torch.no_grad()
def test_all_learners_compute_what_the_feed_forward_did() -> None:
    model = teacher()
    student = converted(model)
    (ids,) = batches(1, seed=2)
    with everywhere(student, 4, ids.numel()):
        torch.testing.assert_close(student(ids), model(ids))
    with everywhere(student, 3, ids.numel()):
        assert not torch.allclose(student(ids), model(ids))


@torch.no_grad()
def test_learners_that_matter_most_come_first() -> None:
    model = teacher()
    # Make units 5 and 20 of layer 0 loud, and the others quiet.
    model.layers[0].ffn.down.weight *= 0.01
    model.layers[0].ffn.down.weight[:, [5, 20]] *= 1000
    loud = model.layers[0].ffn.up.weight[[5, 20]]
    student = converted(model)
    first = rows_of_learners(student)["layers.0.ffn"].learners[0].up.weight[:2]
    assert {tuple(row.tolist()) for row in first} == {tuple(row.tolist()) for row in loud}


def prefix_error(model: Decoder, student: Decoder, count: int) -> float:
    (ids,) = batches(1, seed=3)
    with torch.no_grad(), everywhere(student, count, ids.numel()):
        return (student(ids) - model(ids)).square().mean().item()


def test_distilling_changes_learners_only_and_makes_few_of_them_better() -> None:
    model = teacher()
    student = converted(model)
    before = {name: p.clone() for name, p in student.named_parameters()}
    error = prefix_error(model, student, 2)
    losses = list(distil(model, student, batches(40), learning_rate=1e-2))
    assert losses[-1] < losses[0]
    assert prefix_error(model, student, 2) < error
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != ("learners" in name), name


def test_gates_learn_their_labels_and_nothing_else_changes() -> None:
    model = teacher()
    student = converted(model)
    before = {name: p.clone() for name, p in student.named_parameters()}
    steps = list(train_gates(model, student, batches(40), threshold=0.8, learning_rate=1e-2))
    assert steps[-1][0] < steps[0][0]
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != (
            ".gate.up." in name or (".gate.down." in name and "learners" not in name)
        ), name


def test_labels_are_the_least_count_behind_which_one_more_is_not_worth_it() -> None:
    target = torch.tensor([[8.0], [8.0], [8.0], [0.0]])
    # Errors d_0…d_3 of four tokens: 8 4 2 1, 8 4 3.9 0, 8 8 0 0, 0 0 0 0.
    prefixes = torch.tensor(
        [[[4.0], [4.0], [0.0], [0.0]], [[6.0], [4.1], [8.0], [0.0]], [[7.0], [8.0], [8.0], [0.0]]]
    )
    assert gate_labels(prefixes, target, threshold=0.9).tolist() == [3, 1, 0, 0]
    assert gate_labels(prefixes, target, threshold=0.5).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="threshold=0: must be in"):
        gate_labels(prefixes, target, threshold=0)


def test_listed_layers_alone_are_converted() -> None:
    model = teacher()
    config = AdaptiveComputationConfig(num_learners=2, layers=[1])
    student = convert(model, config, batches(1)).double()
    assert list(rows_of_learners(student)) == ["layers.1.ffn"]
    row = rows_of_learners(student)["layers.1.ffn"]
    assert isinstance(row, AdaptiveComputationModule)
    x = torch.randn(5, 16, dtype=torch.float64)
    layout = TokenLayout.from_lengths([5])
    expected = model.layers[1].ffn(x, layout=layout)
    torch.testing.assert_close(row.prefix_updates(x, layout)[-1], expected)


def test_other_feed_forwards_are_refused() -> None:
    model = teacher(mixture_of_experts=MixtureOfExpertsConfig(num_experts=2, ffn_dim=16))
    with pytest.raises(ValueError, match="give one of them"):
        convert(model, ACM, batches(1))


@pytest.mark.parametrize(
    "routing",
    [{"mixture_of_depths": MixtureOfDepthsConfig()}, {"skip_layer": SkipLayerConfig()}],
)
def test_layers_that_do_not_see_every_token_are_refused(routing: dict) -> None:
    """Without a token, what a unit adds on average was NaN, and so was every error told."""
    with pytest.raises(ValueError, match=f"{next(iter(routing))}: must be null"):
        convert(teacher(**routing), ACM, batches(1))


def test_hidden_units_cannot_be_judged_on_nothing() -> None:
    with pytest.raises(ValueError, match="batches: must be at least one"):
        convert(teacher(), ACM, [])
