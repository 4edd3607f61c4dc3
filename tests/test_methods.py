"""What holds of every method, by walking METHODS: a new one is found here without a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import adaptive
from adaptive import MixtureOfDepths, MixtureOfExperts, RoutingTape, start_step
from adaptive.blocks.method import METHODS, Method, methods, register_method
from adaptive.blocks.mixture_of_depths import CapacityAnnealing
from adaptive.flops import executed_flops
from adaptive.models import Decoder, DecoderConfig
from launch.run.config import load_config
from parallel.flop_formulas import torch_flop_counter
from tests.distributed.subjects import SUBJECTS

ROOT = Path(__file__).parents[1]
TINY = DecoderConfig(dim=32, num_layers=3, num_heads=4, ffn_dim=64)
IN_A_DECODER = methods("linear", "feed_forward", "layer", "stack")


def recipes() -> dict[str, set[str]]:
    """Recipe -> the methods that its model has."""
    found = {}
    for path in (ROOT / "recipes").glob("*.yaml"):
        if "arms:" not in path.read_text():
            phases = load_config(path).phase_configs()
            found[path.stem] = {m.name for phase in phases for m in phase.model.methods}
    return found


@pytest.fixture(scope="module")
def in_recipes() -> dict[str, set[str]]:
    return recipes()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_has_a_row_a_page_a_recipe_public_names_and_a_parity_subject(
    method: type[Method], in_recipes: dict[str, set[str]]
) -> None:
    rows = [r for r in (ROOT / "README.md").read_text().splitlines() if r.startswith("| ")]
    pages = "\n".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    for block in method.blocks:
        row = next((row for row in rows if f"`{block.__name__}`" in row), None)
        assert row is not None, f"README's table has no {block.__name__}"
        named = [r for r, its in in_recipes.items() if f"`{r}`" in row and method.name in its]
        assert named, f"{row}: names no recipe with {method.name}"
        assert block.__name__ in pages
        assert getattr(adaptive, block.__name__) is block
        assert block.__name__ in adaptive.__all__
    assert method.name in SUBJECTS or (method.place == "sequence" and "sprint" in SUBJECTS)


@pytest.mark.parametrize("method", IN_A_DECODER, ids=lambda method: method.name)
def test_executed_operations_are_those_that_torch_counts(method: type[Method]) -> None:
    torch.manual_seed(0)
    # Soft training of a stack may carry biases in wider heads, which torch counts as products.
    model = Decoder(TINY.with_method(method())).train(method.place != "stack")
    ids_BS = torch.randint(0, 256, (2, 32))
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch_flop_counter(display=False) as counted,
        RoutingTape(model) as tape,
    ):
        model.token_losses(ids_BS, ids_BS)
    executed = float(executed_flops(model, tape.records, 2, 32))
    assert executed == pytest.approx(counted.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("method", IN_A_DECODER, ids=lambda method: method.name)
def test_a_configuration_has_a_field_of_every_method(method: type[Method]) -> None:
    config = replace(TINY, **{method.name: method()})
    assert config.methods == (method(),)
    assert getattr(config, method.name) == method()
    assert getattr(TINY, method.name) is None
    assert config == TINY.with_method(method()) != TINY


def test_what_cannot_be_a_method_is_refused_by_name() -> None:
    class Place(Method):
        name = "elsewhere"

    for wrong in (type("Named", (Place,), {"name": "dim", "place": "layer"}), Place, nn.Linear):
        with pytest.raises(ValueError, match=r"must be|is taken"):
            register_method(wrong)  # type: ignore[type-var]
    assert register_method(METHODS[0]) is METHODS[0]


class Own(nn.Module):
    """A user's model: blocks of the library, and a module with a schedule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = MixtureOfDepths(nn.Linear(8, 8), 8, capacity=0.5)
        self.depths.annealing = CapacityAnnealing(0.5, steps=4)
        self.experts = MixtureOfExperts(8, 16, 4, bias_rate=0.1)
        self.steps: list[int] = []

    def start_step(self, step: int) -> None:
        self.steps.append(step)


def test_start_step_reaches_every_schedule_in_any_model_once() -> None:
    own = Own()
    model = nn.Sequential(nn.Identity(), own)
    bias = own.experts.expert_bias
    assert bias is not None
    with RoutingTape(model):
        own.experts(torch.randn(2, 9, 8))
    start_step(model, 2)
    assert own.depths.capacity == 0.75
    assert bool(bias.bias.abs().any())
    assert own.steps == [2]
