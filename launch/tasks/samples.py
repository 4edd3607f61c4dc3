"""Texts that a language model goes on with while it trains, from prompts that stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.models.decoder.generate import Sampling
from launch.tasks import Batch, TrainedModel


def continued(
    engine: TrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    logits: Callable[[nn.Module, Tensor, Tensor], Tensor],
    tokens: int,
    sampling: Sampling,
    vocab_size: int,
    longest: int,
    end: int | None = None,
) -> list[list[int]]:
    """What a model in training continues prompts with; every rank gets the same.

    Collective. Each token is a forward of the engine over the whole texts, since only those gather
    weights that ranks share (ZeRO 3); and rank 0 draws it, with a generator of its own.

    Args:
        engine: holds the model.
        prompts: token ids, at least one each, the same on every rank.
        logits: (model, ids, token mask) -> [B, S, V].
        tokens: to draw for each.
        sampling: how to draw.
        vocab_size: ids from here on are never drawn.
        longest: tokens at which a text ends.
        end: the token that ends a text.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [list(prompt) for prompt in prompts]
    engine.train(False)
    for _ in range(tokens):
        going = [
            place
            for place, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
            if len(text) < longest and not (len(text) > len(prompt) and text[-1] == end)
        ]
        if not going:
            break
        among = [texts[place] for place in going]
        logits_GV = _next_logits(engine, among, logits)[:, :vocab_size]
        drawn_G = sampling.draw(logits_GV, generator)
        if dist.is_initialized() and dist.get_world_size() > 1:
            on_device = drawn_G.to(engine.device)
            dist.broadcast(on_device, src=0)
            drawn_G = on_device.cpu()
        for place, token in zip(going, drawn_G.tolist(), strict=True):
            texts[place].append(token)
    engine.train()
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_logits(
    engine: TrainedModel,
    texts: Sequence[Sequence[int]],
    logits: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> Tensor:
    """Logits behind each text, float32 [texts, V] on the CPU."""
    lengths = torch.tensor([len(text) for text in texts])
    width = int(lengths.max())
    ids_BS = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask_BS = torch.arange(width) < lengths[:, None]

    def last(model: nn.Module, batch: Batch) -> Tensor:
        logits_BSV = logits(model, batch["input_ids"], batch["token_mask"])
        ends_B = batch["token_mask"].sum(1) - 1
        return logits_BSV[torch.arange(len(ends_B), device=ends_B.device), ends_B]

    with torch.no_grad():
        batch = {"input_ids": ids_BS, "token_mask": mask_BS}
        logits_BV: Tensor = engine.forward(batch, last)
    return logits_BV.float().cpu()


def shown_samples(prompts: Sequence[str], continuations: Sequence[str]) -> str:
    """Markdown: prompts in a quotation, and what the model went on with in a block of code."""
    parts = []
    for prompt, text in zip(prompts, continuations, strict=True):
        parts.append(f"prompt\n{_block(prompt)}\n\ncontinued\n{_block(text)}")
    return "\n\n---\n\n".join(parts)


def _block(text: str) -> str:
    """A block of code that no text ends: indented by four."""
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return "\n" + "\n".join(f"    {line}" for line in printable.split("\n"))
