"""Sampling from a decoder, one token at a time, with a cache.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adaptive.blocks.protocol import RoutedBlock
from adaptive.flops import FlopCounter, Work, records_by_module
from adaptive.models.decoder.batch import Batch, Pass
from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.inference import Choice, Inference
from adaptive.models.decoder.model import Decoder
from adaptive.routing.tape import RoutingRecord, RoutingTape


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only, of equal ones the first; None: from all.
        top_p: draw from the smallest set of most likely tokens that has this probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn with, float32 [B, V]: zero where one is cut off."""
        logits_BV = logits_BV.float()
        if self.temperature == 0:
            return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
        # From the likeliest down: no temperature, however low, makes a NaN of it.
        lowest = torch.finfo(logits_BV.dtype).tiny
        logits_BV = logits_BV - logits_BV.amax(1, keepdim=True)
        logits_BV = logits_BV / max(self.temperature, lowest)
        if self.top_k is not None and self.top_k < logits_BV.shape[1]:
            # Exactly k: logits of 16 bits are often equal to the k-th.
            order_BV = logits_BV.argsort(dim=1, descending=True, stable=True)
            logits_BV = logits_BV.scatter(1, order_BV[:, self.top_k :], -torch.inf)
        probability_BV = logits_BV.softmax(1)
        if self.top_p < 1:
            ordered_BV, order_BV = probability_BV.sort(dim=1, descending=True, stable=True)
            # A token stays if those before it have not reached top_p: the first always stays.
            before_BV = ordered_BV.cumsum(1) - ordered_BV
            ordered_BV = ordered_BV.masked_fill(before_BV >= self.top_p, 0)
            probability_BV = torch.zeros_like(ordered_BV).scatter_(1, order_BV, ordered_BV)
            probability_BV = probability_BV / probability_BV.sum(1, keepdim=True)
        return probability_BV

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B]: one token for each sequence."""
        if self.temperature == 0:
            return logits_BV.argmax(1)
        probability_BV = self.probabilities(logits_BV)
        return torch.multinomial(probability_BV, 1, generator=generator).squeeze(1)


@dataclass
class Generation:
    """What has been generated, and what it took.

    Attributes:
        prompts: token ids of each sequence.
        tokens: ids drawn so far, for each sequence.
        layers: for each sequence, of every token that went through the model: how many layers
            computed it. The last token drawn has not gone through.
        always: how many layers compute every token.
        key_values: the cache, or None where every step computes the whole prefix.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    layers: list[list[int]]
    always: int
    key_values: Cache | None
    _records: list[RoutingRecord | Choice] = field(default_factory=list)
    _new: list[Sequence[int]] = field(default_factory=list)
    _keys: list[Sequence[int]] = field(default_factory=list)
    _logits: int = 0

    def executed_flops(self, model: Decoder) -> float:
        """Operations of all forwards so far; logits were computed of last tokens only."""
        records = [r.record() if isinstance(r, Choice) else r for r in self._records]
        told = {record.name for record in records}
        # Inside a layer that skipped every token, nothing ran.
        records += [
            RoutingRecord(name=name, kind=module.kind, tokens=0, executed=0)
            for name, module in model.named_modules()
            if isinstance(module, RoutedBlock) and name not in told
        ]
        return self._operations(model, FlopCounter(records_by_module(model, records)))

    def nominal_flops(self, model: Decoder) -> float:
        """Operations of a dense model that generates the same tokens with a cache."""
        return self._operations(model, FlopCounter(nominal=True))

    def _operations(self, model: Decoder, counter: FlopCounter) -> float:
        new, keys = (
            torch.tensor([n for step in steps for n in step], dtype=torch.float64)
            for steps in (self._new, self._keys)
        )
        model.count_layers(counter, Work(new, new, keys))
        counter(model.output, Work.dense(1, self._logits))
        return float(counter.total().forward)

    def _note(self, model: Decoder, rows: Sequence[int], done: Pass) -> None:
        """Count a pass of the given sequences."""
        _count_layers(model, self, rows, done)
        self._records += done.records
        self._new.append(done.lengths)
        self._keys.append(done.keys)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    cached: bool = True,
    end: int | None = None,
    inference: Inference | None = None,
) -> Iterator[Generation]:
    """Continue prompts of any lengths together; yields after every token, the same object.

    Each sequence stops at `max_new_tokens`, behind `end`, or where it reaches the model's
    `max_seq_len`, whatever those beside it do.

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: tokens to draw for each sequence.
        sampling: how to draw; by default from the model's own distribution.
        generator: of the draws, on the model's device.
        vocab_size: ids from here on are never drawn (a model's vocabulary may be padded).
        cached: False computes the whole prefix at every step, which is what a model that does not
            route causally needs (see `non_causal_layers`).
        end: the token that ends a text: a sequence that draws it rests from then on; None: none.
        inference: of the model, made before; None: made here.

    Raises:
        ValueError: an empty prompt, or one longer than the model's `max_seq_len`; a model that
            tensor or context ranks share.
    """
    check_whole(model)
    check_prompts(model, prompts)
    sampling = Sampling() if sampling is None else sampling
    batch = None
    if cached:
        batch = Batch(Inference(model, rows=len(prompts)) if inference is None else inference)
    made = Generation(
        [list(prompt) for prompt in prompts],
        [[] for _ in prompts],
        [[] for _ in prompts],
        len(model.layers),
        None if batch is None else batch.cache,
    )
    going: list[int] = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        before, going = (
            going,
            [
                index
                for index in unfinished_sequences(model, made.prompts, made.tokens)
                if end is None or made.tokens[index][-1:] != [end]
            ],
        )
        if not going:
            return
        # `no_grad` must not stay entered while the caller has control.
        with torch.no_grad():
            if batch is None:
                logits_GV = _whole_prefixes(model, made, going)
            else:
                logits_GV = _next_logits(model, made, batch, before, going)
            made._logits += len(going)
            drawn = sampling.draw(logits_GV[:, :vocab_size], generator).tolist()
        for sequence, token in zip(going, drawn, strict=True):
            made.tokens[sequence].append(token)
        yield made


