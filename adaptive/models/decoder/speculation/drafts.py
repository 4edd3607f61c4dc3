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

from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.decode_depth import refuse_non_causal
from adaptive.models.decoder.generate import check_whole
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculation.exit_adapter import AdapterStep, ExitAdapter
from adaptive.models.decoder.speculation.trees import Tree

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


class TreeRun(DraftRun, Protocol):
    """A generation whose drafts may be trees: all runs but that of an early exit."""

    def retract(self, counts: Sequence[int]) -> None:
        """The draft alone forgets all but the first tokens of each sequence."""
        ...

    def verify_trees(self, rows_B: Rows, trees_B: Sequence[Tree]) -> tuple[Tensor, list[int]]:
        """The model's logits behind each row and each node of its tree; `keep_paths` must follow.

        Returns:
            [sum of N + 1, V], and where each sequence's begin.
        """
        ...

    def keep_paths(self, paths_B: Sequence[Sequence[int]]) -> None:
        """Of each tree keep some nodes; of a sequence that rests, give none."""
        ...


class Draft(Protocol):
    def begin(self, inference: Inference, batch_size: int) -> DraftRun:
        """A generation by a model, made ready.

        Raises:
            ValueError: if the draft is not for this model.
        """
        ...


_CANDIDATES = 8
_UNREAD = 32
"""Passes whose logits wait to be read."""


class ExitDraft:
    """The model's first layers and a trained adapter. Early layers compute no token twice.

    Source: Kangaroo, arXiv 2404.18911, section 3.
    """

    def __init__(self, adapter: ExitAdapter) -> None:
        self.adapter = adapter

    def begin(self, inference: Inference, batch_size: int) -> DraftRun:
        if not 1 <= self.adapter.exit_layer < len(inference.model.layers):
            raise ValueError(
                f"exit_layer={self.adapter.exit_layer}: must be between 1 and "
                f"{len(inference.model.layers) - 1}"
            )
        return _ExitRun(inference, batch_size, self.adapter)


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

    def begin(self, inference: Inference, batch_size: int) -> DraftRun:
        own = self.model.config.vocab_size
        if own != inference.model.config.vocab_size:
            raise ValueError(
                f"vocab_size={own} of the draft: must be the model's, "
                f"{inference.model.config.vocab_size}"
            )
        return _ModelRun(inference, batch_size, self.model)


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

    def begin(self, inference: Inference, batch_size: int) -> DraftRun:
        return _NgramRun(inference, batch_size, self.longest)


