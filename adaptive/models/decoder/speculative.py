"""Self-speculative decoding: a model's own first layers draft, the whole model verifies.

The text is that of plain greedy decoding; only the time differs.

Shape legend: T packed tokens, D width, V vocabulary, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.models.decoder.cache import Cache, LayerCache
from adaptive.models.decoder.decode_depth import refuse_non_causal, run_layers
from adaptive.models.decoder.generate import check_whole
from adaptive.models.decoder.layers import Attention, KeyValueCache, RMSNorm
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculation.verification import best_acceptance, k_seq
from adaptive.routing.layout import TokenLayout

__all__ = ["Drafting", "ExitAdapter", "Speculator", "best_acceptance", "distil_adapter", "k_seq"]


class ExitAdapter(nn.Module):
    """Makes hidden states of an early layer fit the model's output projection.

    `norm_out(x + attention(norm_in(x)))`: one attention and two norms, no feed-forward.

    Source: Kangaroo, arXiv 2404.18911, section 3.1.
    """

    def __init__(
        self, dim: int, num_heads: int, *, exit_layer: int, rope_base: float = 10000.0
    ) -> None:
        super().__init__()
        self.exit_layer = exit_layer
        self.norm_in, self.norm_out = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, num_heads, rope_base=rope_base)

    @staticmethod
    def of(model: Decoder, exit_layer: int) -> ExitAdapter:
        """An untrained adapter behind the first `exit_layer` layers of a model.

        It has the model's device and dtype.

        Raises:
            ValueError: if that leaves no layer to draft with, or none to verify.
        """
        if not 1 <= exit_layer < len(model.layers):
            raise ValueError(
                f"exit_layer={exit_layer}: must be between 1 and {len(model.layers) - 1}"
            )
        config = model.config
        adapter = ExitAdapter(
            config.dim, config.num_heads, exit_layer=exit_layer, rope_base=config.rope_base
        )
        return adapter.to(model.embedding.weight)

    def forward(
        self, x_TD: Tensor, *, layout: TokenLayout, cache: KeyValueCache | None = None
    ) -> Tensor:
        update_TD = self.attention(self.norm_in(x_TD), layout=layout, cache=cache)
        return self.norm_out(x_TD + update_TD)


def distil_adapter(
    model: Decoder, adapter: ExitAdapter, batches: Iterable[Tensor], *, learning_rate: float = 1e-3
) -> Iterator[tuple[float, float]]:
    """Train an adapter to predict what the whole model predicts. Freezes the model's weights.

    One AdamW step for each batch of token ids int64 [B, S]. Yields, for each, the cross-entropy
    against the model's distribution (nats a token) and the share of tokens for which both find
    the same token likeliest, which is about the share of drafts that will be accepted.
    """
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.0)
    for ids_BS in batches:
        layout = TokenLayout.dense(ids_BS.shape[0], ids_BS.shape[1], ids_BS.device)
        with torch.no_grad():
            early_TD = run_layers(
                model, model.embedding(ids_BS.flatten()), layout, range(adapter.exit_layer)
            )
            late = range(adapter.exit_layer, len(model.layers))
            final_TD = run_layers(model, early_TD, layout, late)
            target_TV = model.output(model.norm(final_TD)).float()
        logits_TV = model.output(adapter(early_TD, layout=layout)).float()
        loss = F.cross_entropy(logits_TV, target_TV.softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        same = (logits_TV.argmax(-1) == target_TV.argmax(-1)).float().mean()
        yield loss.item(), same.item()


@dataclass
class Drafting:
    """A generation under way, and what its drafts were worth.

    Attributes:
        tokens: ids made so far, after the prompt.
        drafted, accepted: drafted tokens, and those that the whole model confirmed.
        rounds: passes through the late layers after the prompt's, which makes the first token.
    """

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were confirmed."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_round(self) -> float:
        """Tokens made for each round, the prompt's own not counted; 1 for plain decoding."""
        # The first token comes with the prompt, before any round.
        return (len(self.tokens) - 1) / self.rounds if self.rounds else 1.0


