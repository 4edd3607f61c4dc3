"""Continuous batching: prompts of any lengths share passes; each leaves when it ends, others enter.

Shape legend: G sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from adaptive.models.decoder.batch import Batch
from adaptive.models.decoder.generate import (
    Sampling,
    check_prompts,
    check_whole,
    non_causal_layers,
)
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.model import Decoder


@dataclass
class Continuation:
    """A prompt and what has been drawn behind it.

    Attributes:
        key: what its caller knows it by; its draws come from a generator of this number.
        prompt: token ids.
        tokens: ids drawn so far.
        ended: whether the last is the token that ends texts.
    """

    key: int
    prompt: Sequence[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def generate_all(
    model: Decoder,
    prompts: Iterable[tuple[int, Sequence[int]]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    end: int | None = None,
    inference: Inference | None = None,
) -> Iterator[Continuation]:
    """Continue any number of prompts, at most `batch_size` at once; yields each when it ends.

    What a prompt draws depends on `seed` and its key, not on those beside it (products of other
    numbers of rows round differently, as in `generate`).

    Args:
        model: in evaluation mode, routed causally.
        prompts: key and token ids of each, taken as places become free.
        max_new_tokens: tokens of each; fewer where it reaches the model's `max_seq_len`.
        batch_size: most sequences in one pass.
        sampling: how to draw; by default from the model's own distribution.
        seed: of all draws.
        vocab_size: ids from here on are never drawn.
        end: the token that ends a text; None: none does.
        inference: of the model, made before; None: made here.

    Raises:
        ValueError: a model that ranks share or that looks at later tokens; an empty prompt, or
            one that is longer than the model's `max_seq_len`, when its turn comes.
    """
    check_whole(model)
    if looking_ahead := non_causal_layers(model):
        raise ValueError(f"{looking_ahead[0]}: chooses tokens by looking at later ones")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    sampling = Sampling() if sampling is None else sampling
    inference = Inference(model, rows=batch_size) if inference is None else inference
    device, waiting = model.embedding.weight.device, iter(prompts)
    batch, going = Batch(inference), list[Continuation]()

    def draw(logits_GV: Tensor, of: Sequence[Continuation]) -> None:
        for one, token in zip(of, _drawn(logits_GV[:, :vocab_size], of, sampling), strict=True):
            one.tokens.append(token)
            one.ended = token == end

    def over(one: Continuation) -> bool:
        room = model.config.max_seq_len - len(one.prompt) + 1
        return one.ended or len(one.tokens) >= min(max_new_tokens, room)

    while True:
        # Rows of a model of segments lie in one table: its sequences begin and leave together.
        if model.stack is None or not going:
            new = []
            for key, prompt in islice(waiting, batch_size - len(going)):
                check_prompts(model, [prompt])
                generator = torch.Generator(device).manual_seed(_mixed(seed, key))
                new.append(Continuation(key, prompt, generator))
            if new:
                draw(batch.begin([one.prompt for one in new]), new)
                yield from filter(over, new)
                going += new
        if not going:
            return
        staying = [row for row, one in enumerate(going) if not over(one)]
        if model.stack is None or not staying:
            going = [going[row] for row in staying]
            if not going:
                batch = Batch(inference)
                continue
            batch.stay(staying)
        moving = [one for one in going if not over(one)]
        fed = [None if over(one) else one.tokens[-1] for one in going]
        draw(batch.step(fed), moving)
        yield from filter(over, moving)


def _drawn(logits_GV: Tensor, of: Sequence[Continuation], sampling: Sampling) -> list[int]:
    """A token for each sequence, from its own generator."""
    if sampling.temperature == 0:
        return sampling.draw(logits_GV).tolist()
    probability_GV = sampling.probabilities(logits_GV)
    tokens = [
        torch.multinomial(probability_V, 1, generator=one.generator)
        for probability_V, one in zip(probability_GV, of, strict=True)
    ]
    return torch.cat(tokens).tolist()


def _mixed(seed: int, key: int) -> int:
    """A seed for each pair."""
    return (seed * 0x9E3779B97F4A7C15 + key) % 2**63
