"""Text of a model of transformers on a terminal, as it comes.

Shape legend: B = 1 rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import torch

from adaptive.models.decoder.generate import Sampling
from adaptive.routing.tape import RoutingRecord, RoutingTape
from launch.checkpoint.models import SavedModel
from launch.data.tokenizer import Tokenizer
from launch.generation.text import streaming_decoder
from launch.run.errors import BadInput
from launch.run.terminal import shown


def write_text(
    saved: SavedModel,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    max_tokens: int,
    end: int | None,
    cached: bool,
) -> None:
    """Print the prompt and what the model goes on with; the last line, on standard error, is how
    fast it was.

    Args:
        saved: holds the model.
        prompt: token ids, at least one.
        tokenizer: of the run.
        sampling: how to draw.
        generator: draws, on the model's device.
        max_tokens: to draw.
        end: the token that ends a text; None: none does.
        cached: False computes the whole text for every token.
    """
    longest = saved.config.model.max_seq_len
    if not 1 <= len(prompt) <= longest:
        raise BadInput(f"--prompt of {len(prompt)} tokens: must have from 1 to {longest}")
    decode, begun, count = streaming_decoder(tokenizer), time.perf_counter(), 0
    for token in prompt:
        sys.stdout.write(shown(decode(token, False), sys.stdout))
    with RoutingTape(saved.model) as tape:
        for token in continued(
            saved.model,
            prompt,
            sampling,
            generator,
            vocab_size=tokenizer.vocab_size,
            count=min(max_tokens, longest - len(prompt)),
            cached=cached,
        ):
            count += 1
            if token == end:
                break
            sys.stdout.write(shown(decode(token, False), sys.stdout))
            sys.stdout.flush()
    sys.stdout.write(decode(None, True) + "\n")
    seconds = time.perf_counter() - begun
    print(
        f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s{_shares(tape.records)}",
        file=sys.stderr,
    )


@torch.no_grad()
def continued(
    model: torch.nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator | None,
    *,
    vocab_size: int,
    count: int,
    cached: bool = True,
) -> Iterator[int]:
    """The tokens that a causal model of transformers goes on with; see `write_text`."""
    device = next(model.parameters()).device
    text = torch.tensor([list(prompt)], device=device)
    new, cache = text, None
    for _ in range(count):
        output = model(input_ids=new if cached else text, past_key_values=cache, use_cache=cached)
        cache = output.past_key_values if cached else None
        logits_BV = output.logits[:, -1, :vocab_size].float()
        new = sampling.draw(logits_BV, generator)[:, None]
        text = torch.cat([text, new], 1)
        yield int(new)


def _shares(records: Sequence[RoutingRecord]) -> str:
    """The share of tokens that routed layers computed."""
    depth = [r for r in records if r.chosen is not None and r.chosen.dim() == 1]
    if not depth:
        return ""
    computed = sum(int(r.executed) for r in depth)
    share = computed / max(sum(int(r.tokens) for r in depth), 1)
    layers = len({r.name for r in depth})
    return f", {share:.0%} of the tokens computed in {layers} routed layers"
