"""Capacities over depth and steps, against the papers' formulas."""

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from adaptive.models.decoder.model import DecoderConfig
from adaptive.routing.schedules import annealed_capacity, capacities_over_depth


def test_every_other_layer_is_the_papers() -> None:
    assert capacities_over_depth(4, capacity=0.125) == [1.0, 0.125, 1.0, 0.125]


def test_cosine_is_progressive_ratio_decay_with_floor_and_dense_top() -> None:
    got = capacities_over_depth(24, schedule="cosine", floor=0.1, dense_above=0.85)
    for layer, capacity in enumerate(got):
        ratio = 0.5 * math.cos(math.pi * layer / 23) + 0.5
        expected = 1.0 if ratio > 0.85 else max(ratio, 0.1)
        assert capacity == pytest.approx(expected)
    assert got[0] == 1
    assert got[-1] == 0.1


def test_a_list_names_the_routed_layers() -> None:
    assert capacities_over_depth(3, capacity=0.5, schedule=[2]) == [1, 1, 0.5]


@pytest.mark.parametrize(
    ("layers", "options", "line"),
    [
        (3, {"schedule": [3]}, r"schedule=\[3\]: layer 3 must be between 0 and 2"),
        (3, {"schedule": [-1]}, r"schedule=\[-1\]: layer -1 must be between 0 and 2"),
        (3, {"schedule": []}, r"schedule=\[\]: must name at least one layer"),
        (3, {"schedule": [1, 2, 1]}, r"schedule=\[1, 2, 1\]: names layer 1 twice"),
        (3, {"schedule": [3], "key": "layers"}, r"layers=\[3\]: layer 3 must be"),
        (1, {"schedule": "every_other"}, "schedule=every_other: routes layers 1, 3, 5"),
        (6, {"schedule": "cosine", "floor": 0.9}, "schedule=cosine: routes no layer of 6"),
        (6, {"schedule": "linear", "floor": 0.5, "dense_above": 0.4}, "above dense_above=0.4"),
    ],
)
def test_a_schedule_that_routes_no_layer_is_refused(
    layers: int, options: dict[str, Any], line: str
) -> None:
    """It would train a dense model without a word."""
    with pytest.raises(ValueError, match=line):
        capacities_over_depth(layers, **options)


def test_a_capacity_of_one_was_asked_for() -> None:
    assert capacities_over_depth(2, capacity=1.0, schedule="all") == [1, 1]
    assert capacities_over_depth(2, capacity=1.0, schedule="linear") == [1, 1]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"mixture_of_depths": {"schedule": [6]}}, r"mixture_of_depths.schedule=\[6\]: layer 6"),
        ({"skip_layer": {"layers": []}}, r"skip_layer.layers=\[\]: must name"),
        ({"mixture_of_experts": {"schedule": 7}}, "mixture_of_experts.schedule=7: must be at most"),
        ({"mixture_of_experts": {"schedule": [1, 1]}}, "names layer 1 twice"),
        ({"sized_feed_forward": {"layers": [9]}}, r"sized_feed_forward.layers=\[9\]: layer 9"),
        ({"adaptive_computation": {"layers": []}}, "adaptive_computation.layers=.*must name"),
    ],
)
def test_every_section_of_a_decoder_names_layers_that_it_has(
    section: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValidationError, match=line):
        TypeAdapter(DecoderConfig).validate_python({"num_layers": 6, **section})


def test_annealing_falls_linearly_and_stays() -> None:
    values = [annealed_capacity(step, start=1.0, end=0.5, steps=4) for step in range(6)]
    assert values == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
