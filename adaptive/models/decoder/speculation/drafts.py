"""What drafts: a model's first layers, a smaller model, n-grams of the text, recycled candidates.

A draft says of every sequence what its next token may be; sampling makes a distribution of that,
the same way as of the model's own logits. It also has the model verify, because the early exit
shares its layers with it.

Shape legend: B sequences, G sequences that ask, T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from adaptive.models.decoder.cache import Cache, LayerCache
from adaptive.models.decoder.decode_depth import refuse_non_causal, run_layers
from adaptive.models.decoder.generate import check_whole
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter
from adaptive.routing.layout import TokenLayout

Rows = Sequence[Sequence[int]]
"""All tokens of each sequence, from the first; empty where a sequence rests."""


class DraftRun(Protocol):
    """One generation: it holds the caches, and computes the tokens that it does not hold yet."""

    def propose(self, rows_B: Rows) -> Tensor:
        """Logits [G, V] of the token after each row that is not empty; -inf: no proposal."""
        ...

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        """The model's logits after the last `wanted` tokens of each row, packed [sum, V]."""
        ...

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence (rejected drafts)."""
        ...


class Draft(Protocol):
    def begin(self, model: Decoder, batch_size: int) -> DraftRun:
        """A generation by a model.

        Raises:
            ValueError: if the draft is not for this model.
        """
        ...


class ExitDraft:
    """The model's first layers and a trained adapter. Early layers compute no token twice.

    Source: Kangaroo, arXiv 2404.18911, section 3.
    """

    def __init__(self, adapter: ExitAdapter) -> None:
        self.adapter = adapter

    def begin(self, model: Decoder, batch_size: int) -> DraftRun:
        if not 1 <= self.adapter.exit_layer < len(model.layers):
            raise ValueError(
                f"exit_layer={self.adapter.exit_layer}: must be between 1 and "
                f"{len(model.layers) - 1}"
            )
        return _ExitRun(model, batch_size, self.adapter)


class ModelDraft:
    """A smaller model of the same vocabulary, in evaluation mode.

    Raises:
        ValueError: if it looks at later tokens or is shared by ranks.

    Source: arXiv 2211.17192.
    """

    def __init__(self, model: Decoder) -> None:
        check_whole(model)
        refuse_non_causal(model)
        self.model = model

    def begin(self, model: Decoder, batch_size: int) -> DraftRun:
        own = self.model.config.vocab_size
        if own != model.config.vocab_size:
            raise ValueError(
                f"vocab_size={own} of the draft: must be the model's, {model.config.vocab_size}"
            )
        return _ModelRun(model, batch_size, self.model)


class NgramDraft:
    """What followed the last tokens where they stood before in the text; certain of it.

    Args:
        longest: tokens that must have stood before at first; then ever fewer, down to one.

    Source: prompt lookup decoding.
    """

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"longest={longest}: must be at least 1")
        self.longest = longest

    def begin(self, model: Decoder, batch_size: int) -> DraftRun:
        return _NgramRun(model, batch_size, self.longest)


class RecyclingDraft:
    """What the model found likeliest after the same token the last time; certain of it.

    The candidates of later generations are those of earlier ones: keep the object.

    Attributes:
        candidates: int64 [V], the successor of each token; -1 of one not met yet.

    Source: Token Recycling, arXiv 2408.08696, as a chain of the first candidates.
    """

    def __init__(self) -> None:
        self.candidates: Tensor | None = None

    def begin(self, model: Decoder, batch_size: int) -> DraftRun:
        size = model.config.vocab_size
        if self.candidates is None or len(self.candidates) != size:
            self.candidates = torch.full((size,), -1)
        return _RecyclingRun(model, batch_size, self.candidates)


class _Layers:
    """Some layers of a model, and the tokens that their caches hold."""

    def __init__(self, model: Decoder, batch_size: int, layers: range) -> None:
        self.model, self.layers = model, layers
        self.device = model.embedding.weight.device
        self.cache = Cache(model, batch_size)
        self.held = [0] * batch_size

    def missing(self, rows_B: Rows) -> list[list[int]]:
        """Tokens of each row that the caches do not hold yet."""
        return [list(row[held:]) for row, held in zip(rows_B, self.held, strict=True)]

    def embed(self, tokens_B: Rows) -> Tensor:
        ids = [token for row in tokens_B for token in row]
        return self.model.embedding(torch.tensor(ids).to(self.device))

    def run(self, hidden_TD: Tensor, lengths: Sequence[int]) -> tuple[Tensor, TokenLayout]:
        """Pass new tokens of each sequence through the layers; also where they lie."""
        layout = TokenLayout.from_lengths(list(lengths), self.device)
        layout = self.cache.next_positions(layout)
        self.held = [held + new for held, new in zip(self.held, lengths, strict=True)]
        return run_layers(self.model, hidden_TD, layout, self.layers, self.cache), layout

    def logits(self, hidden_TD: Tensor, lengths: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """After the last `wanted` of the tokens of each sequence."""
        return self.model.output(self.model.norm(_last(hidden_TD, lengths, wanted)))

    def rewind(self, counts: Sequence[int]) -> None:
        kept = [min(held, count) for held, count in zip(self.held, counts, strict=True)]
        if kept != self.held:
            self.held = kept
            self.cache.rewind(torch.tensor(kept).to(self.device))


class _WholeRun:
    """The whole model verifies; nothing drafts."""

    def __init__(self, model: Decoder, batch_size: int) -> None:
        self._target = _Layers(model, batch_size, range(len(model.layers)))

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        return _whole(self._target, rows_B, wanted)

    def rewind(self, counts: Sequence[int]) -> None:
        self._target.rewind(counts)

    def _certain(self, tokens: Sequence[int]) -> Tensor:
        """Logits of a draft that is certain of each token; -1: of none."""
        logits = torch.full((len(tokens), self._target.model.config.vocab_size), -torch.inf)
        for row, token in enumerate(tokens):
            if token >= 0:
                logits[row, token] = 0
        return logits.to(self._target.device)


class _ModelRun(_WholeRun):
    def __init__(self, model: Decoder, batch_size: int, small: Decoder) -> None:
        super().__init__(model, batch_size)
        self._small = _Layers(small, batch_size, range(len(small.layers)))

    def propose(self, rows_B: Rows) -> Tensor:
        logits = _whole(self._small, rows_B, [min(len(row), 1) for row in rows_B])
        return logits.to(self._target.device)

    def rewind(self, counts: Sequence[int]) -> None:
        super().rewind(counts)
        self._small.rewind(counts)


class _NgramRun(_WholeRun):
    def __init__(self, model: Decoder, batch_size: int, longest: int) -> None:
        super().__init__(model, batch_size)
        self._longest = longest
        self._followers: list[dict[tuple[int, ...], int]] = [{} for _ in range(batch_size)]
        self._read = [0] * batch_size

    def propose(self, rows_B: Rows) -> Tensor:
        tokens = []
        for index, row in enumerate(rows_B):
            if not row:
                continue
            # What the model has verified stays; drafts are not read.
            for place in range(self._read[index], self._target.held[index]):
                for size in range(1, min(self._longest, place) + 1):
                    self._followers[index][tuple(row[place - size : place])] = row[place]
            self._read[index] = self._target.held[index]
            sizes = range(min(self._longest, len(row)), 0, -1)
            found = (self._followers[index].get(tuple(row[-size:])) for size in sizes)
            tokens.append(next((token for token in found if token is not None), -1))
        return self._certain(tokens)


class _RecyclingRun(_WholeRun):
    def __init__(self, model: Decoder, batch_size: int, candidates: Tensor) -> None:
        super().__init__(model, batch_size)
        self._candidates = candidates

    def propose(self, rows_B: Rows) -> Tensor:
        return self._certain([int(self._candidates[row[-1]]) for row in rows_B if row])

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        logits = super().verify(rows_B, wanted)
        tokens = [
            token
            for row, count in zip(rows_B, wanted, strict=True)
            for token in row[len(row) - count :]
        ]
        # One after the other: of a token that occurs twice, the later stays.
        for token, best in zip(tokens, logits.argmax(-1).tolist(), strict=True):
            self._candidates[token] = best
        return logits


class _ExitRun:
    def __init__(self, model: Decoder, batch_size: int, adapter: ExitAdapter) -> None:
        self._adapter = adapter
        self._early = _Layers(model, batch_size, range(adapter.exit_layer))
        self._late = _Layers(model, batch_size, range(adapter.exit_layer, len(model.layers)))
        self._adapter_cache = LayerCache(batch_size, self._early.device)
        # Of each sequence, hidden states of tokens that have passed the early layers only.
        self._waiting: list[list[Tensor]] = [[] for _ in range(batch_size)]

    def propose(self, rows_B: Rows) -> Tensor:
        adapted_TD, lengths = self._pass_early(rows_B)
        last_GD = _last(adapted_TD, lengths, [min(length, 1) for length in lengths])
        return self._early.model.output(last_GD)

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        if any(self._early.missing(rows_B)):
            self._pass_early(rows_B)
        states = [state for row in self._waiting for state in row]
        lengths = [sum(map(len, row)) for row in self._waiting]
        self._waiting = [[] for _ in self._waiting]
        final_TD, _ = self._late.run(torch.cat(states), lengths)
        return self._late.logits(final_TD, lengths, wanted)

    def rewind(self, counts: Sequence[int]) -> None:
        # Between rounds nothing waits: what has passed the early layers was verified.
        if any(held > count for held, count in zip(self._early.held, counts, strict=True)):
            self._adapter_cache.rewind(torch.tensor(counts).to(self._early.device))
        self._early.rewind(counts)
        self._late.rewind(counts)

    def _pass_early(self, rows_B: Rows) -> tuple[Tensor, list[int]]:
        missing = self._early.missing(rows_B)
        lengths = [len(row) for row in missing]
        early_TD, layout = self._early.run(self._early.embed(missing), lengths)
        for row, states in zip(self._waiting, early_TD.split(lengths), strict=True):
            if len(states):
                row.append(states)
        return self._adapter(early_TD, layout=layout, cache=self._adapter_cache), lengths


def _whole(layers: _Layers, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
    """Logits after the last `wanted` tokens of each row, through all layers of a model."""
    missing = layers.missing(rows_B)
    lengths = [len(row) for row in missing]
    final_TD, _ = layers.run(layers.embed(missing), lengths)
    return layers.logits(final_TD, lengths, wanted)


def _last(x_TD: Tensor, lengths: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Rows of the last `wanted` tokens of each sequence."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
    return x_TD[torch.tensor(rows, dtype=torch.int64).to(x_TD.device)]
