"""Pictures: what is drawn is what was recorded. Sizes and places are of no promise; colours are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from adaptive import RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.observe.pictures import (
    _COMPUTED,
    _SKIPPED,
    WIDTH,
    Colour,
    _hue,
    chosen_by_layer,
    depth_map,
    expert_map,
    experts_by_layer,
    load_map,
    patch_map,
    text_map,
)
from adaptive.routing.tape import RoutingRecord


def pixels(image_HWC: Tensor) -> Counter[Colour]:
    assert image_HWC.dtype == torch.uint8
    assert image_HWC.shape[2] == 3
    return Counter(map(tuple, image_HWC.flatten(0, 1).tolist()))


def assert_in_proportion(found: Counter[Colour], chosen: Tensor) -> None:
    """A cell for each that was chosen or not, beside a key that has as much of either colour."""
    counts = [int(chosen.sum()), int((~chosen).sum())]
    areas = [found[_COMPUTED], found[_SKIPPED]]
    cell = (areas[1] - areas[0]) / (counts[1] - counts[0])
    assert cell == int(cell) > 20
    key = areas[0] - cell * counts[0]
    assert 0 < key < 200
    assert key == areas[1] - cell * counts[1]


def test_rows_are_the_layers_and_what_they_chose() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=20,
        dim=16,
        num_layers=4,
        num_heads=2,
        mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25),
    )
    model = Decoder(config)
    with RoutingTape(model) as tape:
        model(torch.randint(0, 20, (3, 12)))
    names, routed, chosen_LT = chosen_by_layer(tape.records, 4, sequence=2)
    assert names == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert routed == [False, True, False, True]
    for row, record in ((1, tape.records[0]), (3, tape.records[1])):
        assert record.chosen is not None
        assert torch.equal(chosen_LT[row], record.chosen.view(3, 12)[2])
    assert chosen_LT[[0, 2]].all()
    assert chosen_LT.shape == (4, 12)


def test_a_dark_cell_for_every_token_computed() -> None:
    """The area of each colour is in proportion to the number of tokens."""
    chosen_LT = torch.rand(5, 100, generator=torch.Generator().manual_seed(0)) < 0.3
    names = [f"layers.{i}" for i in range(5)]
    image_HWC = depth_map(["x"] * 100, names, [True] * 5, chosen_LT)
    assert image_HWC.shape[1] == WIDTH
    assert_in_proportion(pixels(image_HWC), chosen_LT)


def test_text_darkens_with_the_layers_that_computed_it() -> None:
    none_LT, all_LT = torch.zeros(3, 40, dtype=torch.bool), torch.ones(3, 40, dtype=torch.bool)
    half_LT = torch.cat([none_LT[:, :20], all_LT[:, :20]], 1)
    tokens = list("def f(x):\n    return x  # 1\n\tπ\x00 and more")
    tokens += [" "] * (40 - len(tokens))
    brightness = [text_map(tokens, m).float().mean() for m in (none_LT, half_LT)]
    assert brightness[1] < brightness[0]


def experts_drawn(names: list[str], units: list[int], experts_LT: Tensor) -> Counter[Colour]:
    """Pixels of an expert map, without those of its key: where all are idle, it has no others."""
    idle_LT = torch.full_like(experts_LT, max(units))
    tokens = ["y"] * experts_LT.shape[1]
    key = pixels(expert_map(tokens, names, units, idle_LT))
    found = pixels(expert_map(tokens, names, units, experts_LT))
    for expert in range(max(units)):
        found[_hue(expert / max(units))] -= key[_hue(expert / max(units))]
    return found


def test_one_colour_for_each_expert() -> None:
    chosen = torch.randint(0, 8, (90, 2), generator=torch.Generator().manual_seed(1))
    record = RoutingRecord("layers.0.ffn", "moe", 90, 180, load=torch.ones(8), chosen=chosen)
    names, units, experts_LT = experts_by_layer([record], tokens=90)
    assert (names, units) == (["layers.0.ffn"], [8])
    assert torch.equal(experts_LT[0], chosen[:, 0])
    found = experts_drawn(names, units, experts_LT)
    counts = torch.bincount(chosen[:, 0], minlength=8).tolist()
    areas = [found[_hue(expert / 8)] for expert in range(8)]
    assert areas == [areas[0] / counts[0] * count for count in counts]


def test_idle_experts_are_pale_and_no_other_expert() -> None:
    experts_LT = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 4]])
    found = experts_drawn(["layers.0.ffn"], [4], experts_LT)
    area = found[_hue(1 / 4)]
    # Two tokens go to expert 0, three to one of the two idle ones.
    assert found[_hue(0.0)] == 2 * area
    assert found[_SKIPPED] == 3 * area


def test_balanced_loads_have_one_colour_and_dead_experts_are_crossed_out() -> None:
    even = pixels(load_map({"layers.1": torch.full((6,), 10.0)}))
    dead = pixels(load_map({"layers.1": torch.tensor([20.0, 10.0, 10.0, 10.0, 10.0, 0.0])}))
    big_areas = [{c for c, n in found.items() if n > 150} for found in (even, dead)]
    assert len(big_areas[0]) == 2, "paper and one colour"
    assert len(big_areas[1]) == 4, "paper, most, mean and none"


def test_patches_kept() -> None:
    kept_BS = torch.rand(3, 64, generator=torch.Generator().manual_seed(2)) < 0.25
    image_HWC = patch_map(kept_BS, (8, 8))
    assert image_HWC.shape[1] == WIDTH
    assert_in_proportion(pixels(image_HWC), kept_BS)


def test_nothing_to_draw_is_said() -> None:
    record = RoutingRecord("a", "kind", 4, 4)
    with pytest.raises(ValueError, match="none of them chooses tokens"):
        chosen_by_layer([record])
    with pytest.raises(ValueError, match="none of them chooses experts"):
        experts_by_layer([record], tokens=4)
