"""Operations of adapted models: those that torch counts while they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive import RoutingTape
from adaptive.flops import executed_flops, nominal_flops, records_by_module
from adaptive.hub import adapt
from adaptive.hub.flops import count_model, unknown_operations
from adaptive.ops.flop_counter import FlopCounter, Work
from parallel.flop_formulas import torch_flop_counter
from tests.adaptive.hub.families import DEPTHS, FEED_FORWARDS, some_ids, tiny, trained

METHODS = [("", {}), *DEPTHS, *FEED_FORWARDS, ("pattention", {"tokens": 7, "ffn_tokens": 9})]


def counted_model(family: str, method: str, options: dict[str, Any]) -> Any:
    model = tiny(family, "eager")
    model.config._experts_implementation = "eager"  # torch counts no grouped products on a CPU
    return trained(adapt(model, method, **options)) if method else model


@pytest.mark.parametrize(("method", "options"), METHODS)
@torch.no_grad()
def test_executed_operations_are_those_that_torch_counts(
    method: str, options: dict[str, Any]
) -> None:
    families = ["GPT2", "Qwen3", "Phi3"]
    for family in families if method in dict(FEED_FORWARDS) else [*families, "Qwen3Moe"]:
        if family == "Qwen3Moe" and method == "pattention":
            continue
        model = counted_model(family, method, options)
        assert unknown_operations(model) is None
        ids = some_ids(1, 12)
        model(ids, use_cache=False)
        with torch_flop_counter(display=False) as counted, RoutingTape(model) as tape:
            model(ids, use_cache=False)
        executed = float(executed_flops(model, tape.records, 1, 12))
        assert executed == pytest.approx(counted.get_total_flops(), rel=1e-3)
        if method in dict(DEPTHS):
            assert executed < float(nominal_flops(model, 1, 12))


@pytest.mark.parametrize(
    ("method", "options"), [("skip_layer", {"keys": "all"}), ("early_exit", {})]
)
@torch.no_grad()
def test_operations_of_a_text_that_grows_are_those_that_torch_counts(
    method: str, options: dict[str, Any]
) -> None:
    model = counted_model("Qwen3", method, options)
    model(some_ids(1, 12), use_cache=False)
    with torch_flop_counter(display=False) as counted, RoutingTape(model) as tape:
        model.generate(some_ids(1, 8), max_new_tokens=4, do_sample=False)
    counter = FlopCounter(records_by_module(model, tape.records))
    work = Work.of([8, 1, 1, 1], keys=[8, 9, 10, 11])
    count_model(model, counter, work, logits=Work.dense(1, 4))
    assert float(counter.total().forward) == pytest.approx(counted.get_total_flops(), rel=1e-3)


def test_what_is_not_known_is_named() -> None:
    said = unknown_operations(tiny("Bloom", "eager"))
    assert said == "BloomBlock: what its attention computes is not known"
