"""Early exits: at a few layers a token may leave, and no layer above computes it.

What left goes as it is to the model's last norm and its logits. Who is still there is known to all
layers above an exit, within one forward of the model (`Staying`).

Shape legend: T valid tokens, R tokens still there, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.method import LayerContext, Method, RoutedBlock
from adaptive.blocks.wrapping import flatten_tokens, held_keys, run_block
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import combine, pack
from adaptive.routing.density import DensityControl, DensityController
from adaptive.routing.forced import forced_choice
from adaptive.routing.gumbel import GumbelSchedule, gumbel_choice, soft_choice, straight_through
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide
from adaptive.routing.routers import LinearRouter
from adaptive.routing.schedules import listed_layers
from adaptive.routing.selection import Selection
from adaptive.routing.tape import (
    AuxiliaryLoss,
    RoutingRecord,
    RoutingTape,
    current_tape,
    masked_mean,
)

STAY = 1
"""Column of the router logits that means "stay"; column 0 means "leave"."""


class Staying:
    """Which tokens are still there, by exit, in the forward of a model that is under way.

    An exit writes what the layers up to the next one read. Gates carry the gradient to the routers
    of all exits so far. A copy, or what is pickled, is empty.
    """

    def __init__(self) -> None:
        self.gates: dict[int, Tensor] = {}

    def __reduce__(self) -> Any:
        return Staying, ()


class EarlyExit(RoutedBlock):
    """A layer at or above an exit: runs `block` for the tokens that are still there.

    At an exit, two logits of the layer-normed input say whether a token leaves or stays: a
    straight-through Gumbel-softmax in training, their argmax in evaluation; a router starts by
    letting all stay. `out = h + g · (block(h) - h)`, g in {0, 1} the product of the gates so far:
    the router of an exit learns from what every layer above adds to the tokens that stay
    (`<grad_out, block(h) - h>`), and from a penalty on (share that stays - density)². A token that
    leaves is the same, bit for bit, in all layers above.

    Args:
        block: maps hidden states to updated hidden states, residual included.
        dim: width D.
        exit: number of the last exit at or below this layer, from 0.
        density: target share of tokens that stay; None: no exit is at this layer.
        planned: share of the tokens that the layer is meant to compute.
        keys: what tokens that stay attend to: "all" tokens, of which those that left give keys of
            the state in which they left, or those "executing".
        density_coefficient: weight of the penalty.
        controller_gain: above 0, a `DensityController` with this gain holds the target as well.
        schedule: temperature and noise over training steps.

    Sources: tokens that leave and are carried up: CALM, arXiv 2207.07061, section 3; the gate:
    SkipLayer, arXiv 2311.15436, section 3. (CALM trains its classifiers apart from the model.)
    """

    kind = "early_exit"

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        *,
        exit: int,
        density: float | None,
        planned: float,
        keys: Literal["all", "executing"] = "executing",
        density_coefficient: float = 0.1,
        controller_gain: float = 0.0,
        schedule: GumbelSchedule | None = None,
    ) -> None:
        super().__init__()
        if keys == "all" and not getattr(block, "takes_queries", False):
            raise ValueError("keys='all': gives no keys to a cache; pass keys='executing'")
        self.block, self.keys = block, keys
        self.exit, self.planned = exit, planned
        self.staying = Staying()
        self.schedule = GumbelSchedule() if schedule is None else schedule
        self.temperature, self.noise = self.schedule.at(0)
        self.router: LinearRouter | None = None
        self.control: DensityControl | None = None
        if density is not None:
            self.path_costs = (0.0, 1.0)
            self.router = LinearRouter(dim, 2, bias=True)
            assert self.router.bias is not None
            nn.init.zeros_(self.router.weight)
            with torch.no_grad():
                self.router.bias[STAY] = 2.0  # 88% stay where noise draws
            held = DensityController(density, gain=controller_gain) if controller_gain else None
            self.control = DensityControl(density, coefficient=density_coefficient, controller=held)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
        **inner_kwargs: Any,
    ) -> Tensor:
        """Update the tokens that are still there.

        Args:
            hidden: [B, S, D], or packed [T, D] with `layout`.
            token_mask: bool, [B, S] or [T]; False at padding, which is never computed.
            layout: where packed tokens came from.
            inner_kwargs: handed to the block.

        Returns:
            The shape and dtype of `hidden`.
        """
        flat, layout, valid = flatten_tokens(hidden, layout, token_mask)
        if valid is None:
            return self._forward_packed(flat, layout, None, inner_kwargs).view_as(hidden)
        source_layout, mask = layout, valid
        present = decide(lambda: Selection.from_mask(mask, source_layout))
        hidden_TD = pack(flat, present.indices)
        out_TD = self._forward_packed(hidden_TD, present.layout, mask, inner_kwargs)
        return flat.index_copy(0, present.indices, out_TD).view_as(hidden)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The router for all tokens, the block for those that are still there."""
        count.routing(self.router, work)
        planned = work.queries(self.planned) if self.keys == "all" else work.share(self.planned)
        count(self.block, count.chosen(self, planned=planned, dense=work))

    def start_step(self, step: int) -> None:
        """Set temperature and noise of a training step."""
        self.temperature, self.noise = self.schedule.at(step)

    def _forward_packed(
        self, hidden_TD: Tensor, layout: TokenLayout, valid: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        logits_T2 = None
        if self.router is not None:
            logits_T2 = self.router(F.layer_norm(hidden_TD, hidden_TD.shape[-1:]))
            self.staying.gates[self.exit] = self._gates(logits_T2)
        gates_T = self.staying.gates[self.exit]
        staying = decide(lambda: Selection.from_mask(gates_T > 0, layout))
        packed_RD = pack(hidden_TD, staying.indices)
        if self.keys == "all":
            out_RD = self.block(hidden_TD, layout=layout, queries=staying, **kwargs)
        else:
            out_RD = run_block(self.block, packed_RD, staying.layout, **kwargs)
        gates_R = pack(gates_T, staying.indices)
        out_TD = combine(hidden_TD, out_RD - packed_RD, staying.indices, gates_R)
        tape = current_tape()
        if tape is not None:
            self._record(tape, staying, gates_T, logits_T2, valid, held_keys(kwargs))
        return out_TD

    def _gates(self, logits_T2: Tensor) -> Tensor:
        """[T]: 1 where a token stays at this exit and has at those before it, else 0."""
        noise = self.noise if self.training else 0.0
        choice = decide(lambda: gumbel_choice(logits_T2, noise=noise))
        forced_T = forced_choice(self, logits_T2.shape[0])
        stays_T = (choice.chosen if forced_T is None else forced_T) == STAY
        soft_T = soft_choice(logits_T2, choice.noise, temperature=self.temperature)[:, STAY]
        if self.exit:
            before_T = self.staying.gates[self.exit - 1]
            stays_T, soft_T = stays_T & (before_T > 0), soft_T * before_T
        return straight_through(stays_T, soft_T)

    def _record(
        self,
        tape: RoutingTape,
        staying: Selection,
        gates_T: Tensor,
        logits_T2: Tensor | None,
        valid: Tensor | None,
        held_B: Tensor | None,
    ) -> None:
        stays_T = chosen = gates_T.detach() > 0
        if valid is not None:
            chosen = torch.zeros_like(valid).masked_scatter_(valid, stays_T)
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=gates_T.shape[0],
            executed=staying.tokens,
            executed_lengths=staying.cu_seqlens.diff(),
            key_lengths=held_B,
            planned_share=self.planned,
            chosen=chosen,
        )
        losses: dict[str, AuxiliaryLoss] = {}
        if self.control is not None and logits_T2 is not None:
            probability_T2 = logits_T2.detach().softmax(-1)
            record.weights = probability_T2[:, STAY]
            record.entropy = masked_mean(torch.special.entr(probability_T2).sum(-1), None)
            record.weight_mean = masked_mean(record.weights, stays_T)
            losses, usage = self.control.losses(gates_T, tape, kind=self.kind)
            record.statistics = {"density": usage.density} | self.control.statistics()
        tape.record(self, record, losses)


