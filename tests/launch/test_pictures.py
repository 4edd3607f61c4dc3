"""Pictures of a text's routing: which there are, and that TensorBoard gets them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.observe.metric_log import MetricLog
from launch.tasks.pictures import show_routing

DENSE = DecoderConfig(vocab_size=256, dim=16, num_layers=2, num_heads=2, max_seq_len=400)
DEPTH = {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.25)}
EXPERTS = {"mixture_of_experts": MixtureOfExpertsConfig(num_experts=4)}


class LocalEngine:
    """What show_routing asks of an engine, for a model of this process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def forward(self, batch: Any, function: Any) -> Any:
        return function(self.model, batch)

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)


@pytest.mark.parametrize("length", [40, 400])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        (DEPTH, {"tokens_over_depth", "layers_of_text"}),
        (EXPERTS, {"experts_of_text"}),
        ({**DEPTH, **EXPERTS}, {"tokens_over_depth", "layers_of_text", "experts_of_text"}),
    ],
    ids=["dense", "depth", "experts", "both"],
)
def test_pictures_reach_tensorboard(
    tmp_path: Path, options: dict[str, Any], expected: set[str], length: int
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.manual_seed(0)
    engine: Any = LocalEngine(Decoder(dataclasses.replace(DENSE, **options)).train())
    ids_S = torch.randint(0, 256, (length,))
    texts = [chr(token) for token in ids_S.tolist()]
    with MetricLog(tmp_path) as log:
        show_routing(engine, ids_S, texts, 5, log)
    assert engine.model.training
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"routing/{name}" for name in expected}


def test_ranks_that_do_not_write_take_part_and_draw_nothing() -> None:
    engine: Any = LocalEngine(Decoder(dataclasses.replace(DENSE, **DEPTH)))
    show_routing(engine, torch.arange(10), list("abcdefghij"), 1, None)
