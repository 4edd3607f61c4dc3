"""Speculative sampling: something cheap drafts, the model verifies several tokens at once.

What comes out has the distribution of plain sampling, for every sequence of a batch; only the time
differs. Three parts: a draft (`speculation.drafts`), a controller (`speculation.controllers`) and a
verification (`speculation.verification`).

Shape legend: B sequences, N drafted tokens of all sequences, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptive.models.decoder.decode_depth import refuse_non_causal
from adaptive.models.decoder.generate import (
    Sampling,
    check_prompts,
    check_whole,
)
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculation.controllers import Controller, Fixed
from adaptive.models.decoder.speculation.drafts import Draft, DraftRun
from adaptive.models.decoder.speculation.verification import best_acceptance, chain, k_seq

__all__ = ["VERIFICATIONS", "Speculation", "best_acceptance", "k_seq", "speculate"]

VERIFICATIONS = ("chain", "greedy")


@dataclass
class Speculation:
    """A generation under way, and what its drafts were worth.

    Attributes:
        tokens: ids made so far of each sequence, after its prompt.
        drafted, accepted: drafted tokens of all sequences, and those that were taken.
        rounds: passes of a sequence through the whole model.
    """

    tokens: list[list[int]]
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were taken."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a pass through the whole model makes; 1 for plain decoding."""
        return sum(map(len, self.tokens)) / self.rounds if self.rounds else 1.0


@dataclass
class _Proposal:
    """Drafted tokens of each sequence, and the distributions that they were drawn from."""

    tokens: list[list[int]]
    probabilities: list[list[Tensor]] = field(default_factory=list)


@torch.no_grad()
def speculate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    draft: Draft,
    *,
    max_new_tokens: int,
    controller: Controller | None = None,
    verification: str = "chain",
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    end: int | None = None,
    inference: Inference | None = None,
) -> Iterator[Speculation]:
    """Continue prompts of any lengths together; yields after every round, the same object.

    Tokens are distributed as those of `generate`; at temperature 0 they are the same. (Several
    tokens in one product round differently from one at a time: where two are equally likely to the
    last digit, texts may differ there.)

    Args:
        model: in evaluation mode, routed causally.
        prompts: token ids, at least one each.
        draft: what drafts.
        max_new_tokens: tokens to make for each sequence; fewer where it reaches the model's
            `max_seq_len`.
        controller: how many; by default always 4.
        verification: "chain" (arXiv 2211.17192), or "greedy", the same at temperature 0 only.
        sampling: of the model and of the draft alike; by default the model's own distribution.
        generator: of the draws, on the model's device.
        vocab_size: ids from here on are never made.
        end: the token that ends a text; None: none does.
        inference: of the model, made before; None: made here.

    Raises:
        ValueError: an unknown verification, or "greedy" at another temperature; a model that looks
            at later tokens or is shared by ranks; a prompt that is empty or too long; a draft that
            is not for this model.
    """
    sampling = Sampling() if sampling is None else sampling
    if verification not in VERIFICATIONS:
        raise ValueError(f"verification={verification}: must be {' or '.join(VERIFICATIONS)}")
    if verification == "greedy" and sampling.temperature != 0:
        raise ValueError(
            f"temperature={sampling.temperature}: must be 0 for verification=greedy; chain "
            "samples exactly"
        )
    check_whole(model)
    refuse_non_causal(model)
    check_prompts(model, prompts)
    controller = Fixed() if controller is None else controller
    if inference is None:
        inference = Inference(model, rows=len(prompts) * (controller.limit + 1))
    run = draft.begin(inference, len(prompts))
    made = Speculation([[] for _ in prompts])
    texts = [list(prompt) for prompt in prompts]
    limits = [min(max_new_tokens, model.config.max_seq_len - len(prompt) + 1) for prompt in prompts]
    while True:
        going = [
            index
            for index, tokens in enumerate(made.tokens)
            if len(tokens) < limits[index] and (end is None or tokens[-1:] != [end])
        ]
        if not going:
            return
        alive = set(going)
        begun = time.perf_counter()
        rows = [text if index in alive else [] for index, text in enumerate(texts)]
        # The model's own token follows the last draft.
        most = [
            min(controller.most(), limits[index] - len(made.tokens[index]) - 1) if row else 0
            for index, row in enumerate(rows)
        ]
        proposal = _propose(run, rows, most, controller, sampling, generator, vocab_size)
        drafted_at = time.perf_counter()
        with_drafts = rows
        if any(proposal.tokens):
            with_drafts = [[*row, *new] for row, new in zip(rows, proposal.tokens, strict=True)]
        wanted = [len(proposal.tokens[index]) + 1 if row else 0 for index, row in enumerate(rows)]
        logits_TV = run.verify(with_drafts, wanted)[:, :vocab_size]
        if any(proposal.tokens):
            q_TV = sampling.probabilities(logits_TV).double()
            kept, last = _chain(proposal, q_TV, wanted, going, generator)
        else:
            kept, last = [0] * len(going), sampling.draw(logits_TV, generator).tolist()
        controller.learn(
            [len(proposal.tokens[index]) for index in going],
            kept,
            draft_seconds=drafted_at - begun,
            verify_seconds=time.perf_counter() - drafted_at,
        )
        counts = [model.config.max_seq_len] * len(rows)
        for index, count, token in zip(going, kept, last, strict=True):
            drafts = proposal.tokens[index]
            new = [*drafts[:count], token]
            if end is not None and end in new:
                new = new[: new.index(end) + 1]
            counts[index] = len(texts[index]) + count
            made.tokens[index] += new
            texts[index] += new
            made.drafted += len(drafts)
            made.accepted += count
            made.rounds += 1
        run.rewind(counts)
        yield made


