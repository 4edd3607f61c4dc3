"""Segments: a decoder's middle layers compute one row for each stretch of text, not each byte.

Shape legend: B sequences, T tokens, G closed segments, P places of the middle, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.protocol import Method, Place, RoutedBlock, StackContext
from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.merge import merge, unmerge
from adaptive.ops.rms_norm import rms_norm
from adaptive.routing.boundaries import (
    BoundaryLoss,
    boundary_loss,
    ends_before,
    lead_bytes,
    segments_of,
    stride_ends,
    word_ends,
)
from adaptive.routing.grouping import Grouping
from adaptive.routing.gumbel import GumbelSchedule, straight_through
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide
from adaptive.routing.tape import AuxiliaryLoss, RoutingRecord, current_tape
from parallel.autocast import without_autocast
from parallel.draws import draw_own_rows
from parallel.mesh import Mesh

Boundaries = Literal["learned", "stride", "words"]
Layers = Callable[[Tensor, TokenLayout, int, int], Tensor]
"""(hidden, layout, first, last) -> hidden after the layers from `first` up to but not `last`."""


@dataclass(frozen=True)
class Script:
    """Bytes that segments are made of in their own way, where texts are UTF-8.

    Attributes:
        first, last: a character is of the script if its first byte is one of these (0xD0 to 0xD3:
            Cyrillic; 0xE0: the scripts of India).
        prior: share of its bytes that should end a segment.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    first: int
    last: int
    prior: float

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= 255:
            raise ValueError(f"first={self.first}, last={self.last}: must be 0 to 255, in order")
        if not 0 < self.prior < 1:
            raise ValueError(f"prior={self.prior}: must be above 0 and below 1")


class SegmentState(NamedTuple):
    """What of a text is kept between calls: nothing of a closed segment but what it became.

    Attributes:
        read: [B, D], what the middle made of the last closed segment (first of the null one).
        total: [B, D], sum over the tokens of the open segment.
        length: [B], how many they are.
        rows: int64 [B], rows that the middle has computed.
        lead: int64 [B], the byte that began the character of the last token (scripts).
    """

    read: Tensor
    total: Tensor
    length: Tensor
    rows: Tensor
    lead: Tensor | None = None