@dataclass(frozen=True)
class EarlyExitConfig(Method):
    """Where tokens may leave a model of transformers.

    Attributes:
        density: target share of tokens that stay behind the last exit; behind earlier ones the
            target lies evenly between it and 1.
        layers: before which layers tokens may leave; None: those at a half and three quarters.
        keys, density_coefficient, controller_gain, schedule: see `EarlyExit`.
    """

    name = "early_exit"
    place = "layer"
    blocks = (EarlyExit,)
    sees_every_token = False
    pretrained: ClassVar[Mapping[str, Any]] = {}

    density: float = 0.5
    layers: list[int] | None = None
    keys: Literal["all", "executing"] = "executing"
    density_coefficient: float = 0.1
    controller_gain: float = 0.0
    schedule: GumbelSchedule = field(default_factory=GumbelSchedule)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: must be in (0, 1]")
        if self.keys not in ("all", "executing"):
            raise ValueError(f"keys={self.keys!r}: must be one of all, executing")
        if self.layers is not None and not isinstance(self.layers, list):
            raise ValueError(f"layers={self.layers!r}: must be a list of layers")
        for name in ("density_coefficient", "controller_gain"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")

    def exits(self, num_layers: int) -> list[int]:
        """The layers before which tokens may leave, ascending."""
        if self.layers is None:
            return sorted({num_layers // 2, num_layers * 3 // 4})
        return listed_layers(self.layers, num_layers, key="layers")

    def routed_layers(self, num_layers: int) -> list[int]:
        """All from the first exit on; none where every token stays."""
        exits = self.exits(num_layers)
        return [] if self.density == 1 else list(range(exits[0], num_layers))

    def share(self, layer: int, num_layers: int) -> float:
        exits = self.exits(num_layers)
        passed = sum(place <= layer for place in exits)
        return 1 - (1 - self.density) * passed / len(exits)

    def build(self, context: LayerContext, inner: nn.Module) -> EarlyExit:
        """The layer, which tokens that left pass by. See `exits_together`."""
        exits = self.exits(context.num_layers)
        share = self.share(context.layer, context.num_layers)
        return EarlyExit(
            inner,
            context.dim,
            exit=sum(place <= context.layer for place in exits) - 1,
            density=share if context.layer in exits else None,
            planned=share,
            **self.options(without=("density", "layers")),
        )


def exits_together(modules: Iterable[nn.Module]) -> None:
    """Let the layers of one model know who is still there."""
    staying = Staying()
    for module in modules:
        if isinstance(module, EarlyExit):
            module.staying = staying