def _propose(
    run: DraftRun,
    rows_B: Sequence[list[int]],
    most: Sequence[int],
    controller: Controller,
    sampling: Sampling,
    generator: torch.Generator | None,
    vocab_size: int | None,
) -> _Proposal:
    """Draft up to `most` tokens behind each row, all rows together, each as long as it goes on."""
    made = _Proposal([[] for _ in rows_B], [[] for _ in rows_B])
    drafting = [index for index, count in enumerate(most) if count > 0]
    while drafting:
        asking = set(drafting)
        rows = [
            [*row, *made.tokens[index]] if index in asking else []
            for index, row in enumerate(rows_B)
        ]
        logits_GV = run.propose(rows)[:, :vocab_size].float()
        confidence = logits_GV.softmax(-1).amax(-1).nan_to_num(0).tolist()
        possible = logits_GV.isfinite().any(-1).tolist()
        # Before a token is drawn: whether to go on must not depend on which one it is.
        going = [
            place
            for place in range(len(drafting))
            if possible[place] and controller.go_on(confidence[place])
        ]
        if not going:
            break
        probability_GV = sampling.probabilities(logits_GV[_rows(going, logits_GV)])
        drawn = torch.multinomial(probability_GV, 1, generator=generator).squeeze(1).tolist()
        drafting = [drafting[place] for place in going]
        for index, token, probability_V in zip(drafting, drawn, probability_GV, strict=True):
            made.tokens[index].append(token)
            made.probabilities[index].append(probability_V)
        drafting = [index for index in drafting if len(made.tokens[index]) < most[index]]
    return made


def _chain(
    proposal: _Proposal,
    q_TV: Tensor,
    wanted: Sequence[int],
    going: Sequence[int],
    generator: torch.Generator | None,
) -> tuple[list[int], list[int]]:
    """For each sequence that goes on, how many drafts are taken, and the token that follows."""
    starts = torch.tensor([0, *wanted]).cumsum(0).tolist()
    drafted = [token for tokens in proposal.tokens for token in tokens]
    taken: list[bool] = []
    next_BV = q_TV[_rows([starts[index + 1] - 1 for index in going], q_TV)]
    kept = [len(proposal.tokens[index]) for index in going]
    if drafted:
        places = [
            starts[index] + place for index in going for place in range(len(proposal.tokens[index]))
        ]
        p_NV = torch.stack([p for row in proposal.probabilities for p in row]).double()
        q_NV = q_TV[_rows(places, q_TV)]
        token_N1 = _rows(drafted, q_TV)[:, None]
        p_N, q_N = (x.gather(1, token_N1).squeeze(1) for x in (p_NV, q_NV))
        uniform_N = torch.rand(
            len(drafted), dtype=q_TV.dtype, device=q_TV.device, generator=generator
        )
        taken = (uniform_N * p_N < q_N).tolist()
        begin = 0
        rejected, first = [], []
        for row, index in enumerate(going):
            count = len(proposal.tokens[index])
            if False in taken[begin : begin + count]:
                kept[row] = taken.index(False, begin) - begin
                rejected.append(row)
                first.append(begin + kept[row])
            begin += count
        if rejected:
            first_R = _rows(first, q_NV)
            residual_RV = chain(p_NV[first_R], q_NV[first_R]).residual
            next_BV.index_copy_(0, _rows(rejected, q_NV), residual_RV)
    last = torch.multinomial(next_BV, 1, generator=generator).squeeze(1).tolist()
    return kept, last


def _rows(numbers: Sequence[int], like: Tensor) -> Tensor:
    """int64 numbers where `like` is: a list as an index would be copied to a device, and wait."""
    return torch.tensor(numbers, dtype=torch.int64).to(like.device)
