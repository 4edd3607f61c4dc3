"""DeleteGate: early in a decoder tokens leave it for good, and come back ahead of its last layers.

Shape legend: B sequences, T tokens, R tokens that are kept, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.protocol import Method, Place, RoutedBlock, StackContext
from adaptive.blocks.segments import WideLinear
from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import combine, pack
from adaptive.routing.gumbel import straight_through
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide, recomputing
from adaptive.routing.selection import Selection
from adaptive.routing.tape import AuxiliaryLoss, RoutingRecord, current_tape
from parallel.autocast import without_autocast
from parallel.mesh import Mesh

Layers = Callable[..., Tensor]
"""(hidden, layout, first, last, key_bias=None) -> hidden after those layers."""

_FIRST_BIAS = 1.0  # of the gate: at first it keeps


class DeleteGate(ExactBuffers, RoutedBlock):
    """The way of a decoder's tokens where a gate deletes some of them for the middle layers.

    The first layers compute every token. A gate on each then says, for the rest of the middle, who
    stays: `G = depth σ(-logit)` is near 0 for who stays and near `depth` for who goes. The middle
    computes those that stay, which attend among themselves at their own positions; the others pass
    by. The last layers compute every token. A token's gate sees what it has seen, and nobody waits
    for a later one: the decoder stays causal.

    Soft, in training: the middle computes every token and G is added to every score of a deleted
    key, so that the gate learns what the key was worth. Hard, in evaluation and in a share of the
    training steps: only those that stay are computed. Values of the two differ by the weight that
    `depth` leaves to deleted keys, at most e^(depth/2) of an equal score.

    The loss is `α · mean G`, and a proportional-integral controller sets α to hold the share of
    deleted tokens, of the global batch, up to `target`. α is 0 or more: where too many are deleted,
    the task alone brings them back (a price below 0, tried, swung between all and none).

    Args:
        dim: width D.
        before, after: layers of all tokens, ahead of the middle and behind it.
        num_layers: of the decoder.
        target, depth, hard_share, proportional, integral: see DeleteGateConfig.
        std: of initial weights.
        mesh: how the ranks share the model.

    Source: MrT5, arXiv 2410.20771, section 3, for encoders of byte-level T5.
    """

    kind = "delete_gate"
    exact_buffers = ("threshold", "quick", "slow")
    threshold: Tensor
    quick: Tensor
    slow: Tensor
    deleted: Tensor
    seen: Tensor

    def __init__(
        self,
        dim: int,
        *,
        before: int,
        after: int,
        num_layers: int,
        target: float = 0.5,
        depth: float = -10.0,
        hard_share: float = 0.0,
        proportional: float = 0.5,
        integral: float = 1e-5,
        std: float = 0.02,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        mesh = Mesh.single() if mesh is None else mesh
        if mesh.sequence_parallel or mesh.context > 1:
            raise ValueError(
                f"sequence_parallel={mesh.sequence_parallel}, context={mesh.context}: must be "
                "False and 1 with delete_gate, whose middle has another number of tokens"
            )
        self.mesh = mesh
        self.first, self.last, self.num_layers = before, num_layers - after, num_layers
        self.target, self.depth, self.hard_share = target, depth, hard_share
        self.proportional, self.integral = proportional, integral
        self.gate = KeepGate(dim, std=std)
        self.hard = False
        for name in ("threshold", "quick", "slow"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("deleted", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        hidden_TD: Tensor,
        ids_T: Tensor,
        *,
        layout: TokenLayout,
        layers: Layers,
        state: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """All layers of the decoder.

        Args:
            hidden_TD: [T, D], embedded tokens.
            ids_T: which they are; not looked at.
            layout: of the tokens, with their positions in the whole text.
            layers: runs some of them.
            state: int64 [B], rows of the middle that earlier tokens left; None: there are none.
            keep: return the state behind these.
        """
        hidden_TD = layers(hidden_TD, layout, 0, self.first)
        logits_T = self.gate(hidden_TD)
        limit = 0.0 if self.training else self.threshold
        stays_T = decide(lambda: logits_T.detach() > limit)
        gate_T = straight_through(stays_T, logits_T.sigmoid())
        if self.training and not self.hard:
            bias_T = _key_bias(logits_T, stays_T, self.depth)
            middle_TD = layers(hidden_TD, layout, self.first, self.last, key_bias=bias_T)
            # Of a token that goes, 0 times what the middle made of it: it keeps its value.
            update_TD = gate_T[:, None].to(hidden_TD.dtype) * (middle_TD - hidden_TD)
            out_TD = hidden_TD + update_TD
            lengths_B, rows_B = layout.cu_seqlens.diff(), None
        else:
            chosen = decide(lambda: Selection.from_mask(stays_T, layout))
            packed_RD = pack(hidden_TD, chosen.indices)
            middle_RD = layers(packed_RD, chosen.layout, self.first, self.last)
            gates_R = pack(gate_T, chosen.indices)
            out_TD = combine(hidden_TD, middle_RD - packed_RD, chosen.indices, gates_R)
            lengths_B = chosen.cu_seqlens.diff()
            rows_B = lengths_B.long() if state is None else state + lengths_B
        self._record(layout, lengths_B, None if state is None else rows_B, stays_T, logits_T)
        out_TD = layers(out_TD, layout, self.last, self.num_layers)
        return out_TD, rows_B if keep else None

    @torch.no_grad()
    def start_step(self, step: int) -> None:
        """Move α by what the step before deleted, and say whether this one computes less."""
        moved = self.target - self.deleted.double() / self.seen.clamp(min=1)
        moved = moved.float() * (self.seen > 0)
        self.quick.mul_(torch.where(self.seen > 0, 0.9, 1.0))
        self.quick.add_(0.1 * self.proportional * moved)
        self.slow.add_(self.integral * moved)
        self.deleted.zero_()
        self.seen.zero_()
        self.hard = int((step + 1) * self.hard_share) > int(step * self.hard_share)

    @property
    def price(self) -> Tensor:
        """α, float32 scalar."""
        return (self.quick + self.slow).clamp(min=0)

    @property
    def decides(self) -> nn.Module:
        return self.gate

    @property
    def capacity(self) -> float:
        """Share of the tokens that `calibrate` makes stay."""
        return 1 - self.target

    def inside(self, count: FlopCounter, work: Work) -> Work:
        """The work of the middle, for the work of the decoder."""
        return count.chosen(self, planned=work.share(self.capacity), dense=work)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The gate; layers are counted by the decoder, those of the middle by `inside`."""
        count.routing(self.gate, work)

    def _record(
        self,
        layout: TokenLayout,
        lengths_B: Tensor,
        held_B: Tensor | None,
        stays_T: Tensor,
        logits_T: Tensor,
    ) -> None:
        tape = current_tape()
        if tape is None:
            return
        counts = torch.stack([(~stays_T).sum(), stays_T.new_full((), 1).long() * layout.tokens])
        counts = tape.total(counts.double())
        if self.training and not tape.scope.counting and not recomputing():
            tape.when_done(partial(self._observe, counts))
        mean = (self.depth * (-logits_T).sigmoid()).sum()
        share = tape.scope.share_of(mean, layout.tokens) * self.price.detach()
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=layout.tokens,
            executed=lengths_B.sum(),
            executed_lengths=lengths_B,
            key_lengths=held_B,
            planned_share=self.capacity,
            chosen=stays_T,
            scores=logits_T.detach(),
        )
        record.statistics["deleted"] = counts[0] / counts[1].clamp(min=1)
        record.statistics["price"] = self.price.clone()
        tape.record(self, record, {"deletion": AuxiliaryLoss(share, 1.0)})

    @torch.no_grad()
    def _observe(self, counts_2: Tensor) -> None:
        self.deleted += counts_2[0].round().long()
        self.seen += counts_2[1].round().long()


