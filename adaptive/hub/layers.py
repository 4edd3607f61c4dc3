"""Layers of transformers that route: called as their model calls them, weights at their old names.

A layer keeps its place, its weights and their names; its class becomes one that is also the old
one (`isinstance` holds), has the method's module at `routing`, and gives that module the chosen
tokens' share of everything that the model gave for all.

Shape legend: B sequences, S tokens of this forward, R chosen tokens, K chosen columns, D width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from adaptive.blocks.method import RoutedBlock
from adaptive.blocks.wrapping import filled_columns, from_rows, to_rows
from adaptive.hub.attention import (
    IMPLEMENTATIONS,
    attentions,
    layer_index,
    mask_by_columns,
    mask_of_chosen,
    token_mask,
)
from adaptive.hub.cache import (
    HeldKeys,
    KeysMade,
    KeysOnly,
    OneLayer,
    RoutedCacheLayer,
    routed_cache_layer,
)
from adaptive.hub.calls import arguments_of, cache_argument, named
from adaptive.hub.replacing import real_tokens
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import pack
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection


class AdaptedLayer(nn.Module):
    """What a routed layer's class derives from first; see `route_layer`.

    Attributes:
        routing: the method's module.
        dense_class: the layer's class before.
        call_arguments: what its forward takes.
        attention_path: of its attention.
        returns_beside: what it returns beside hidden states, once seen: None or a tuple of Nones.
    """

    tells_tokens = True  # to a MaskedLayer that it may be
    returns_beside: Any = ...
    attention_path: str
    routing: RoutedBlock
    dense_class: type[Any]
    call_arguments: inspect.Signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = LayerCall(self, args, kwargs)
        hidden_BSD = self.routing(call.hidden, token_mask=call.token_mask, call=call)
        return call.returned(hidden_BSD)

    def dense_forward(self, hidden_BKD: Tensor, **arguments: Any) -> Any:
        """The layer on these tokens, all of them."""
        return super().forward(hidden_BKD, **arguments)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """What the method's module says, the layer's own parts where it runs the block."""
        blocks = [m for m in self.routing.modules() if isinstance(m, DenseLayer)]
        for block in blocks:
            block.counted = [part for n, part in self.named_children() if n != "routing"]
        count(self.routing, work)
        for block in blocks:
            block.counted = []


class LayerCall:
    """One call of a layer by its model, and what of it belongs to chosen tokens.

    Attributes:
        hidden: [B, S, D].
        token_mask: bool [B, S], False at padding; None where there is none.
    """

    def __init__(self, layer: AdaptedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer = layer
        self.attention: Any = layer.get_submodule(layer.attention_path)
        self.arguments = named(layer.call_arguments, args, kwargs)
        self.hidden: Tensor = self.arguments.pop(next(iter(layer.call_arguments.parameters)))
        self.mask = self.arguments.pop("attention_mask", None)
        self.token_mask = token_mask(self.mask, *self.hidden.shape[:2])
        self.place: RoutedCacheLayer | None = None
        self.cache = self._cache()
        self.rest: tuple[Any, ...] | None = None
        for name, value in self.arguments.items():
            self._refuse_unknown(name, value)

    @property
    def lengths(self) -> Tensor | None:
        """int64 [B]: keys that chosen tokens saw, held ones included; None: there is no cache."""
        held = None if self.cache is None else self.cache.columns
        return None if held is None else (held >= 0).sum(1)

    def chosen(self, layout: TokenLayout, beside: HeldKeys | None = None) -> dict[str, Any]:
        """The layer's arguments for chosen tokens, in the rows of `to_rows`.

        Args:
            layout: of the chosen tokens, positions counted from each row's first valid token.
            beside: other tokens of this forward, whose keys the chosen ones see.
        """
        arguments, columns_BK = self._of(layout)
        place = self.cache
        if beside is not None and place is None:
            place = RoutedCacheLayer()
            arguments[cache_argument(self.layer.call_arguments)] = OneLayer(place)
        ragged = not (layout.uniform and layout.max_seqlen)
        arguments["attention_mask"] = self._mask(columns_BK, place, beside, ragged=ragged)
        return arguments

    def keys_of(self, hidden_RD: Tensor, layout: TokenLayout) -> HeldKeys | None:
        """Keys and values of tokens for which the layer does not run; None: there are no tokens."""
        if not layout.max_seqlen:
            return None
        arguments, columns_BK = self._of(layout)
        arguments["attention_mask"] = None
        arguments[cache_argument(self.layer.call_arguments)] = OneLayer(KeysOnly())
        try:
            self.layer.dense_forward(to_rows(hidden_RD, layout), **arguments)
        except KeysMade as made:
            earlier = 0 if self.cache is None else self.cache.length
            columns_BK = torch.where(columns_BK >= 0, columns_BK + earlier, -1)
            return HeldKeys(made.keys, made.values, columns_BK)
        raise ValueError(
            f"{self.layer.dense_class.__name__}: its attention gives no keys to a cache; "
            "keys must be 'executing'"
        )

    def _of(self, layout: TokenLayout) -> tuple[dict[str, Any], Tensor]:
        """The layer's arguments but the mask, and columns int64 [B, K] of this forward; -1: none.

        A layout's positions count from each row's first valid token.
        """
        if self.hidden.shape[1] == 1 and layout.uniform and layout.max_seqlen == 1:
            return dict(self.arguments), layout.positions.new_zeros(layout.batch_size, 1)
        columns_BK = to_rows(layout.positions[:, None], layout)[..., 0]
        if self.token_mask is not None:
            valid_first_BS = (~self.token_mask).int().argsort(dim=1, stable=True)
            columns_BK = valid_first_BS.gather(1, columns_BK)
        filled_BK = filled_columns(layout)
        arguments = {
            name: _of_columns(name, value, columns_BK) for name, value in self.arguments.items()
        }
        if filled_BK is not None:
            columns_BK = columns_BK.masked_fill(~filled_BK, -1)
        return arguments, columns_BK

    def returned(self, hidden_BSD: Tensor) -> Any:
        """What the model expects: as the layer returned it, a tuple or not."""
        if self.place is not None:
            self.place.advance(self.hidden.shape[1])
        return hidden_BSD if self.rest is None else (hidden_BSD, *self.rest)

    def _mask(
        self,
        columns_BK: Tensor,
        place: RoutedCacheLayer | None,
        beside: HeldKeys | None,
        *,
        ragged: bool,
    ) -> Any:
        """What chosen tokens see, of held ones, those beside them and themselves."""
        held, earlier, keys_BN = None, 0, columns_BK
        if place is not None:
            held, earlier = place.columns, place.length
            keys_BN = torch.where(columns_BK >= 0, columns_BK + earlier, -1)
            place.expect(keys_BN, beside, whole=not ragged and beside is None)
            ragged = ragged or place.ragged
            before = [] if held is None else [held]
            before += [] if beside is None else [beside.columns]
            keys_BN = torch.cat([*before, keys_BN], 1)
        if self.mask is None and self.attention.config._attn_implementation == "sdpa":
            among_themselves = keys_BN.shape[1] == columns_BK.shape[1]
            if among_themselves and (self.attention.is_causal or not ragged):
                return None  # rows end with what is no token, which causal order hides
            if columns_BK.shape[1] == 1 and not ragged and beside is None:
                return None
        return mask_of_chosen(
            self.mask,
            self.attention,
            seq_len=self.hidden.shape[1],
            columns_BK=columns_BK,
            keys_BN=keys_BN,
            earlier=earlier,
            dtype=self.hidden.dtype,
        )

    def _cache(self) -> RoutedCacheLayer | None:
        """The layer's place in the model's cache; None: there is none, or it is not to be used."""
        names = [n for n, value in self.arguments.items() if isinstance(value, Cache)]
        if not names:
            return None
        name, index = self.layer.dense_class.__name__, layer_index(self.attention)
        cache = self.arguments[names[0]]
        if index is None or isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                f"past_key_values of {type(cache).__name__}: {name} cannot tell its place in it; "
                "call the model with use_cache=False"
            )
        own = self.place = routed_cache_layer(cache, index, self.hidden.shape[1])
        routing = self.layer.routing
        sees_later = routing.training or not routing.causal
        if own.length and (own.incomplete or sees_later):
            raise ValueError(
                f"past_key_values of {own.length} tokens: {name} {index} chooses, or chose, by "
                "later tokens, so that it cannot continue a text; call the model with "
                "use_cache=False"
            )
        if sees_later:
            own.incomplete = True
            self.arguments |= dict.fromkeys(names)
            return None
        return own

    def _refuse_unknown(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim() and name not in _OF_TOKENS:
            raise ValueError(
                f"{self.layer.dense_class.__name__}: its model gives it {name} of shape "
                f"{list(value.shape)}, and which of it belongs to the chosen tokens is not known"
            )


_OF_TOKENS = {"position_ids": 0, "position_embeddings": 1}
"""Arguments that have an axis of tokens, and how many axes stand behind it."""


def _of_columns(name: str, value: Any, columns_BK: Tensor) -> Any:
    """What belongs to these columns, [..., B, K, ...], of an argument [..., B or 1, S, ...]."""
    if isinstance(value, tuple | list):
        return type(value)(_of_columns(name, part, columns_BK) for part in value)
    behind = _OF_TOKENS.get(name)
    if behind is None or not isinstance(value, Tensor):
        return value
    if value.dim() == 1 + behind:
        value = value[None]
    value = value.movedim((-2 - behind, -1 - behind), (0, 1))
    value = value.expand(columns_BK.shape[0], *value.shape[1:])
    rows_B1 = torch.arange(len(value), device=value.device)[:, None]
    return value[rows_B1, columns_BK].movedim((0, 1), (-2 - behind, -1 - behind))


class DenseLayer(nn.Module):
    """The layer as a method's module sees it: a block that takes packed tokens.

    It holds nothing: weights stay where they were, in the layer itself, which comes with the call.

    Args:
        takes_queries: the layer gives keys to a cache, so that chosen tokens can see others.
    """

    takes_packed = True

    def __init__(self, *, takes_queries: bool) -> None:
        super().__init__()
        self.takes_queries = takes_queries
        self.counted: list[nn.Module] = []

    def forward(
        self,
        packed: Tensor,
        *,
        layout: TokenLayout,
        call: LayerCall,
        queries: Selection | None = None,
    ) -> Tensor:
        """Updated tokens [R, D]: all that are packed, or `queries` alone, which see all."""
        beside = None
        if queries is not None:
            others = Selection.from_mask(~queries.mask(packed.shape[0]), layout)
            beside = call.keys_of(pack(packed, others.indices), others.layout)
            packed, layout = pack(packed, queries.indices), queries.layout
        layer = call.layer
        if (
            not layout.max_seqlen
            and not torch.is_grad_enabled()
            and layer.returns_beside is not ...
        ):
            call.rest = layer.returns_beside
            if beside is not None and call.cache is not None:
                call.cache.hold(beside)
            return packed
        with real_tokens(filled_columns(layout)):
            output = layer.dense_forward(to_rows(packed, layout), **call.chosen(layout, beside))
        if isinstance(output, tuple):
            output, *rest = output
            call.rest = tuple(rest)
        if all(part is None for part in call.rest or ()):
            layer.returns_beside = call.rest
        return from_rows(output, layout)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The parts of the layer that counts, see `AdaptedLayer`."""
        for part in self.counted:
            count(part, work)


