"""The adapter that lets the first layers of a model draft, and its training.

Shape legend: B sequences, S sequence, T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.models.decoder.decode_depth import run_layers
from adaptive.models.decoder.inference import Inference, attention_step, norm_of
from adaptive.models.decoder.layer_cache import LayerCache
from adaptive.models.decoder.layers import Attention, KeyValueCache, RMSNorm
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.tokens import Tokens
from adaptive.routing.layout import TokenLayout


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


class AdapterStep:
    """An adapter as drafting runs it, and its keys and values.

    Args:
        adapter: of the model.
        inference: of the model.
        batch_size: sequences.
    """

    def __init__(self, adapter: ExitAdapter, inference: Inference, batch_size: int) -> None:
        model = inference.model
        places = model.config.max_seq_len
        self._norms = norm_of(adapter.norm_in), norm_of(adapter.norm_out)
        self._attention = attention_step(adapter.attention, places=places, rows=batch_size)
        self._cache = LayerCache(batch_size, model.embedding.weight.device)

    def __call__(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """[T, D], ready for the output projection, of the next tokens of each sequence."""
        positions = [
            position
            for start, count in zip(self._cache.held, lengths, strict=True)
            for position in range(start, start + count)
        ]
        tokens = Tokens(lengths, positions, x_TD.device)
        before, after = self._norms
        return after(self._attention(before(x_TD), x_TD, tokens, self._cache))

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence."""
        self._cache.rewind(counts)


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
