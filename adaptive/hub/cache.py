"""What a routed layer keeps in a cache of transformers: the tokens that it processed.

Shape legend: B sequences, S tokens of this forward, M columns held, K columns added, H heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class HeldKeys(NamedTuple):
    """Keys and values [B, H, K, head width] of tokens, and their columns int64 [B, K]; -1: none."""

    keys: Tensor
    values: Tensor
    columns: Tensor


class RoutedCacheLayer(CacheLayerMixin):
    """Keys and values of the tokens that a layer processed; for masks, as long as the text.

    The layer itself says before each `update` whose keys come (`expect`), and after it how many
    tokens the text now has (`advance`). A layer that says nothing is not the one that it was made
    for, and is refused.

    Args:
        sliding_window: positions that a token sees, its own included; None: every earlier one.

    Attributes:
        keys, values: [B, H, M, head width], or None while there are none.
        columns: int64 [B, M], each token's column of the text; -1 where a row holds no token.
        length: columns of the text so far, processed or not.
        ragged: some rows hold fewer tokens than others.
        incomplete: what the layer processed of the text is not held, and cannot be continued.
    """

    columns: Tensor | None

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.is_croppable = sliding_window is None
        self.columns = None
        self.length = 0
        self.ragged = self.incomplete = False
        self._expected: Tensor | None = None
        self._beside: HeldKeys | None = None
        self._tidy = True  # nothing is to be dropped after this forward

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.columns = torch.zeros(key_states.shape[0], 0, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def expect(
        self, columns_BK: Tensor, beside: HeldKeys | None = None, *, whole: bool = False
    ) -> None:
        """The next `update` brings tokens of these columns; -1 where a row has none.

        Args:
            columns_BK: int64.
            beside: tokens that it does not bring, and that are held before those.
            whole: it is known that no row lacks a token.
        """
        self._expected, self._beside = columns_BK, beside
        self._tidy = self._tidy and whole and not self.is_sliding

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Held and new keys and values, [B, H, M + K, head width], whose columns are `columns`."""
        added_BK, self._expected = self._expected, None
        beside, self._beside = self._beside, None
        if added_BK is None:
            raise ValueError(
                f"past_key_values: holds what a routed layer processed of {self.length} tokens, "
                "and this layer is not that one; give each model a cache of its own"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.columns is not None
        if beside is not None:
            key_states = torch.cat([beside.keys, key_states], 2)
            value_states = torch.cat([beside.values, value_states], 2)
            added_BK = torch.cat([beside.columns, added_BK], 1)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.columns = torch.cat([self.columns, added_BK], 1)
        return self.keys, self.values

    def hold(self, beside: HeldKeys) -> None:
        """Keep tokens in a forward in which the layer runs for none."""
        self.expect(beside.columns)
        self.update(beside.keys, beside.values)

    def advance(self, tokens: int) -> None:
        """The text has so many columns more; what no later token can see is dropped.

        Synchronises with the host once, where there may be anything to drop.

        Raises:
            ValueError: the layer did not use the cache.
        """
        if self._expected is not None:
            raise ValueError(
                "past_key_values: the layer's attention did not use it; call the model with "
                "use_cache=False"
            )
        self.length += tokens
        tidy, self._tidy = self._tidy and not self.is_sliding, True
        if tidy:
            return
        first = 0 if self.sliding_window is None else self.length - self.sliding_window + 1
        self._keep(first, self.length)

    def _keep(self, first: int, end: int) -> None:
        """Drop tokens outside these columns, and columns in which no row holds one."""
        if self.columns is None or self.keys is None or self.values is None:
            return
        kept_BM = (self.columns >= max(first, 0)) & (self.columns < end)
        held_B = kept_BM.sum(1)
        shortest, longest = torch.stack(held_B.aminmax()).tolist()
        self.ragged = shortest < longest
        if longest == kept_BM.shape[1]:
            self.columns = self.columns.masked_fill(~kept_BM, -1)
            return
        order_BM = (~kept_BM).int().argsort(dim=1, stable=True)[:, :longest]
        self.columns = self.columns.masked_fill(~kept_BM, -1).gather(1, order_BM)
        index = order_BM[:, None, :, None]
        self.keys = self.keys.take_along_dim(index, 2)
        self.values = self.values.take_along_dim(index, 2)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the text that the model's mask has to cover, and the first of them."""
        if self.sliding_window is None:
            return self.length + query_length, 0
        offset = max(self.length - self.sliding_window + 1, 0)
        return self.length - offset + query_length, offset

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns of the text."""
        if self.sliding_window is not None and self.length >= self.sliding_window:
            raise ValueError(
                f"crop({tokens_to_remove}): a routed layer with a sliding window of "
                f"{self.sliding_window} keeps no earlier tokens to go back to"
            )
        self.length = max(self.length - abs(tokens_to_remove), 0)
        self._keep(0, self.length)

    def reset(self) -> None:
        self.keys = self.values = self.columns = self._expected = self._beside = None
        self.is_initialized = self.ragged = self.incomplete = False
        self.length = 0
        self._tidy = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.columns is not None and self.keys is not None and self.values is not None:
            indices = indices.to(self.columns.device)
            self.columns = self.columns[indices]
            self.keys, self.values = self.keys[indices], self.values[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.columns is not None:
            rows = torch.arange(self.columns.shape[0], device=self.columns.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def routed_cache_layer(cache: Any, layer: int, tokens: int) -> RoutedCacheLayer:
    """The place of a routed layer in a cache, made there while the cache is of this text alone.

    Args:
        cache: what the model was given, or made.
        layer: index of the layer.
        tokens: columns S of this forward.

    Raises:
        ValueError: the cache is of a kind that cannot hold some tokens only, or holds a text that
            this layer did not see.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        offloaded = "offloaded " if getattr(cache, "offloading", False) else ""
        raise ValueError(
            f"past_key_values of {offloaded}{type(cache).__name__}: a routed layer keeps what it "
            "processed in a DynamicCache; give none, or an empty one"
        )
    while len(cache.layers) <= layer:
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
    own = cache.layers[layer]
    if type(own) not in (RoutedCacheLayer, DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"past_key_values with a {type(own).__name__} for layer {layer}: a routed layer needs "
            "a DynamicLayer or DynamicSlidingWindowLayer in its place; give none, or an empty one"
        )
    earlier = own.length if isinstance(own, RoutedCacheLayer) else 0
    # Layers before this one hold this forward's tokens by now, it and those after it do not.
    held = [_length(other) for other in cache.layers]
    rules = [earlier + tokens] * layer + [earlier] * (len(held) - layer)
    if any(length not in (None, rule) for length, rule in zip(held, rules, strict=True)):
        longest = max(length for length in held if length is not None)
        raise ValueError(
            f"past_key_values of {longest} tokens: a routed layer cannot continue from a cache "
            "that is not its own; call the model with use_cache=False"
        )
    if not isinstance(own, RoutedCacheLayer):
        own = cache.layers[layer] = RoutedCacheLayer(getattr(own, "sliding_window", None))
    return own


def _length(layer: Any) -> int | None:
    """Tokens that a place of a cache knows of; None where it keeps none."""
    return layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None


class OneLayer(Cache):
    """A cache of one layer, whatever number that has: for a forward that gives its keys to it."""

    def __init__(self, place: RoutedCacheLayer) -> None:
        super().__init__(layers=[place])
        self.place = place

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.place.update(key_states, value_states, *args, **kwargs)


class KeysMade(Exception):  # noqa: N818  (it ends a forward, as StopIteration a loop)
    """A layer has made the keys and values of its tokens, and is to do no more."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class KeysOnly(RoutedCacheLayer):
    """Ends a layer's forward where its attention has made keys and values."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise KeysMade(key_states, value_states)
