"""Seconds of a step, from what each rank does and what its machine can.

A `Demand` is what one rank does: operations of products and of attention, bytes of element-wise
passes, operators, collectives. `seconds` divides it by a machine's rates:

    products / rate + attention / rate + passes / rate + operators · issue      (a CPU: the sum)
    max(products / rate + attention / rate + passes / rate, operators · issue)  (a GPU issues ahead)

times the ranks that share a core, plus for every collective its latency and its bytes over the
link's bandwidth. Nothing overlaps: neither gradients with the backward nor a ring's messages with
its products. An upper bound where they do.

Shape legend: T tokens of one micro-batch (of all tensor and context ranks together), D width,
H and G query and key-value heads of width h, F feed-forward width, c share of tokens that a layer
computes, n ranks of an axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from adaptive.flops import FlopCounter, Work
from launch.planning.machines import Machine
from parallel import cost
from parallel.mesh import Mesh
from parallel.ring.attention import cheaper_scheme
from parallel.ring.order import moved_share


@dataclass(frozen=True)
class Collective:
    """`count` collectives of one kind over an axis whose groups lie within `span` consecutive
    ranks."""

    axis: str
    operation: str
    span: int
    count: float
    sent: float


@dataclass(frozen=True)
class Demand:
    """What one rank does.

    Attributes:
        products, attention: operations, those that are executed.
        passes: bytes that element-wise work reads and writes.
        operators: issued, views included.
        collectives: with the bytes that this rank sends.
    """

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    operators: float = 0.0
    collectives: tuple[Collective, ...] = ()

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.products + other.products,
            self.attention + other.attention,
            self.passes + other.passes,
            self.operators + other.operators,
            self.collectives + other.collectives,
        )

    def times(self, factor: float) -> Demand:
        repeated = (
            replace(c, count=factor * c.count, sent=factor * c.sent) for c in self.collectives
        )
        return Demand(
            factor * self.products,
            factor * self.attention,
            factor * self.passes,
            factor * self.operators,
            tuple(repeated),
        )


@dataclass(frozen=True)
class Seconds:
    """Of one rank: its own work, and its collectives."""

    compute: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.communication


def seconds(demand: Demand, machine: Machine, *, ranks: int) -> Seconds:
    """How long one of `ranks` ranks takes."""
    device = demand.products / machine.products + demand.attention / machine.attention
    device += demand.passes / machine.passes
    issued = demand.operators * machine.operator
    compute = max(device, issued) if machine.asynchronous else device + issued
    communication = sum(
        machine.link(c.operation, c.span).seconds(c.sent, c.count) for c in demand.collectives
    )
    return Seconds(compute * machine.ranks_per_core(ranks), communication)


def operations(
    model: nn.Module, work: Work, *, causal_share: float = 1.0, backward: bool = True
) -> tuple[float, float]:
    """Operations of products and of attention of a whole model, recomputation included.

    Args:
        model: any module that says what it computes (`adaptive.flops`).
        work: the tokens.
        causal_share: what attention executes of the square that `adaptive.flops` counts.
        backward: count the backward pass too.
    """
    found = []
    for counter in (_WithoutAttention(), FlopCounter()):
        counter(model, work)
        flops = counter.total()
        one = float(flops.forward)
        found.append(one + float(flops.backward) + float(flops.repeated) if backward else one)
    products, everything = found
    return products, (everything - products) * causal_share


class _WithoutAttention(FlopCounter):
    def attention(self, heads: int, head_dim: int, work: Work) -> None:
        pass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer: D, H, G, h, F (rows of feed-forward width a token), c."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    share: float = 1.0
    top_k: int = 0


def layer_passes(shape: LayerShape, tokens: float, mesh: Mesh, *, size: int) -> float:
    """Bytes that the element-wise work of a layer touches on one rank, forward and backward.

    Numbers a token: outside split products 60 D (norms, residuals), inside 38 H h (rotary) and
    14 F (SiLU times up); a routed layer packs and combines, 24 D of a chosen token and 14 D of any.
    Counted from what runs on a CPU (tests/launch/test_step_time.py); fused kernels
    touch less.
    """
    here = tokens / mesh.context
    outside = here / mesh.tensor if mesh.sequence_parallel else here
    inside = 38 * shape.heads * shape.head_dim + 14 * shape.ffn_dim
    numbers = shape.share * (60 * shape.dim * outside + inside * here / mesh.tensor)
    if shape.share < 1:
        numbers += (24 * shape.share + 14) * shape.dim * outside
    return numbers * size


def weight_passes(weights: float, *, size: int) -> float:
    """Bytes that the weights of a rank and their gradients are touched with for one micro-batch:
    products read and write three times, the sum of gradients three more."""
    return 6 * weights * size


def layer_operators(shape: LayerShape) -> float:
    """Operators that a layer issues, forward and backward, views included; fewer where products
    are not oneDNN's."""
    return 235 + (50 if shape.share < 1 else 0) + (60 if shape.top_k else 0)


