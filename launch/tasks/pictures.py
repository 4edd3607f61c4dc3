"""Pictures of a language model's routing for one text, at evaluations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptive.observe.metric_log import MetricLog
from adaptive.observe.pictures import (
    chosen_by_layer,
    depth_map,
    expert_map,
    experts_by_layer,
    text_map,
)
from adaptive.routing.collapse import FluctuationProbe, measuring_collapse
from adaptive.routing.tape import RoutingRecord, RoutingTape
from launch.tasks import Batch, TrainedModel

LONGEST = 288
"""Tokens shown: four lines of a depth map."""


def show_routing(
    engine: TrainedModel,
    ids_S: Tensor,
    texts: list[str],
    step: int,
    log: MetricLog | None,
    probe: FluctuationProbe | None = None,
) -> None:
    """Run one text as evaluation does and draw who computed it. Every rank calls it.

    Of mixtures of experts also `collapse/…` scalars, see `adaptive.routing.collapse`.

    Args:
        engine: holds the model.
        ids_S: int64, the tokens of the text, the same on every rank.
        texts: what each of them reads.
        step: steps taken.
        log: of the rank that writes.
        probe: remembers the experts of this text from one call to the next.
    """
    records: list[RoutingRecord] = []

    def watch(model: nn.Module, batch: Batch) -> None:
        with measuring_collapse(model), RoutingTape(model) as tape:
            model(batch["input_ids"])
        records.extend(tape.records)

    engine.train(False)
    with torch.no_grad():
        engine.forward({"input_ids": ids_S[None]}, watch)
    engine.train()
    if probe is not None:
        probe.update(records)
    if log is None:
        return
    collapse = {
        f"collapse/{record.name}/{name.removeprefix('collapse/')}": float(value)
        for record in records
        for name, value in record.statistics.items()
        if name.startswith("collapse/")
    }
    log.scalars(step, collapse)
    layers = getattr(engine.model, "layers", None)
    count = len(layers) if isinstance(layers, nn.ModuleList) else None
    for name, image_HWC in routing_pictures(records, texts, count).items():
        log.image(step, f"routing/{name}", image_HWC)


def routing_pictures(
    records: list[RoutingRecord], texts: list[str], num_layers: int | None
) -> dict[str, Tensor]:
    """What there is to draw of one text: depth, if tokens skip layers; experts, if there are."""
    pictures = {}
    shown = texts[:LONGEST]
    chosen = [record.chosen for record in records if record.chosen is not None]
    if any(found.dim() == 1 for found in chosen):
        names, routed, chosen_LT = chosen_by_layer(records, num_layers)
        chosen_LT = chosen_LT[:, :LONGEST]
        # Where tokens lie over ranks, this one knows of its own alone.
        if chosen_LT.shape[1] != len(shown):
            return pictures
        pictures["tokens_over_depth"] = depth_map(shown, names, routed, chosen_LT)
        pictures["layers_of_text"] = text_map(shown, chosen_LT)
    if any(found.dim() == 2 and found.shape[0] == len(texts) for found in chosen):
        names, units, experts_LT = experts_by_layer(records, tokens=len(texts))
        pictures["experts_of_text"] = expert_map(shown, names, units, experts_LT[:, :LONGEST])
    return pictures
