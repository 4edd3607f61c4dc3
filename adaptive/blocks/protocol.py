"""What the house asks of a method: of its configuration (Method) and of its module (RoutedBlock).

Shape legend: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from adaptive.blocks.feed_forward import MakeLinear
from adaptive.ops.flop_counter import FlopCounter, Work
from parallel.mesh import Mesh

Place = Literal["linear", "feed_forward", "layer", "stack", "merging", "sequence"]
MakeFeedForward = Callable[[int], nn.Module]
"""Hidden width -> a feed-forward, called as `ffn(x_TD, layout=…)`, that returns the update."""


class Linears(NamedTuple):
    """How what a layer is made of is made.

    Attributes:
        input, output: (in_features, out_features) -> projections into and out of a block.
        feed_forward: hidden width -> the feed-forward; None: a SwiGLU of such projections.
    """

    input: MakeLinear
    output: MakeLinear
    feed_forward: MakeFeedForward | None = None


@dataclass(frozen=True)
class LayerContext:
    """Where in a decoder a method builds something.

    Attributes:
        layer, num_layers: index of the layer; how many there are.
        dim, ffn_dim: width D; width of its dense feed-forward.
        std, output_std: of initial weights; of those that lead into the residual stream.
        mesh: how the ranks share the model.
    """

    layer: int
    num_layers: int
    dim: int
    ffn_dim: int
    std: float
    output_std: float
    mesh: Mesh


@dataclass(frozen=True)
class SequenceContext:
    """What network a method of the layers as a whole builds something in.

    Attributes:
        dim: width D.
        grid: rows and columns of tokens; None: one axis.
        per_sequence: keyword arguments of the layers that have a row for every sequence.
        recompute: keep no activations inside layers.
        mesh: how the ranks share the model.
    """

    dim: int
    grid: tuple[int, ...] | None
    per_sequence: tuple[str, ...]
    recompute: bool
    mesh: Mesh


@dataclass(frozen=True)
class StackContext:
    """What decoder a method runs the layers of.

    Attributes:
        num_layers: how many.
        dim: width D.
        std: of initial weights.
        eps: of its norms.
        mesh: how the ranks share the model.
    """

    num_layers: int
    dim: int
    std: float
    eps: float
    mesh: Mesh


@dataclass(frozen=True)
class MergingContext:
    """Between the halves of which layer tokens become fewer.

    Attributes:
        layer, num_layers: index of the layer; how many there are.
        protected: tokens at the beginning of every sequence that must stay.
        tokens: of every sequence, ahead of the first layer.
    """

    layer: int
    num_layers: int
    protected: int = 0
    tokens: int = 1


@dataclass(frozen=True)
class Method:
    """A method's configuration: what a user writes under `model.<name>`.

    Derive a frozen dataclass whose fields are the method's options; its docstring documents them
    under "Attributes:". What is not overridden is what a method that changes nothing says.

    Class attributes:
        name: its key in the section `model` of a recipe.
        place: what it replaces: "linear" (the linear layers), "feed_forward", "layer" (wraps a
            whole layer), "stack" (runs a decoder's layers), "merging" (between a layer's halves
            fewer tokens leave than came), "sequence" (the layers of a network).
        blocks: its public modules.
        excludes: names of methods, or places, that it cannot stand beside in one model.
        sees_every_token: whether what is inside is given every token.
        pretrained: options that differ by default where it goes into layers that are trained.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    name: ClassVar[str]
    place: ClassVar[Place]
    blocks: ClassVar[tuple[type[nn.Module], ...]] = ()
    excludes: ClassVar[tuple[str, ...]] = ()
    sees_every_token: ClassVar[bool] = True
    pretrained: ClassVar[Mapping[str, Any]] = {}

    def build(self, context: Any, inner: Any) -> Any:
        """What stands at the method's place.

        Args:
            context: where: a LayerContext, for a "stack" a StackContext, for "merging" a
                MergingContext, for a "sequence" a SequenceContext.
            inner: what would stand there without it: "linear": Linears, and Linears are returned;
                "feed_forward": a MakeFeedForward, and a feed-forward of width `context.ffn_dim` is
                returned; "layer": a module that maps tokens to updated tokens, as the result does;
                "stack": None, see `adaptive.blocks.segments.Segments`;
                "merging": a layer in two halves (`adaptive.blocks.token_merging.MergeableLayer`);
                "sequence": the layers.
        """
        raise NotImplementedError

    def routed_layers(self, num_layers: int) -> list[int]:
        """The layers that it changes.

        Raises:
            ValueError: if a listed layer does not exist, or none has it ("layers=[9]: …").
        """
        return list(range(num_layers))

    def share(self, layer: int, num_layers: int) -> float:
        """Planned share of the tokens that a layer (or what else is inside) computes."""
        return 1.0

    def ffn_rows(self, ffn_dim: int) -> int:
        """Hidden feed-forward channels that compute each token, where `ffn_dim` would without."""
        return ffn_dim

    @property
    def expert_axis(self) -> tuple[int, int]:
        """Experts that the mesh's expert axis may split, and how many of them a token goes to."""
        return 0, 0

    def clashes(self, other: Method) -> bool:
        """Whether the two cannot stand in one model."""
        return other.name in self.excludes or other.place in self.excludes

    def options(self, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields and their values, for a constructor whose arguments have the same names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in without}


class RoutedBlock(nn.Module):
    """Base of modules that route: what is asked of one, with what holds for most.

    A forward that is called inside a RoutingTape tells it a RoutingRecord of this module, whose
    `executed` tokens `count_flops` then finds again by `count.chosen(self, …)`.

    Attributes:
        kind: of its records.
        causal: whether, in evaluation, what becomes of a token depends on earlier tokens only. A
            model with a module that says False cannot generate with a cache.
        path_costs: the share of full compute that each choice of a token costs, where
            `force_choices` may make the choice; empty: it may not.
        replayed_choices: how many choices a token has, where `replay` may make it; 0: it may not.
        told: what its tokens must choose, inside `force_choices` or `replay`.
        takes_packed: it is called as `block(packed_TD, layout=…)`.
        grid: rows and columns of tokens, where these are patches of images.
    """

    kind: str = ""
    causal: bool = True
    path_costs: tuple[float, ...] = ()
    replayed_choices: int = 0
    told: Tensor | None = None
    takes_packed: bool = True
    grid: tuple[int, ...] | None = None

    @property
    def decides(self) -> nn.Module | None:
        """What scores tokens causally, a token above `self.threshold` being chosen; None: nothing.

        `calibrate` sets that buffer so that `self.capacity` of the tokens are.
        """
        return None

    def start_step(self, step: int) -> None:
        """An optimizer step begins: set what follows a schedule. See `adaptive.start_step`."""

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Say what the module computes for `work`, see FlopCounter."""
        raise ValueError(f"{type(self).__name__}: says no FLOPs: give it count_flops(count, work)")