class Segments(ExactBuffers, RoutedBlock):
    """The way of a decoder's tokens where its middle works on segments.

    The first layers compute every token. A token may end a segment, its own: the mean of the
    segment's tokens, normed, is a row of the middle layers, which attend among such rows. Every
    token then adds what the middle made of the last segment that has ended with it or before it,
    and the last layers compute every token again. Before the first end it reads a learned row that
    stands before all. So no token reads of a later one, and what is generated token by token is
    what the whole text gives.

    Rows of the middle stand at the position of their segment's last token; the learned one at -1.

    Args:
        dim: width D.
        before, after: layers of all tokens, ahead of the middle and behind it.
        num_layers: of the decoder.
        boundaries: "learned": a gate on what the first layers give; "stride": every so many tokens;
            "words": at white space, of UTF-8 bytes.
        prior: share of the tokens that should end a segment (learned), or is expected to (words).
        scripts: with a score of the gate and a prior of their own, of "learned"; other bytes have
            `prior`. Of several that hold a byte, the first.
        stride: tokens of a segment.
        schedule: temperature and noise of the relaxed Bernoulli draw over training steps; at noise
            0 training ends segments where evaluation does.
        loss, slack, coefficient: see `boundary_loss`; of "learned".
        std: of initial weights.
        eps: of the norm of means.
        mesh: how the ranks share the model.

    In training the gate's ends are drawn; in evaluation a token ends a segment where its logit is
    above `threshold`, 0 (the likelier) until `adaptive.blocks.calibration.calibrate` sets it so
    that a share of `prior` do. Public code draws there too, and gives another answer each time.

    Sources: dynamic pooling, arXiv 2211.09761; MAGNET, arXiv 2407.08818; FLEXITOKENS,
    arXiv 2507.12720; words: arXiv 2501.10322.
    """

    kind = "segments"
    exact_buffers = ("threshold", "priors")  # of logits, which are float32
    threshold: Tensor
    script_of: Tensor
    priors: Tensor

    def __init__(
        self,
        dim: int,
        *,
        before: int,
        after: int,
        num_layers: int,
        boundaries: Boundaries = "learned",
        prior: float = 0.2,
        scripts: tuple[Script, ...] | list[Script] = (),
        stride: int = 5,
        schedule: GumbelSchedule | None = None,
        loss: BoundaryLoss = "binomial",
        slack: float = 0.0,
        coefficient: float = 1.0,
        std: float = 0.02,
        eps: float = 1e-6,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        mesh = Mesh.single() if mesh is None else mesh
        if mesh.sequence_parallel or mesh.context > 1:
            raise ValueError(
                f"sequence_parallel={mesh.sequence_parallel}, context={mesh.context}: must be "
                "False and 1, the tokens of a segment lie on one rank"
            )
        self.mesh, self.dim, self.eps = mesh, dim, eps
        self.first, self.last = before, num_layers - after
        self.num_layers, self.boundaries = num_layers, boundaries
        self.prior, self.stride = prior, stride
        self.schedule = GumbelSchedule(0.5) if schedule is None else schedule
        self.temperature, self.noise = self.schedule.at(0)
        self.loss, self.slack, self.coefficient = loss, slack, coefficient
        self.null = nn.Parameter(torch.empty(1, dim))
        nn.init.normal_(self.null, std=std)
        self.norm_weight = nn.Parameter(torch.ones(dim))
        priors = [prior, *(script.prior for script in scripts)]
        self.gate = BoundaryGate(dim, priors=priors, std=std) if boundaries == "learned" else None
        # Of each first byte its script, 0 where it has none; they follow the model's device.
        script_of = torch.zeros(256, dtype=torch.int64)
        for number, script in reversed(list(enumerate(scripts, 1))):
            script_of[script.first : script.last + 1] = number
        self.scripts = len(scripts)
        self.register_buffer("script_of", script_of, persistent=False)
        self.register_buffer("priors", torch.tensor(priors), persistent=False)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(
        self,
        hidden_TD: Tensor,
        ids_T: Tensor,
        *,
        layout: TokenLayout,
        layers: Layers,
        state: SegmentState | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, SegmentState | None]:
        """All layers of the decoder.

        Args:
            hidden_TD: [T, D], embedded tokens.
            ids_T: int64 [T], which tokens they are (for words).
            layout: of the tokens; behind earlier ones, with their positions in the whole text.
            layers: runs some of them.
            state: of the tokens before these; None: they are the first.
            keep: return the state behind them.
        """
        hidden_TD = layers(hidden_TD, layout, 0, self.first)
        lead_T = script_T = None
        if self.scripts:
            lead_T = lead_bytes(ids_T, layout, None if state is None else state.lead)
            script_T = self.script_of[lead_T.clamp(max=255)]  # ids beyond bytes: no script
        soft_T, logits_T = self._ends(hidden_TD, ids_T, layout, script_T)
        ends_T = soft_T.detach() > 0
        grouping = segments_of(ends_T, layout, soft_T if soft_T.requires_grad else None)
        pooled_GD = merge(hidden_TD, None, grouping)
        if state is not None:
            pooled_GD = _with_open(pooled_GD, grouping, state)
        normed_GD = rms_norm(pooled_GD, self.norm_weight.to(pooled_GD.dtype), self.eps)
        rows = decide(lambda: _rows(grouping, ends_T, layout, state))
        front_BD = self.null.to(hidden_TD.dtype).expand(layout.batch_size, -1)
        table_PD = normed_GD
        if state is None:
            table_PD = torch.cat([front_BD, normed_GD]).index_select(0, rows.order)
        table_PD = layers(table_PD, rows.layout, self.first, self.last)
        if state is not None:
            table_PD = torch.cat([state.read, table_PD]).index_select(0, rows.order)
        out_TD = hidden_TD + unmerge(table_PD, rows.reading)
        self._record(layout, rows, grouping, soft_T, logits_T, ends_T, script_T)
        out_TD = layers(out_TD, layout, self.last, self.num_layers)
        if not keep:
            return out_TD, None
        after = _state(hidden_TD, table_PD, grouping, rows, layout, state)
        if lead_T is not None:
            after = after._replace(lead=_last_leads(lead_T, layout, state))
        return out_TD, after

    def start_step(self, step: int) -> None:
        """Set temperature and noise of a training step. The training loop calls it."""
        self.temperature, self.noise = self.schedule.at(step)

    def inside(self, count: FlopCounter, work: Work) -> Work:
        """The work of the middle, for the work of the decoder."""
        rows_B = work.tokens * self.share + 1
        planned = Work(rows_B, rows_B, rows_B, work.sequences)
        return count.chosen(self, planned=planned, dense=work)

    @property
    def decides(self) -> nn.Module | None:
        return self.gate

    @property
    def capacity(self) -> float:
        """Share of the tokens that `calibrate` makes end a segment."""
        return self.prior

    @property
    def share(self) -> float:
        """Planned share of the tokens that end a segment."""
        return 1 / self.stride if self.boundaries == "stride" else self.prior

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The gate; layers are counted by the decoder, those of the middle by `inside`."""
        count.routing(self.gate, work)

    def _ends(
        self, hidden_TD: Tensor, ids_T: Tensor, layout: TokenLayout, script_T: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """float [T], 1 where a segment ends, with the gate's gradient; and the gate's logits."""
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        if self.boundaries == "stride":
            return stride_ends(layout, self.stride).to(wide), None
        if self.boundaries == "words":
            return word_ends(ids_T).to(wide), None
        assert self.gate is not None
        logits_T = self.gate(hidden_TD, script_T)
        noisy_T = logits_T
        if not self.training:
            noisy_T = logits_T - self.threshold
        elif self.noise:
            noisy_T = logits_T + self.noise * decide(lambda: self._noise(logits_T))
        ends_T = decide(lambda: noisy_T > 0)
        soft_T = (noisy_T / self.temperature).sigmoid()
        return straight_through(ends_T, soft_T), logits_T.detach()

    def _noise(self, logits_T: Tensor) -> Tensor:
        """Logistic, of this rank's tokens: with it an end has the gate's probability."""

        def draw(tokens: int) -> Tensor:
            uniform = torch.rand(tokens, device=logits_T.device, dtype=logits_T.dtype)
            tiny = torch.finfo(logits_T.dtype).tiny
            return uniform.clamp(min=tiny, max=1 - torch.finfo(logits_T.dtype).eps).logit()

        return draw_own_rows(draw, logits_T.shape[0], self.mesh)

    def _record(
        self,
        layout: TokenLayout,
        rows: _Rows,
        grouping: Grouping,
        soft_T: Tensor,
        logits_T: Tensor | None,
        ends_T: Tensor,
        script_T: Tensor | None,
    ) -> None:
        tape = current_tape()
        if tape is None:
            return
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=layout.tokens,
            executed=rows.layout.tokens,
            executed_lengths=rows.layout.cu_seqlens.diff(),
            key_lengths=rows.held,
            planned_share=None if self.boundaries == "words" else self.share,
            chosen=ends_T,
            scores=logits_T,
        )
        losses = {}
        if logits_T is not None:
            total = boundary_loss(
                soft_T,
                layout,
                prior=self.priors if self.scripts else self.prior,
                kind=self.loss,
                slack=self.slack,
                script_T=script_T,
            )
            share = tape.scope.share_of(total, layout.tokens)
            losses["boundaries"] = AuxiliaryLoss(share, self.coefficient)
            probability_T = logits_T.sigmoid()
            record.entropy = F.binary_cross_entropy(probability_T, probability_T)
        if grouping.groups:
            record.statistics["longest_segment"] = grouping.sizes.amax()
            record.statistics["mean_segment"] = grouping.sizes.mean()
        tape.record(self, record, losses)


class BoundaryGate(nn.Module):
    """The logit of a token's ending a segment, float32 (float64 stays): hidden [T, D] -> [T].

    A perceptron of width D on the normed token; at first it says its prior of every token. Each of
    K scripts has an output of its own.
    """

    def __init__(self, dim: int, *, priors: Sequence[float], std: float) -> None:
        super().__init__()
        self.dim = dim
        self.hidden, self.score = WideLinear(dim, dim), WideLinear(dim, len(priors))
        for part in (self.hidden, self.score):
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
        with torch.no_grad():
            for number, prior in enumerate(priors):
                self.score.bias[number].fill_(math.log(prior / (1 - prior)))

    def forward(self, hidden_TD: Tensor, script_T: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        with without_autocast(hidden_TD.device.type):
            normed_TD = F.layer_norm(hidden_TD.to(wide), (self.dim,))
            logits_TK: Tensor = self.score(F.gelu(self.hidden(normed_TD)))
        if script_T is None:
            return logits_TK.squeeze(-1)
        return logits_TK.gather(1, script_T[:, None]).squeeze(1)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        count(self.hidden, work)
        count(self.score, work)


class WideLinear(nn.Linear):
    """In its input's dtype; called, not read from, so that ZeRO 3 brings its weights."""

    def forward(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight.to(x_TI.dtype), self.bias.to(x_TI.dtype))


class _Rows(NamedTuple):
    """Where what lies in the middle.

    Attributes:
        layout: of the rows that the middle computes.
        order: int64 [B + G], the table that tokens read from: of each sequence the row that it read
            before, then its segments; as rows of [those read before; all segments].
        reading: a Grouping of the tokens by the row of the table that each reads.
        held: int64 [B], rows of the middle so far.
    """

    layout: TokenLayout
    order: Tensor
    reading: Grouping
    held: Tensor


def _rows(
    grouping: Grouping, ends_T: Tensor, layout: TokenLayout, state: SegmentState | None
) -> _Rows:
    batch, device = layout.batch_size, ends_T.device
    sequences_B = torch.arange(batch, device=device)
    starts_B = grouping.cu_seqlens[:-1].long() + sequences_B
    front = torch.zeros(batch + grouping.groups, dtype=torch.bool, device=device)
    front = front.index_fill(0, starts_B, True)
    order = torch.where(front, front.cumsum(0) - 1, batch + (~front).cumsum(0) - 1)
    read_T = starts_B[layout.sequence_ids] + ends_before(ends_T, layout)
    positions = torch.cat([torch.full_like(sequences_B, -1), grouping.positions])[order]
    closed_B = grouping.cu_seqlens.diff().long()
    longest = grouping.layout.max_seqlen
    cu_seqlens = grouping.cu_seqlens + torch.arange(batch + 1, device=device, dtype=torch.int32)
    table = TokenLayout(cu_seqlens, longest + 1, positions)
    sizes = torch.ones(len(order), device=device)
    reading = Grouping(read_T, sizes, cu_seqlens, positions, longest + 1, complete=True)
    if state is None:
        return _Rows(table, order, reading, closed_B + 1)
    return _Rows(grouping.layout, order, reading, state.rows + closed_B)


def _with_open(pooled_GD: Tensor, grouping: Grouping, state: SegmentState) -> Tensor:
    """The means, those of first segments with the tokens that were there before."""
    closing = grouping.cu_seqlens.diff() > 0
    first = grouping.cu_seqlens[:-1].long()[closing]
    here = grouping.sizes[first, None]
    total, length = state.total[closing], state.length[closing, None]
    mean = (pooled_GD[first].to(total.dtype) * here + total) / (here + length)
    return pooled_GD.index_copy(0, first, mean.to(pooled_GD.dtype))


def _state(
    hidden_TD: Tensor,
    table_PD: Tensor,
    grouping: Grouping,
    rows: _Rows,
    layout: TokenLayout,
    before: SegmentState | None,
) -> SegmentState:
    """Behind these tokens."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    open_T = grouping.group < 0
    total = torch.zeros(layout.batch_size, hidden_TD.shape[1], dtype=wide, device=open_T.device)
    sequences = layout.sequence_ids[open_T]
    total = total.index_add(0, sequences, hidden_TD[open_T].to(wide))
    count = torch.zeros(layout.batch_size, device=open_T.device, dtype=wide)
    count = count.index_add(0, sequences, torch.ones_like(sequences, dtype=wide))
    if before is not None:
        stays = (grouping.cu_seqlens.diff() == 0).to(wide)
        total, count = total + before.total * stays[:, None], count + before.length * stays
    ends_B = grouping.cu_seqlens[1:].long() + torch.arange(layout.batch_size, device=open_T.device)
    return SegmentState(table_PD[ends_B], total, count, rows.held)


def _last_leads(lead_T: Tensor, layout: TokenLayout, before: SegmentState | None) -> Tensor:
    """int64 [B]: of each sequence's last token; of one without tokens what it was."""
    last_B = (layout.cu_seqlens[1:].long() - 1).clamp(min=0)
    old_B = torch.zeros_like(last_B) if before is None or before.lead is None else before.lead
    return torch.where(layout.cu_seqlens.diff() > 0, lead_T[last_B], old_B)


@dataclass(frozen=True)
class SegmentsConfig(Method):
    """Middle layers compute segments of the text (dynamic pooling, FLEXITOKENS, words).

    Attributes:
        before, after: layers that compute every token, ahead of the middle and behind it.
        boundaries, prior, scripts, stride, schedule, loss, slack, coefficient: see `Segments`.
    """

    name: ClassVar[str] = "segments"
    place: ClassVar[Place] = "stack"
    blocks: ClassVar[tuple[type[nn.Module], ...]] = (Segments,)
    # Layers that route among themselves would count a segment as one token of the text.
    excludes: ClassVar[tuple[str, ...]] = ("layer",)

    before: int = 1
    after: int = 1
    boundaries: Boundaries = "learned"
    prior: float = 0.2
    scripts: list[Script] = field(default_factory=list)
    stride: int = 5
    schedule: GumbelSchedule = field(default_factory=partial(GumbelSchedule, 0.5))
    loss: BoundaryLoss = "binomial"
    slack: float = 0.0
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        for name, kind in (("boundaries", Boundaries), ("loss", BoundaryLoss)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}"
                )
        if not 0 < self.prior < 1:
            raise ValueError(f"prior={self.prior}: must be above 0 and below 1")
        if self.scripts and self.boundaries != "learned":
            raise ValueError(f"scripts: must be empty with boundaries={self.boundaries}")
        for script in self.scripts:
            if self.slack > script.prior:
                raise ValueError(f"slack={self.slack}: must be at most a script's {script.prior}")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride}: must be at least 1")
        if not 0 <= self.slack <= self.prior:
            raise ValueError(f"slack={self.slack}: must be between 0 and prior={self.prior}")
        if not self.coefficient >= 0:
            raise ValueError(f"coefficient={self.coefficient}: must be 0 or more")

    def routed_layers(self, num_layers: int) -> list[int]:
        """The layers of the middle."""
        middle = list(range(self.before, num_layers - self.after))
        if not middle:
            raise ValueError(
                f"before={self.before}, after={self.after}: leave none of {num_layers} layers to "
                "compute segments"
            )
        return middle

    def share(self, layer: int, num_layers: int) -> float:
        if layer not in self.routed_layers(num_layers):
            return 1.0
        return 1 / self.stride if self.boundaries == "stride" else self.prior

    def build(self, context: StackContext, inner: None = None) -> Segments:
        """What runs the decoder's layers."""
        return Segments(
            context.dim,
            num_layers=context.num_layers,
            std=context.std,
            eps=context.eps,
            mesh=context.mesh,
            **self.options(),
        )
