"""Floating-point operations of a model of this library: planned, executed and nominal.

Planned: from the configuration, as many tokens as every block plans to compute. Executed: from
the RoutingRecords of a real forward, the tokens that were computed. Nominal: as if the model were
dense, every token in every layer; what a routed model must not be credited with.

Operations are those of matrix products (conventions: `adaptive.ops.flop_counter`), which agree
with `torch.utils.flop_counter.FlopCounterMode`. `backward=True` gives forward and backward, about
three times the forward. `recompute=True` adds what the backward computes a second time: the layers
under activation recomputation (about four times in all) and the scores that flash-attention kernels
do not keep. Without it, these are the "model FLOPs" of PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from adaptive.ops.flop_counter import FlopCounter, Flops, Work, register_flops
from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import RoutingRecord

__all__ = [
    "FlopCounter",
    "Flops",
    "Work",
    "executed_flops",
    "nominal_flops",
    "planned_flops",
    "records_by_module",
    "register_flops",
]

Shape = int | Sequence[int] | TokenLayout | Work

_BUILT_FROM = {
    "DecoderConfig": "Decoder",
    "DiffusionConfig": "DiffusionTransformer",
    "VisionConfig": "VisionTransformer",
}


def planned_flops(
    model: nn.Module | object,
    batch_size: Shape,
    seq_len: int | None = None,
    *,
    backward: bool = False,
    recompute: bool = False,
) -> int:
    """Operations that a model plans for a batch.

    Args:
        model: any model of this library, or its configuration (DecoderConfig, DiffusionConfig), or
            that of a run, as `load_model` gives it.
        batch_size: sequences in the batch; or in place of it and of `seq_len` a TokenLayout, or a
            list of the lengths of all sequences.
        seq_len: tokens of every sequence.
        backward: count the backward pass too.
        recompute: count also what the backward pass computes a second time.

    Raises:
        ValueError: if a module does not say what it computes.
    """
    counter = FlopCounter()
    counter(_model(model), _work(batch_size, seq_len))
    return round(float(_sum(counter.total(), backward, recompute)))


def nominal_flops(
    model: nn.Module | object,
    batch_size: Shape,
    seq_len: int | None = None,
    *,
    backward: bool = False,
    recompute: bool = False,
) -> int:
    """Operations of the same model with every token computed in every layer. See `planned_flops`.

    Experts stay as they are: each token reaches its top-k.
    """
    counter = FlopCounter(nominal=True)
    counter(_model(model), _work(batch_size, seq_len))
    return round(float(_sum(counter.total(), backward, recompute)))


def executed_flops(
    model: nn.Module,
    records: Iterable[RoutingRecord],
    batch_size: Shape = 1,
    seq_len: int | None = None,
    *,
    backward: bool = False,
    recompute: bool = False,
) -> Tensor:
    """Operations that really happened in the forwards that a tape recorded.

    Args:
        model: the model given to the RoutingTape (its records are named after its modules).
        records: those of one or more forwards.
        batch_size, seq_len: what those forwards computed in all, as in `planned_flops`.
        backward, recompute: see `planned_flops`.

    Returns:
        float64 scalar tensor on the device of the records, this rank's tokens only. Nothing waits
        for the device until it is read.

    Raises:
        ValueError: if a routed module has no record, or a record names no module of the model.
    """
    counter = FlopCounter(records_by_module(model, records))
    counter(model, _work(batch_size, seq_len))
    return _sum(counter.total(), backward, recompute)


def records_by_module(
    model: nn.Module, records: Iterable[RoutingRecord]
) -> dict[int, list[RoutingRecord]]:
    """The records of a tape by `id` of the module that made them, as a FlopCounter wants them.

    Raises:
        ValueError: if one names no module of the model.
    """
    by_module: dict[int, list[RoutingRecord]] = {}
    for record in records:
        try:
            module = model.get_submodule(record.name)
        except AttributeError:
            raise ValueError(
                f"record {record.name!r}: names no module of this model: give it to RoutingTape"
            ) from None
        by_module.setdefault(id(module), []).append(record)
    return by_module


def _sum(flops: Flops, backward: bool, recompute: bool) -> Tensor:
    total = flops.forward
    if backward:
        total = total + flops.backward
    if recompute:
        total = total + flops.repeated
    return total


def _work(batch_size: Shape, seq_len: int | None) -> Work:
    if isinstance(batch_size, Work):
        return batch_size
    if isinstance(batch_size, int):
        if seq_len is None:
            raise ValueError("seq_len=None: must be given with a batch size")
        return Work.dense(batch_size, seq_len)
    return Work.of(batch_size)


def _model(model: nn.Module | object) -> nn.Module:
    """The model itself, or one built from its configuration without memory for its weights."""
    if isinstance(model, nn.Module):
        return model
    # A run's configuration has the model's as its section `model`.
    model = getattr(model, "model", model)
    build = _BUILT_FROM.get(type(model).__name__)
    if build is None:
        names = " or ".join(_BUILT_FROM)
        raise ValueError(f"{type(model).__name__}: must be a model, or a {names}")
    # Looked up when needed: a user of the counter alone does not load the models.
    with torch.device("meta"):
        return getattr(import_module("adaptive.models"), build)(model)