def _key_bias(logits_T: Tensor, stays_T: Tensor, depth: float) -> Tensor:
    """G of keys that go; of those that stay 0, as evaluation has it, with the gradient of G."""
    bias_T = depth * (-logits_T).sigmoid()
    return straight_through(torch.where(stays_T, 0, bias_T.detach()), bias_T)


class KeepGate(nn.Module):
    """The logit of a token's staying, float32 (float64 stays): hidden [T, D] -> [T]."""

    def __init__(self, dim: int, *, std: float) -> None:
        super().__init__()
        self.dim = dim
        self.score = WideLinear(dim, 1)
        nn.init.normal_(self.score.weight, std=std)
        nn.init.constant_(self.score.bias, _FIRST_BIAS)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        with without_autocast(hidden_TD.device.type):
            logits_T1: Tensor = self.score(F.layer_norm(hidden_TD.to(wide), (self.dim,)))
        return logits_T1.squeeze(-1)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        count(self.score, work)


@dataclass(frozen=True)
class DeleteGateConfig(Method):
    """A learned gate deletes tokens for a decoder's middle layers (MrT5).

    Attributes:
        before, after: layers that compute every token, ahead of the middle and behind it.
        target: share of the tokens that should be deleted.
        depth: of the gate, below 0: what is added to every score of a deleted key in training.
        hard_share: share of the training steps that compute what is left only, as evaluation does;
            the gate then learns from those that stay alone.
        proportional, integral: gains of the controller of the loss's weight.
    """

    name: ClassVar[str] = "delete_gate"
    place: ClassVar[Place] = "stack"
    blocks: ClassVar[tuple[type[nn.Module], ...]] = (DeleteGate,)
    excludes: ClassVar[tuple[str, ...]] = ("layer", "stack")
    sees_every_token: ClassVar[bool] = False

    before: int = 1
    after: int = 1
    target: float = 0.5
    depth: float = -10.0
    hard_share: float = 0.0
    proportional: float = 0.5
    integral: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("before", "after", "proportional", "integral"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 < self.target < 1:
            raise ValueError(f"target={self.target}: must be above 0 and below 1")
        if not self.depth < 0:
            raise ValueError(f"depth={self.depth}: must be below 0")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share={self.hard_share}: must be in [0, 1]")

    def routed_layers(self, num_layers: int) -> list[int]:
        """The layers of the middle."""
        middle = list(range(self.before, num_layers - self.after))
        if not middle:
            raise ValueError(
                f"before={self.before}, after={self.after}: leave none of {num_layers} layers to "
                "delete tokens for"
            )
        return middle

    def share(self, layer: int, num_layers: int) -> float:
        return 1 - self.target if layer in self.routed_layers(num_layers) else 1.0

    def build(self, context: StackContext, inner: None = None) -> DeleteGate:
        """What runs the decoder's layers."""
        return DeleteGate(
            context.dim,
            num_layers=context.num_layers,
            std=context.std,
            mesh=context.mesh,
            **self.options(),
        )