def unfinished_sequences(
    model: Decoder, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[int]:
    """Which sequences have room for another token: the last one need not go through the model."""
    lengths = [len(prompt) + len(drawn) for prompt, drawn in zip(prompts, tokens, strict=True)]
    return [index for index, length in enumerate(lengths) if length <= model.config.max_seq_len]


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for an empty prompt, or one longer than the model's `max_seq_len`."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) < 1:
        raise ValueError("prompt: must have at least one token")
    if max(lengths) > model.config.max_seq_len:
        raise ValueError(
            f"prompt of {max(lengths)} tokens: must be at most "
            f"max_seq_len={model.config.max_seq_len}"
        )


def check_whole(model: Decoder) -> None:
    """Raise ValueError if this rank holds a part of the model, or of the tokens, only."""
    mesh = model.mesh
    for name, size in (("tensor", mesh.tensor), ("context", mesh.context)):
        if size > 1:
            raise ValueError(
                f"{name}={size}: must be 1 to generate; load the checkpoint on one rank"
            )


def non_causal_layers(model: nn.Module) -> list[str]:
    """Names of routed layers whose evaluation looks at later tokens: they cannot sample."""
    routed = ((n, m) for n, m in model.named_modules() if isinstance(m, RoutedBlock))
    return [name for name, module in routed if not module.causal]


def _next_logits(
    model: Decoder, made: Generation, batch: Batch, before: Sequence[int], going: Sequence[int]
) -> Tensor:
    """Logits of the token after the last of each of G sequences, [G, V]."""

    rows = range(len(made.prompts)) if model.stack is not None else going

    def note(done: Pass) -> None:
        made._note(model, rows, done)

    if not made._new:
        return batch.begin(made.prompts, note)
    if model.stack is None:
        batch.stay([before.index(index) for index in going])
    # A model of segments keeps those that have ended: their rows lie in one table.
    return batch.step([made.tokens[row][-1] if row in going else None for row in rows], note)


def _whole_prefixes(model: Decoder, made: Generation, going: Sequence[int]) -> Tensor:
    """The same without a cache: everything is computed anew."""
    device = model.embedding.weight.device
    rows = [made.prompts[index] + made.tokens[index] for index in going]
    lengths = [len(row) for row in rows]
    width = max(lengths)
    ids_GS = torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(device)
    mask_GS = torch.arange(width) < torch.tensor(lengths)[:, None]
    with RoutingTape(model) as tape:
        hidden_TD, _ = model.hidden_states(ids_GS, mask_GS.to(device))
    for index in going:
        made.layers[index] = []
    made._note(model, going, Pass(lengths, lengths, tape.records))
    return model.output(hidden_TD[(torch.tensor(lengths).cumsum(0) - 1).to(device)])


def _count_layers(model: Decoder, made: Generation, rows: Sequence[int], done: Pass) -> None:
    """Add to `made.layers` how many layers computed each token of this pass."""
    tokens = sum(done.lengths)
    computed = [len(model.layers)] * tokens
    names = {f"layers.{index}" for index in range(len(model.layers))}
    routed: set[str] = set()
    for record in done.records:
        name = record.module[0] if isinstance(record, Choice) else record.name
        chosen = record.chosen
        if isinstance(chosen, Tensor):
            chosen = chosen.tolist() if chosen.dim() == 1 else None
        if chosen is None:
            continue
        inside = {name} & names
        if name == "stack" and model.stack is not None:
            inside = {f"layers.{index}" for index in range(model.stack.first, model.stack.last)}
        if inside:
            routed |= inside
            fewer = len(inside)
            computed = [n if c else n - fewer for n, c in zip(computed, chosen, strict=True)]
    made.always = len(names) - len(routed)
    start = 0
    for index, count in zip(rows, done.lengths, strict=True):
        made.layers[index] += computed[start : start + count]
        start += count