def layer_collectives(
    shape: LayerShape, rows: int, seq_len: int, mesh: Mesh, *, size: int
) -> tuple[Collective, ...]:
    """What a layer sends in one forward and backward; bytes are those of `parallel.cost`.

    Every sequence has as many chosen tokens, so that they lie evenly where each rank holds whole
    sequences.
    """
    tokens, sequences = rows * seq_len, rows
    routed, here = shape.share < 1, tokens / mesh.context
    uneven = routed and rows % mesh.shards > 0
    # The ranks of a tensor group are consecutive, those of a context group lie `tensor` apart.
    found: list[Collective] = []
    if mesh.tensor > 1:
        span = mesh.tensor
        rows = cost.tensor_bytes(here, shape.dim, span, share=shape.share, size=size)
        if not mesh.sequence_parallel:
            found.append(Collective("tensor", "all_reduce", span, 4, rows))
        else:
            # Uneven gathers and scatters go as all-to-all; context ranks even chosen rows out.
            kinds = (
                ("all_to_all",) * 2
                if uneven and mesh.context == 1
                else ("all_gather", "reduce_scatter")
            )
            found += [Collective("tensor", kind, span, 4, rows / 2) for kind in kinds]
            numbers = cost.replicated_bytes((3 if routed else 2) * shape.dim, span, size=size)
            found.append(Collective("tensor", "all_reduce", span, 3 if routed else 2, numbers))
    if mesh.context > 1:
        span = mesh.context * mesh.tensor
        heads = (shape.heads / mesh.tensor, shape.kv_heads / mesh.tensor)
        sizes = (tokens, *heads, shape.head_dim)
        exchanged = cost.context_bytes(mesh, *sizes, share=shape.share, size=size)
        exchanges = 4
        if mesh.ring:
            scheme = cheaper_scheme(*heads, shape.head_dim, mesh.context)
            messages = ring_messages(mesh.context, scheme)
            found.append(Collective("context", "send", span, messages, exchanged))
            moved = moved_share(sequences, round(shape.share * seq_len), mesh.context)
            exchanged = cost.zigzag_bytes(
                *sizes, mesh.context, moved=moved, share=shape.share, size=size
            )
            exchanges = 4 if moved else 0
        # Evening out chosen rows: there and back; how many move depends on the choice.
        exchanges += 4 if uneven else 0
        if exchanges:
            found.append(Collective("context", "all_to_all", span, exchanges, exchanged))
    if routed and mesh.shards > 1:
        span = mesh.context * mesh.tensor
        axis = "tensor" if mesh.sequence_parallel else "context"
        scores = cost.score_bytes(tokens, mesh.shards)
        found.append(Collective(axis, "all_gather", span, 1, scores))
    if shape.top_k and mesh.expert > 1:
        span = mesh.expert * mesh.context * mesh.tensor
        rows = cost.expert_bytes(
            shape.share * here, shape.dim, mesh.expert, top_k=shape.top_k, size=size
        )
        # Rows out and back, twice; before the first, how many.
        found.append(Collective("expert", "all_to_all", span, 5, rows))
    return tuple(found)


def layer_demand(
    shape: LayerShape,
    layer: nn.Module,
    *,
    rows: int,
    seq_len: int,
    mesh: Mesh,
    causal_share: float = 1.0,
    size: int = 4,
) -> Demand:
    """One rank's forward and backward of one layer.

    Args:
        shape: its sizes.
        layer: the module, built whole.
        rows, seq_len: of one micro-batch.
        mesh: sizes only.
        causal_share: of the machine.
        size: bytes of a number.
    """
    work = Work.dense(rows, seq_len)
    products, attention = operations(layer, work, causal_share=causal_share)
    ranks = mesh.tensor * mesh.context
    passes = layer_passes(shape, rows * seq_len, mesh, size=size)
    weights = sum(p.numel() for p in layer.parameters()) / mesh.tensor
    extra = ring_steps(shape, rows * seq_len, mesh, size=size)
    return extra + Demand(
        products / ranks,
        attention / ranks,
        passes + weight_passes(weights, size=size),
        layer_operators(shape),
        layer_collectives(shape, rows, seq_len, mesh, size=size),
    )


def ring_messages(ranks: int, scheme: str) -> int:
    """Messages that a rank sends in ring attention's forward and backward."""
    return 5 * (ranks - 1) if scheme == "queries" else 3 * ranks - 2


def ring_steps(shape: LayerShape, tokens: float, mesh: Mesh, *, size: int) -> Demand:
    """What ring attention does besides attention: at every step some 110 numbers of every channel
    are touched, as parts are sliced, merged and summed."""
    if not mesh.ring:
        return Demand()
    channels = shape.share * tokens * shape.heads / mesh.tensor * shape.head_dim
    return Demand(passes=110 * channels * size, operators=250 * mesh.context)


def ring_demand(
    *,
    pairs: float,
    tokens: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ranks: int,
    scheme: str,
    size: int = 4,
) -> Demand:
    """Ring attention, forward and backward, of the rank with most query-key pairs.

    Forward two products of every pair, backward five.
    """
    sent = cost.ring_bytes(tokens, heads, kv_heads, head_dim, ranks, scheme=scheme, size=size)
    shape = LayerShape(heads * head_dim, heads, kv_heads, head_dim, 0)
    mesh = Mesh(context=ranks, context_attention="ring")
    return ring_steps(shape, tokens, mesh, size=size) + Demand(
        attention=7 * 2 * heads * head_dim * pairs,
        collectives=(Collective("context", "send", ranks, ring_messages(ranks, scheme), sent),),
    )
