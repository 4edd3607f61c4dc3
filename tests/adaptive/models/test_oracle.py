"""The oracle against a search written as loops; what its budgets promise."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.oracle import routed_modules, search
from adaptive.routing.forced import force_choices

FAMILIES = {
    "sized": {"sized_feed_forward": SizedFeedForwardConfig()},
    "learners": {"adaptive_computation": AdaptiveComputationConfig(num_learners=2)},
    "skip": {"skip_layer": SkipLayerConfig()},
}


def decoder(family: str, layers: int = 2) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32, dim=16, num_layers=layers, num_heads=2, ffn_dim=32, init_std=0.5,
        **FAMILIES[family],
    )  # fmt: skip
    model = Decoder(config).double().eval()
    for module in routed_modules(model).values():
        router = getattr(module, "router", None) or module.gate.down
        torch.nn.init.normal_(router.weight, std=2.0)
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exhaustive_search_is_the_best_of_all_paths_written_as_loops(family: str) -> None:
    model = decoder(family)
    ids = torch.randint(32, (9,))
    report = search(model, ids, [0, 5], [0.0, 0.5, 1.0], rows=4)
    modules = list(routed_modules(model).values())
    with torch.no_grad():
        own_loss = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
    for number, position in enumerate(report.positions):
        assert report.router[number].loss == pytest.approx(own_loss[position].item())
        losses = {}
        for path in itertools.product(*(range(len(m.path_costs)) for m in modules)):
            forced = {}
            for module, choice in zip(modules, path, strict=True):
                own = torch.tensor(own_choices(model, module, ids))
                own[position] = choice
                forced[module] = own
            with torch.no_grad(), force_choices(forced):
                logits = model(ids[None])[0, position]
            losses[path] = F.cross_entropy(logits, ids[position + 1]).item()
        for budget, found in report.best.items():
            within = {
                path: loss
                for path, loss in losses.items()
                if sum(m.path_costs[c] for m, c in zip(modules, path, strict=True)) / len(modules)
                <= budget + 1e-9
            }
            assert found[number].loss == pytest.approx(min(within.values()))
            assert found[number].cost <= budget + 1e-9
    assert report.evaluated == 2 * len(losses)


def own_choices(model: Decoder, module: torch.nn.Module, ids: torch.Tensor) -> list[int]:
    from adaptive import RoutingTape

    with torch.no_grad(), RoutingTape(model) as tape:
        model(ids[None])
    names = {m: n for n, m in model.named_modules()}
    (record,) = [r for r in tape.records if r.name == names[module]]
    return record.chosen.flatten().long().tolist()


def test_a_larger_budget_is_never_worse_and_the_router_never_better() -> None:
    model = decoder("sized")
    report = search(model, torch.randint(32, (12,)), list(range(8)), [0.0, 0.3, 0.6, 1.0])
    for number in range(8):
        losses = [report.best[budget][number].loss for budget in (0.0, 0.3, 0.6, 1.0)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] <= report.router[number].loss + 1e-12
        assert losses[-1] <= report.full[number] + 1e-12
    usage = report.usage(0.0)
    assert usage == [[1.0, 0.0, 0.0]] * 2


def test_a_beam_that_is_wide_enough_finds_what_all_paths_have() -> None:
    model = decoder("sized", layers=3)
    ids = torch.randint(32, (6,))
    everything = search(model, ids, [4], [0.5, 1.0])
    wide = search(model, ids, [4], [0.5, 1.0], exhaustive_up_to=1, beam=27)
    assert wide.best == everything.best
    narrow = search(model, ids, [4], [0.5, 1.0], exhaustive_up_to=1, beam=1)
    assert narrow.evaluated < wide.evaluated
    assert narrow.best[1.0][0].loss >= wide.best[1.0][0].loss


def test_wrong_arguments_are_named() -> None:
    model = decoder("sized")
    ids = torch.randint(32, (6,))
    with pytest.raises(ValueError, match="position=5: must be between 0 and 4"):
        search(model, ids, [5], [1.0])
    with pytest.raises(ValueError, match="budget=2: must be in"):
        search(model, ids, [0], [2])
    nested = {**FAMILIES["skip"], **FAMILIES["sized"]}
    config = DecoderConfig(dim=16, num_layers=2, num_heads=2, ffn_dim=32, **nested)
    with pytest.raises(ValueError, match="not every token reaches"):
        search(Decoder(config).eval(), ids, [0], [1.0])
    dense = Decoder(DecoderConfig(dim=16, num_layers=1, num_heads=2)).eval()
    with pytest.raises(ValueError, match="no module that a path could name"):
        search(dense, ids, [0], [1.0])
