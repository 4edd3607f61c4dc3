"""What one rank needs on one mesh: memory, what it sends, seconds of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptive.flops import Work
from adaptive.models.decoder.model import Decoder, DecoderConfig
from launch.planning.machines import Machine
from launch.planning.step_time import (
    Collective,
    Demand,
    LayerShape,
    layer_collectives,
    layer_operators,
    layer_passes,
    operations,
    ring_steps,
    seconds,
    weight_passes,
)
from launch.run.engine import batch_split
from launch.run.errors import BadInput
from launch.run.preflight import meta_model
from launch.run.sections import RunConfig
from parallel import cost
from parallel.gradients import is_expert
from parallel.mesh import Mesh, data_degree


@dataclass(frozen=True)
class Plan:
    """What one rank needs on one mesh.

    Attributes:
        mesh: sizes only.
        zero_stage: the lowest that fits, or the highest possible.
        micro_batch, accumulation: rows of one micro-batch, and how many a step has.
        state: bytes of weights, gradients and optimizer.
        activations: bytes that one micro-batch keeps for its backward.
        sent: bytes that one rank sends in a step, by axis.
        compute, communication: seconds of a step.
    """

    mesh: Mesh
    zero_stage: int
    micro_batch: int
    accumulation: int
    state: float
    activations: float
    sent: dict[str, float]
    compute: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication

    @property
    def memory(self) -> float:
        return self.state + self.activations


def plan(config: RunConfig, mesh: Mesh, machine: Machine, *, mixed: bool = True) -> Plan:
    """Plan a language model's run on one mesh.

    Args:
        config: of the run; its model must be a Decoder's.
        mesh: sizes of the axes; no groups are needed.
        machine: what one rank has.
        mixed: 16-bit weights, gradients and activations with 32-bit optimizer state.

    Raises:
        BadInput: the model, the batch or the sequence does not divide.
    """
    model_config = config.model
    if not isinstance(model_config, DecoderConfig):
        raise BadInput(f"task={config.task}: only decoders (task language_model) can be planned")
    seq_len = config.data.seq_len
    micro, accumulation = batch_split(config, mesh.data)
    model = meta_model(config, mesh)
    dense = sum(p.numel() for p in model.parameters() if not is_expert(p))
    experts = sum(p.numel() for p in model.parameters() if is_expert(p))
    number = 2 if mixed else 4
    activations = activation_numbers(model_config, mesh, micro * seq_len) * number
    split = mesh.tensor > 1 or mesh.expert > 1
    states = {
        stage: _state_bytes(dense, experts, mesh, stage, mixed=mixed)
        for stage in ((0, 1, 2) if split else (0, 1, 2, 3))
    }
    fitting = [stage for stage, state in states.items() if state + activations <= machine.memory]
    stage = min(fitting, default=max(states))
    demand = micro_batch_demand(model_config, mesh, micro, seq_len, machine, size=number)
    demand = demand.times(accumulation)
    demand += _update_demand(dense, experts, mesh, stage, accumulation, size=number)
    sent = dict.fromkeys(("tensor", "context", "expert", "data"), 0.0)
    for collective in demand.collectives:
        sent[collective.axis] += collective.sent
    time = seconds(demand, machine, ranks=mesh.world)
    return Plan(
        mesh,
        stage,
        micro,
        accumulation,
        states[stage],
        activations,
        sent,
        time.compute,
        time.communication,
    )


def micro_batch_demand(
    config: DecoderConfig, mesh: Mesh, rows: int, seq_len: int, machine: Machine, *, size: int
) -> Demand:
    """What one rank does for one micro-batch of `rows` rows, forward and backward.

    A recomputed layer's forward runs again, and what it sends is sent again.
    """
    with torch.device("meta"):
        model = Decoder(config)
    work = Work.dense(rows, seq_len)
    products, attention = operations(model, work, causal_share=machine.causal_share)
    ranks, tokens = mesh.tensor * mesh.context, rows * seq_len
    weights = sum(p.numel() / mesh.tensor / _spread(p, mesh) for p in model.parameters())
    passes = weight_passes(weights, size=size)
    demand = Demand(products / ranks, attention / ranks, passes)
    head = _head_width(config)
    copies = sum(method.expert_axis[1] for method in config.methods)
    for share in _shares(config):
        shape = LayerShape(
            config.dim,
            config.num_heads,
            config.kv_heads,
            head,
            _ffn_rows(config),
            share,
            copies,
        )
        layer = Demand(
            passes=layer_passes(shape, tokens, mesh, size=size),
            operators=layer_operators(shape),
            collectives=layer_collectives(shape, rows, seq_len, mesh, size=size),
        )
        layer += ring_steps(shape, tokens, mesh, size=size)
        demand += layer.times(4 / 3) if config.recompute else layer
    # The last norm and the embedding's rows; logits, which the loss passes over four times.
    here = tokens / mesh.context
    of_loss = 4 * size * config.vocab_size / mesh.tensor * here
    demand += Demand(passes=20 * config.dim * here * size + of_loss, operators=100)
    # Embedding and output: one split product together.
    if mesh.tensor > 1:
        rows_sent = cost.tensor_bytes(here, config.dim, mesh.tensor, splits=1, size=size)
        demand += Demand(
            collectives=(Collective("tensor", "all_reduce", mesh.tensor, 2, rows_sent),)
        )
    return demand


def _spread(parameter: nn.Parameter, mesh: Mesh) -> int:
    return mesh.expert if is_expert(parameter) else 1


def _update_demand(
    dense: int, experts: int, mesh: Mesh, stage: int, accumulation: int, *, size: int
) -> Demand:
    """The average of gradients and Adam's update."""
    demand = Demand()
    for count, copies in ((dense, mesh.replicas), (experts, mesh.expert_data)):
        updated = count / (copies if stage >= 1 else 1)
        # Gradient, weight and two moments are read, weight and moments written, in 32 bits.
        demand += Demand(passes=7 * 4 * updated)
        if copies > 1 and count:
            sent = cost.gradient_bytes(count, copies, size=size)
            if stage == 3:
                # Weights are gathered for the forward and the backward of each micro-batch.
                sent *= (1 + 2 * accumulation) / 2
            buckets = -(-sent // 500e6)
            demand += Demand(
                collectives=(Collective("data", "all_reduce", mesh.world, buckets, sent),)
            )
    return demand


def activation_numbers(config: DecoderConfig, mesh: Mesh, tokens: int) -> float:
    """Numbers that the forward of a micro-batch keeps on one rank for its backward.

    A layer keeps, for each token that it computes, the input of both norms, the normed rows (a
    fused norm keeps none) and those times the weight, which tensor ranks hold for all tokens;
    inside the split products queries, keys, values and their result, and four rows of feed-forward
    width. A router keeps its input, which
    is every token. Under recomputation only each layer's input stays. The last norm and the
    softmax of the logits come on top. A flash kernel for attention is assumed, without scores.
    """
    head = _head_width(config)
    inside = (2 * config.num_heads + 2 * config.kv_heads) * head + 4 * _ffn_rows(config)
    here = tokens / mesh.context
    outside_tokens = here / mesh.tensor if mesh.sequence_parallel else here
    total = 0.0
    for share in _shares(config):
        if config.recompute:
            total += outside_tokens * config.dim
            continue
        total += share * (4 * config.dim * outside_tokens + inside * here / mesh.tensor)
        total += share * 2 * config.dim * here
        total += outside_tokens * config.dim if share < 1 else 0
    total += 3 * outside_tokens * config.dim
    return total + here * config.vocab_size / mesh.tensor


def candidates(config: RunConfig, gpus: int) -> Iterator[Mesh]:
    """Every mesh of powers of two that the model's sizes allow."""
    model = config.model
    experts = [method.expert_axis[0] for method in model.methods if method.expert_axis[0]]
    way = config.parallel.context_attention
    powers = [1 << n for n in range(gpus.bit_length())]
    for tensor in (n for n in powers if n <= 8 and model.kv_heads % n == 0):
        for context in powers:
            if context > 1 and config.data.seq_len < 4096:
                continue
            if way == "ulysses" and model.num_heads // tensor % context:
                continue
            for expert in powers if experts else [1]:
                if any(number % expert for number in experts):
                    continue
                try:
                    axes = {"tensor": tensor, "context": context, "expert": expert}
                    yield mesh_of(gpus, {**axes, "context_attention": way})
                except BadInput:
                    continue


def table(plans: list[Plan], machine: Machine) -> str:
    """Meshes that fit first, fastest first."""
    limit = machine.memory
    plans = sorted(plans, key=lambda p: (p.memory > limit, p.seconds))
    lines = [
        f"{'mesh':<44} {'ZeRO':>4} {'micro':>5} {'state':>8} {'activ.':>8} {'memory':>8} "
        f"{'sent':>9} {'compute':>8} {'commun.':>8} {'step':>8}"
    ]
    for one in plans:
        sizes = [("data", one.mesh.data), ("tensor", one.mesh.tensor)]
        sizes += [("context", one.mesh.context), ("expert", one.mesh.expert)]
        name = ",".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "data=1"
        name += ",sequence_parallel" if one.mesh.sequence_parallel else ""
        name += ",ring" if one.mesh.ring else ""
        verdict = "" if one.memory <= limit else f"  does not fit in {limit / 1e9:g} GB"
        lines.append(
            f"{name:<44} {one.zero_stage:>4} {one.micro_batch:>5} {one.state / 1e9:>6.1f}GB "
            f"{one.activations / 1e9:>6.1f}GB {one.memory / 1e9:>6.1f}GB "
            f"{sum(one.sent.values()) / 1e9:>7.2f}GB {one.compute:>7.3f}s "
            f"{one.communication:>7.3f}s {one.seconds:>7.3f}s{verdict}"
        )
    return "\n".join(lines)


def mesh_of(gpus: int, given: Mapping[str, Any]) -> Mesh:
    axes = {name: int(given.get(name, 1)) for name in ("tensor", "context", "expert")}
    asked = given.get("data")
    try:
        data = data_degree(gpus, **axes, data=None if asked is None else int(asked))
    except ValueError as error:
        raise BadInput(str(error)) from None
    # Splitting tokens costs the same bytes and saves memory, so it is on where it can be.
    splits = axes["tensor"] > 1
    return Mesh(
        data=data,
        **axes,
        sequence_parallel=bool(given.get("sequence_parallel", splits)),
        context_attention=given.get("context_attention", "ulysses"),
    )


def _shares(config: DecoderConfig) -> list[float]:
    """Share of the tokens that each layer computes."""
    count = config.num_layers
    around = [method for method in config.methods if method.place in ("layer", "stack")]
    return [math.prod(m.share(layer, count) for m in around) for layer in range(count)]


def _head_width(config: DecoderConfig) -> int:
    return config.dim // config.num_heads if config.head_dim is None else config.head_dim


def _ffn_rows(config: DecoderConfig) -> int:
    rows = config.ffn_width
    for method in config.methods:
        rows = method.ffn_rows(rows)
    return rows


def _state_bytes(dense: int, experts: int, mesh: Mesh, stage: int, *, mixed: bool) -> float:
    weights, optimizer = (2, 12) if mixed else (4, 8)
    total = 0.0
    for count, copies in ((dense, mesh.replicas), (experts, mesh.expert_data)):
        per_number = weights / (copies if stage == 3 else 1)
        per_number += weights / (copies if stage >= 2 else 1)
        per_number += optimizer / (copies if stage >= 1 else 1)
        total += count * per_number
    return total
