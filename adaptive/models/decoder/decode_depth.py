"""How deep each token goes at decode time: SkipDecode's schedule, on any decoder.

Shape legend: B sequences, T packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.generate import (
    Sampling,
    check_prompts,
    check_whole,
    non_causal_layers,
    unfinished_sequences,
)
from adaptive.models.decoder.model import Decoder
from adaptive.routing.layout import TokenLayout


@dataclass(frozen=True)
class SkipDecode:
    """Layers that run at each generated position: fewer and fewer, the same for a whole batch.

    Position p (0 is the first token after the prompt) runs `depth(p)` layers, falling linearly
    from `first` to `last` over `length` positions. The first `warm_up` layers always run; the
    others that run are the top ones, so that what is skipped lies in the lower middle. The layers
    of a later position are a subset of those of any earlier one: every key and value that a token
    asks for is in the cache, and nothing is computed again.

    Attributes:
        num_layers: of the model.
        first, last: layers that run at position 0 and from position `length - 1` on.
        length: positions over which the depth falls; a generation's `max_new_tokens`.
        warm_up: lowest layers that always run.

    Raises:
        ValueError: if a number is out of range.

    Source: SkipDecode, arXiv 2307.02628, section 3.
    """

    num_layers: int
    first: int
    last: int
    length: int
    warm_up: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.last <= self.first <= self.num_layers:
            raise ValueError(
                f"last={self.last}, first={self.first}: must satisfy "
                f"1 <= last <= first <= {self.num_layers}"
            )
        if not 0 <= self.warm_up <= self.last:
            raise ValueError(f"warm_up={self.warm_up}: must be between 0 and last={self.last}")
        if self.length < 1:
            raise ValueError(f"length={self.length}: must be at least 1")

    def depth(self, position: int) -> int:
        """Layers that run at a generated position."""
        way = min(max(position, 0), self.length - 1) / max(self.length - 1, 1)
        return self.first - int(way * (self.first - self.last) + 0.5)

    def layers(self, position: int) -> list[int]:
        """Indices of the layers that run, ascending."""
        top = self.depth(position) - self.warm_up
        return [*range(self.warm_up), *range(self.num_layers - top, self.num_layers)]


def run_layers(
    model: Decoder,
    hidden_TD: Tensor,
    layout: TokenLayout,
    layers: Iterable[int],
    cache: Cache | None = None,
) -> Tensor:
    """Hidden states [T, D] that have passed the given layers only.

    Args:
        model: a decoder.
        hidden_TD: what enters the first of the layers.
        layout: of these tokens, with their positions in the whole sequence.
        layers: indices, ascending.
        cache: holds earlier tokens; a layer that is left out stores nothing.
    """
    for index in layers:
        held = {} if cache is None else {"cache": cache.layer(index)}
        hidden_TD = model.layers[index](hidden_TD, layout=layout, **held)
    return hidden_TD


@torch.no_grad()
def generate_at_depth(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    schedule: SkipDecode,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue prompts with fewer layers at every later position.

    Prompts run through all layers. Sequences of a batch share the schedule, whatever the lengths
    of their prompts: position 0 is each one's first new token.

    Args:
        model: in evaluation mode, routed causally.
        prompts: token ids, at least one each.
        schedule: layers of each generated position.
        max_new_tokens: tokens to draw for each sequence, which also ends at the model's
            `max_seq_len`, whatever those beside it do.
        sampling: how to draw; by default from the model's own distribution.
        generator: of the draws, on the model's device.
        vocab_size: ids from here on are never drawn.

    Returns:
        The new tokens of each sequence.

    Raises:
        ValueError: the schedule is for another number of layers, the model looks ahead or is
            shared by ranks, or a prompt is empty or longer than the model's `max_seq_len`.
    """
    if schedule.num_layers != len(model.layers):
        raise ValueError(
            f"num_layers={schedule.num_layers}: must be the model's {len(model.layers)}"
        )
    check_whole(model)
    refuse_non_causal(model)
    check_prompts(model, prompts)
    sampling = Sampling() if sampling is None else sampling
    device = model.embedding.weight.device
    cache = Cache(model, len(prompts))
    every = list(range(len(model.layers)))
    rows: list[list[int]] = [list(prompt) for prompt in prompts]
    drawn: list[list[int]] = [[] for _ in prompts]
    for position in range(max_new_tokens):
        going = unfinished_sequences(model, prompts, drawn)
        if not going:
            break
        rows = [row if index in going else [] for index, row in enumerate(rows)]
        lengths = [len(row) for row in rows]
        ids_T = torch.tensor([token for row in rows for token in row]).to(device)
        # The prompt gives the logits of position 0; its keys are needed in every layer.
        layers = every if position == 0 else schedule.layers(position)
        layout = cache.next_positions(TokenLayout.from_lengths(lengths, device))
        hidden_TD = run_layers(model, model.embedding(ids_T), layout, layers, cache)
        last_G = torch.tensor(lengths).cumsum(0)[going] - 1
        logits_GV = model.output(model.norm(hidden_TD[last_G.to(device)]))[:, :vocab_size]
        new = sampling.draw(logits_GV, generator).tolist()
        for sequence, token in zip(going, new, strict=True):
            drawn[sequence].append(token)
        rows = [tokens[-1:] for tokens in drawn]
    return drawn


def refuse_non_causal(model: Decoder) -> None:
    """Raise ValueError if some routed layer looks at later tokens, which sampling has not, or if
    the layers are not run one after another."""
    if model.stack is not None:
        raise ValueError(
            f"{model.stack.kind}: cannot be generated by single layers; generate without a depth "
            "schedule or drafts"
        )
    looking_ahead = non_causal_layers(model)
    if looking_ahead:
        raise ValueError(f"{looking_ahead[0]}: chooses tokens by looking at later ones")