class Speculator:
    """Drafts with the first layers of a model and verifies with the rest.

    A round drafts token by token through the layers before the exit and the adapter, until the
    draft's probability falls below `threshold` or `max_draft` tokens are drafted. Then all drafted
    tokens pass the late layers at once; those that the model itself finds likeliest stay, and its
    own token follows the last of them. The early layers are never computed twice, and rejected
    tokens leave every cache.

    Args:
        model: in evaluation mode, routed causally.
        adapter: trained for it (`distil_adapter`).
        threshold: least probability of a draft to go on; 0 drafts `max_draft` tokens always.
        max_draft: most tokens of a round.

    Raises:
        ValueError: if an option is out of range, or the model looks at later tokens or is shared
            by ranks.

    Source: Kangaroo, arXiv 2404.18911, section 3.
    """

    def __init__(
        self, model: Decoder, adapter: ExitAdapter, *, threshold: float = 0.6, max_draft: int = 6
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: must be in [0, 1]")
        if max_draft < 1:
            raise ValueError(f"max_draft={max_draft}: must be at least 1")
        if not 1 <= adapter.exit_layer < len(model.layers):
            raise ValueError(
                f"exit_layer={adapter.exit_layer}: must be between 1 and {len(model.layers) - 1}"
            )
        check_whole(model)
        refuse_non_causal(model)
        self.model, self.adapter = model, adapter
        self.threshold, self.max_draft = threshold, max_draft

    @torch.no_grad()
    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, vocab_size: int | None = None
    ) -> Iterator[Drafting]:
        """Continue a prompt greedily; yields after every round, the same object.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: tokens to make; fewer where the model's `max_seq_len` is reached.
            vocab_size: ids from here on are never made.

        Raises:
            ValueError: an empty prompt, or one longer than the model's `max_seq_len`.
        """
        limit = self.model.config.max_seq_len
        if not 1 <= len(prompt) <= limit:
            raise ValueError(f"prompt of {len(prompt)} tokens: must be 1 to max_seq_len={limit}")
        steps = min(max_new_tokens, limit - len(prompt) + 1)
        if steps < 1:
            return
        run = _Run(self.model, self.adapter, vocab_size)
        early_TD, layout, _ = run.draft(list(prompt))
        made = Drafting([run.verify(early_TD, layout)[-1]])
        yield made
        while len(made.tokens) < steps:
            room = steps - len(made.tokens) - 1
            drafts, early_TD, layout = self._draft(run, made.tokens[-1], min(self.max_draft, room))
            likeliest = run.verify(early_TD, layout)
            pairs = zip(drafts, likeliest, strict=False)
            kept = next((n for n, (a, b) in enumerate(pairs) if a != b), len(drafts))
            run.forget(len(drafts) - kept)
            made.tokens += [*drafts[:kept], likeliest[kept]]
            made.drafted += len(drafts)
            made.accepted += kept
            made.rounds += 1
            yield made

    def _draft(self, run: _Run, token: int, most: int) -> tuple[list[int], Tensor, TokenLayout]:
        """Drafts behind `token`; early hidden states of it and of all drafts, and their layout."""
        drafts: list[int] = []
        states, layouts = [], []
        while True:
            early_TD, layout, logits_V = run.draft([token])
            states.append(early_TD)
            layouts.append(layout)
            if len(drafts) == most:
                break
            probability, best = logits_V.softmax(-1).max(-1)
            if probability < self.threshold:
                break
            token = int(best)
            drafts.append(token)
        positions = torch.cat([layout.positions for layout in layouts])
        cu_seqlens = torch.tensor([0, len(positions)], dtype=torch.int32).to(positions.device)
        return drafts, torch.cat(states), TokenLayout(cu_seqlens, len(positions), positions)


class _Run:
    """The caches of one generation, and the two halves of the model that fill them."""

    def __init__(self, model: Decoder, adapter: ExitAdapter, vocab_size: int | None) -> None:
        self._model, self._adapter, self._vocab_size = model, adapter, vocab_size
        self._device = model.embedding.weight.device
        self._cache = Cache(model, 1)
        self._adapter_cache = LayerCache(1, self._device)
        self._early = range(adapter.exit_layer)
        self._late = range(adapter.exit_layer, len(model.layers))

    def draft(self, tokens: list[int]) -> tuple[Tensor, TokenLayout, Tensor]:
        """Early hidden states of new tokens, their layout, and the draft's logits of the last."""
        ids_T = torch.tensor(tokens).to(self._device)
        layout = self._cache.next_positions(TokenLayout.from_lengths([len(tokens)], self._device))
        early_TD = run_layers(
            self._model, self._model.embedding(ids_T), layout, self._early, self._cache
        )
        adapted_TD = self._adapter(early_TD, layout=layout, cache=self._adapter_cache)
        return early_TD, layout, self._logits(adapted_TD[-1])

    def verify(self, early_TD: Tensor, layout: TokenLayout) -> list[int]:
        """What the whole model finds likeliest after each of these tokens."""
        final_TD = run_layers(self._model, early_TD, layout, self._late, self._cache)
        return self._logits(self._model.norm(final_TD)).argmax(-1).tolist()

    def forget(self, tokens: int) -> None:
        """Take the last tokens out of every cache."""
        if tokens == 0:
            return
        counts_B = self._cache.counts - tokens
        self._cache.rewind(counts_B)
        self._adapter_cache.rewind(counts_B)

    def _logits(self, normed: Tensor) -> Tensor:
        return self._model.output(normed)[..., : self._vocab_size]