def route_layer(layer: nn.Module, routing: RoutedBlock) -> None:
    """Make `layer` a routed one.

    Args:
        layer: see `refuse_layer`.
        routing: a method's module, built around a `DenseLayer`.
    """
    weight = next(p for p in layer.parameters() if p.is_floating_point())
    (attention,) = attentions(layer)
    layer.attention_path = next(n for n, m in layer.named_modules() if m is attention)
    layer.__class__ = _adapted(type(layer))
    layer.routing = routing.to(weight.device, weight.dtype).train(layer.training)


def refuse_layer(layer: nn.Module) -> None:
    """Raise ValueError where a layer cannot be given chosen tokens alone."""
    reason = _reason_against(layer)
    if reason:
        raise ValueError(f"{type(layer).__name__}: {reason}")


def refuse_changed(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raise ValueError where a layer is or has such a one, or is not called as its class says."""
    if any(isinstance(module, kind) for module in layer.modules()):
        raise ValueError("is routed already")
    if "forward" in vars(layer):
        raise ValueError(
            "its forward has been replaced (by accelerate's hooks, a compiler): adapt it before"
        )


def refuse_attention(layer: nn.Module) -> None:
    """Raise ValueError where a layer has not one attention whose structure is known."""
    found = attentions(layer)
    if len(found) != 1:
        raise ValueError(
            f"has {len(found) or 'no'} attention modules with is_causal and config, and needs one, "
            "to be told which of the chosen tokens see which"
        )


def _reason_against(layer: nn.Module) -> str | None:
    try:
        refuse_changed(layer, AdaptedLayer)
        refuse_attention(layer)
    except ValueError as refusal:
        return str(refusal)
    (attention,) = attentions(layer)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ZeroPad2d | nn.modules.RNNBase):
            return f"its {name} ({type(module).__name__}) mixes neighbouring tokens"
    for name, _ in layer.named_parameters():
        if "relative_" in name:
            return f"its {name} is a bias by columns, and chosen tokens stand in other columns"
    name = mask_by_columns(layer)
    if name is not None:
        return f"its {name} is a mask by columns, and chosen tokens stand in other columns"
    implementation = attention.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        return (
            f"attn_implementation={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}, "
            "which can be told which of the chosen tokens see which"
        )
    arguments = arguments_of(type(layer)).parameters
    parameters = list(arguments.values())
    if not parameters or any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return "its forward does not name what it is given"
    if "attention_mask" not in arguments and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        return "its forward takes no attention_mask"
    return None


def _adapted(dense: type[Any]) -> type[AdaptedLayer]:
    if dense not in _ADAPTED:
        given = {"dense_class": dense, "call_arguments": arguments_of(dense)}
        _ADAPTED[dense] = type(f"Adapted{dense.__name__}", (AdaptedLayer, dense), given)
    return _ADAPTED[dense]


_ADAPTED: dict[Any, type[AdaptedLayer]] = {}


def takes_queries(layer: nn.Module) -> bool:
    """Whether chosen tokens of a layer can see tokens for which it does not run."""
    return bool(cache_argument(arguments_of(type(layer))))