class RecyclingDraft:
    """What the model found likeliest after the same token the last time; certain of it.

    The candidates of later generations are those of earlier ones: keep the object.

    Attributes:
        candidates: int64 [V, up to 8] on the host, the likeliest successors of each token, the
            likeliest first; -1 of one not met yet.

    Source: Token Recycling, arXiv 2408.08696, as a chain of the first candidates, or as a tree.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None
        # Tokens and the logits behind them: nobody may ask for candidates for long.
        self._unread: list[tuple[list[int], Tensor]] = []

    @property
    def candidates(self) -> Tensor | None:
        if self._unread and self._table is not None:
            # Of a token that occurs twice, the later stays.
            tokens = [token for some, _ in self._unread for token in some]
            place = {token: index for index, token in enumerate(tokens)}
            logits_TV = torch.cat([logits for _, logits in self._unread])
            best_T8 = logits_TV.topk(self._table.shape[1], -1).indices.cpu()
            self._table[list(place)] = best_T8[list(place.values())]
            self._unread.clear()
        return self._table

    def learn(self, tokens: list[int], logits_TV: Tensor) -> None:
        """Logits behind some tokens, read when candidates are asked for, or many wait."""
        self._unread.append((tokens, logits_TV))
        if len(self._unread) >= _UNREAD:
            _ = self.candidates

    def begin(self, inference: Inference, batch_size: int) -> DraftRun:
        size = inference.model.config.vocab_size
        if self._table is None or len(self._table) != size:
            self._table = torch.full((size, min(_CANDIDATES, size)), -1)
            self._unread.clear()
        return _RecyclingRun(inference, batch_size, self)


class _Layers:
    """Some layers of a model, and the tokens that their caches hold."""

    def __init__(self, inference: Inference, batch_size: int, layers: range | None = None) -> None:
        self.inference, self.model = inference, inference.model
        self.layers = range(len(self.model.layers)) if layers is None else layers
        self.device = self.model.embedding.weight.device
        self.cache = Cache(self.model, batch_size)

    @property
    def held(self) -> list[int]:
        return self.cache.seen

    def missing(self, rows_B: Rows) -> list[list[int]]:
        """Tokens of each row that the caches do not hold yet."""
        return [list(row[held:]) for row, held in zip(rows_B, self.held, strict=True)]

    def embed(self, tokens_B: Rows) -> Tensor:
        return self.inference.embed([token for row in tokens_B for token in row])

    def run(self, hidden_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Pass new tokens of each sequence through the layers."""
        tokens = self.cache.next_tokens(lengths)
        return self.inference.run(hidden_TD, tokens, self.cache, self.layers)

    def logits(self, hidden_TD: Tensor, lengths: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """After the last `wanted` of the tokens of each sequence."""
        return self.inference.logits(_last(hidden_TD, lengths, wanted))

    def whole(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        """Logits after the last `wanted` tokens of each row, of a model all of whose layers run."""
        missing = self.missing(rows_B)
        lengths = [len(row) for row in missing]
        return self.logits(self.run(self.embed(missing), lengths), lengths, wanted)

    def rewind(self, counts: Sequence[int]) -> None:
        kept = [min(held, count) for held, count in zip(self.held, counts, strict=True)]
        if kept != self.held:
            self.cache.rewind(torch.tensor(kept))


class _WholeRun:
    """The whole model verifies; nothing drafts."""

    def __init__(self, inference: Inference, batch_size: int) -> None:
        self._target = _Layers(inference, batch_size)
        self._starts: list[int] = []

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        return self._target.whole(rows_B, wanted)

    def rewind(self, counts: Sequence[int]) -> None:
        self._target.rewind(counts)

    def retract(self, counts: Sequence[int]) -> None:
        return

    def verify_trees(self, rows_B: Rows, trees_B: Sequence[Tree]) -> tuple[Tensor, list[int]]:
        target = self._target
        before = [row[:-1] for row in target.missing(rows_B)]
        if any(before):
            target.run(target.embed(before), [len(row) for row in before])
        nodes = [
            [row[-1], *t.tokens] if row else [] for row, t in zip(rows_B, trees_B, strict=True)
        ]
        seen = [t.ancestors() for row, t in zip(rows_B, trees_B, strict=True) if row]
        self._starts = [sum(map(len, nodes[:index])) for index in range(len(nodes))]
        depths = [
            [0, *tree.depths()] if row else [] for row, tree in zip(rows_B, trees_B, strict=True)
        ]
        tokens = target.cache.next_tree(depths, torch.block_diag(*seen).bool())
        hidden_TD = target.inference.run(target.embed(nodes), tokens, target.cache, target.layers)
        return target.inference.logits(hidden_TD), self._starts

    def keep_paths(self, paths_B: Sequence[Sequence[int]]) -> None:
        pairs = zip(self._starts, paths_B, strict=True)
        names = [[start + node for node in path] for start, path in pairs]
        self._target.cache.keep(names)

    def _certain(self, tokens: Sequence[int]) -> Tensor:
        """Logits of a draft that is certain of each token; -1: of none."""
        logits = torch.full((len(tokens), self._target.model.config.vocab_size), -torch.inf)
        for row, token in enumerate(tokens):
            if token >= 0:
                logits[row, token] = 0
        return logits.to(self._target.device)


class _ModelRun(_WholeRun):
    def __init__(self, inference: Inference, batch_size: int, small: Decoder) -> None:
        super().__init__(inference, batch_size)
        self._model, self._batch_size = small, batch_size
        self._small: _Layers | None = None  # until something is drafted

    def propose(self, rows_B: Rows) -> Tensor:
        if self._small is None:
            small = Inference(self._model, rows=self._batch_size)
            self._small = _Layers(small, self._batch_size)
        logits = self._small.whole(rows_B, [min(len(row), 1) for row in rows_B])
        return logits.to(self._target.device)

    def rewind(self, counts: Sequence[int]) -> None:
        super().rewind(counts)
        self.retract(counts)

    def retract(self, counts: Sequence[int]) -> None:
        if self._small is not None:
            self._small.rewind(counts)


class _NgramRun(_WholeRun):
    def __init__(self, inference: Inference, batch_size: int, longest: int) -> None:
        super().__init__(inference, batch_size)
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
    def __init__(self, inference: Inference, batch_size: int, draft: RecyclingDraft) -> None:
        super().__init__(inference, batch_size)
        self._draft = draft

    def propose(self, rows_B: Rows) -> Tensor:
        return self._certain([self._known(row[-1])[0] for row in rows_B if row])

    def candidates_of(self, token: int) -> list[int]:
        """What may follow a token, the likeliest first."""
        return [found for found in self._known(token) if found >= 0]

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        logits = super().verify(rows_B, wanted)
        pairs = zip(rows_B, wanted, strict=True)
        self._draft.learn(
            [token for row, count in pairs for token in row[len(row) - count :]], logits
        )
        return logits

    def verify_trees(self, rows_B: Rows, trees_B: Sequence[Tree]) -> tuple[Tensor, list[int]]:
        logits, starts = super().verify_trees(rows_B, trees_B)
        pairs = zip(rows_B, trees_B, strict=True)
        self._draft.learn(
            [t for row, tree in pairs if row for t in (row[-1], *tree.tokens)], logits
        )
        return logits, starts

    def _known(self, token: int) -> list[int]:
        table = self._draft.candidates
        assert table is not None
        found: list[int] = table[token].tolist()
        return found


class _ExitRun:
    def __init__(self, inference: Inference, batch_size: int, adapter: ExitAdapter) -> None:
        layers, cut = range(len(inference.model.layers)), adapter.exit_layer
        self._early = _Layers(inference, batch_size, layers[:cut])
        self._late = _Layers(inference, batch_size, layers[cut:])
        self._adapter = AdapterStep(adapter, inference, batch_size)
        # Of each sequence, hidden states that have passed the early layers, but not yet the late
        # ones, or not yet the adapter, which waits until something is drafted.
        self._waiting: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self._unread: list[list[Tensor]] = [[] for _ in range(batch_size)]

    def propose(self, rows_B: Rows) -> Tensor:
        self._pass_early(rows_B)
        unread = [row if asking else [] for row, asking in zip(self._unread, rows_B, strict=True)]
        lengths = [sum(map(len, row)) for row in unread]
        states_TD = torch.cat([state for row in unread for state in row])
        for row in unread:
            row.clear()
        adapted_TD = self._adapter(states_TD, lengths)
        last_GD = _last(adapted_TD, lengths, [min(length, 1) for length in lengths])
        return self._early.inference.project(last_GD)

    def verify(self, rows_B: Rows, wanted: Sequence[int]) -> Tensor:
        self._pass_early(rows_B)
        states = [state for row in self._waiting for state in row]
        lengths = [sum(map(len, row)) for row in self._waiting]
        self._waiting = [[] for _ in self._waiting]
        final_TD = self._late.run(torch.cat(states), lengths)
        return self._late.logits(final_TD, lengths, wanted)

    def rewind(self, counts: Sequence[int]) -> None:
        # Between rounds nothing waits: what has passed the early layers was verified.
        for row, held, count in zip(self._unread, self._early.held, counts, strict=True):
            if row and held > count:
                states_TD = torch.cat(row)
                row[:] = [states_TD[: max(len(states_TD) - (held - count), 0)]]
        self._adapter.rewind(counts)
        self._early.rewind(counts)
        self._late.rewind(counts)

    def _pass_early(self, rows_B: Rows) -> None:
        missing = self._early.missing(rows_B)
        lengths = [len(row) for row in missing]
        if not any(lengths):
            return
        early_TD = self._early.run(self._early.embed(missing), lengths)
        for index, states_TD in enumerate(early_TD.split(lengths)):
            if len(states_TD):
                self._waiting[index].append(states_TD)
                self._unread[index].append(states_TD)


def _last(x_TD: Tensor, lengths: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Rows of the last `wanted` tokens of each sequence."""
    if list(lengths) == list(wanted):
        return x_TD
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
    return x_TD[torch.tensor(rows, dtype=torch.int64).to(x_TD.device)]
