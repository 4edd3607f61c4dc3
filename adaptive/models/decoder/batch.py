"""Sequences that go on together: they begin and leave at any time, each as if alone.

Shape legend: G sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.inference import Choice, Inference
from adaptive.routing.tape import RoutingRecord

_PIECE = 2048
"""Tokens of prompts in one pass: longer ones go in pieces, which bounds what a pass holds."""


class Pass(NamedTuple):
    """What went through the model at once.

    Attributes:
        lengths: tokens of each sequence.
        keys: how many each of them attended to at most, for each sequence.
        records: what routed layers did.
    """

    lengths: Sequence[int]
    keys: Sequence[int]
    records: Sequence[Choice | RoutingRecord]


Note = Callable[[Pass], None]
"""Is told of every pass."""


def _ignore(done: Pass) -> None:
    return


class Batch:
    """Sequences under way, and their cache.

    Args:
        inference: of the model.

    Attributes:
        cache: of the sequences, in the order in which they began.
    """

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.cache = Cache(inference.model, 0)

    def begin(self, prompts: Sequence[Sequence[int]], note: Note = _ignore) -> Tensor:
        """Let sequences begin behind those that are there; logits [G, V] behind their prompts.

        Prompts go in pieces, all together. A pass that is noted is one of the new sequences only.
        """
        cache = Cache(self.inference.model, len(prompts))
        each = max(_PIECE // len(prompts), 1)
        done = [0] * len(prompts)
        last: list[Tensor | None] = [None] * len(prompts)
        while any(start < len(prompt) for start, prompt in zip(done, prompts, strict=True)):
            pieces = [
                prompt[start : start + each] for start, prompt in zip(done, prompts, strict=True)
            ]
            hidden_TD = self._pass(pieces, cache, note)
            end = 0
            for index, piece in enumerate(pieces):
                end += len(piece)
                done[index] += len(piece)
                if piece:
                    last[index] = hidden_TD[end - 1]
        if self.cache.seen:
            self.cache.join(cache)
        else:
            self.cache.take(cache)
        return self.inference.logits(torch.stack([row for row in last if row is not None]))

    def step(self, tokens: Sequence[int | None], note: Note = _ignore) -> Tensor:
        """A token for each sequence, or None where one rests; logits [G, V] of the others."""
        pieces = [[] if token is None else [token] for token in tokens]
        return self.inference.logits(self._pass(pieces, self.cache, note))

    def stay(self, rows: Sequence[int]) -> None:
        """Keep some sequences; the others leave."""
        if len(rows) < len(self.cache.seen):
            self.cache.select(rows)

    def _pass(self, pieces: Sequence[Sequence[int]], cache: Cache, note: Note) -> Tensor:
        lengths = [len(piece) for piece in pieces]
        tokens = cache.next_tokens(lengths)
        ids = [token for piece in pieces for token in piece]
        hidden_TD = self.inference.hidden(ids, tokens, cache)
        records: list[Choice | RoutingRecord] = [*self.inference.choices, *self.inference.records]
        note(Pass(lengths, list(cache.seen), records))
        return hidden_TD
