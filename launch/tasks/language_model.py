"""Next-token prediction on text, with a Decoder.

Shape legend: B rows, S tokens of a row, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.flops import Work
from adaptive.models.decoder.generate import Sampling, non_causal_layers
from adaptive.models.decoder.model import Decoder, DecoderConfig
from adaptive.observe.metric_log import MetricLog
from adaptive.routing.collapse import FluctuationProbe
from adaptive.routing.layout import TokenLayout, layout_from_documents
from launch.checkpoint.growth import grow_whole
from launch.checkpoint.state import WholeState
from launch.data.mixture import Mixture
from launch.data.packing import Row
from launch.data.prompts import first_tokens
from launch.data.text import Corpus, Source, TextConfig, open_corpus
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput
from launch.run.ranks import is_first
from launch.run.sections import RunConfig
from launch.run.terminal import command
from launch.tasks import Batch, Sums, Task, TrainedModel
from launch.tasks.pictures import show_routing
from launch.tasks.samples import continued, shown_samples
from parallel.context import own_context_rows
from parallel.mesh import Mesh
from parallel.rows import even_shards


class LanguageModelTask(Task):
    """Loss: cross-entropy of the next token, nats, mean over the targets of the global batch."""

    model_config: ClassVar[type] = DecoderConfig
    data_config: ClassVar[type] = TextConfig
    on_host: ClassVar[frozenset[str]] = frozenset({"documents", "sources"})

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> None:
        super().__init__(config, mesh=mesh, device=device)
        self._probe = FluctuationProbe()
        self._apart = config.data.packing == "documents"
        self._mixture: Mixture | None = None
        # Of each source, losses and tokens of training on this rank since they were asked for.
        self._by_source = torch.zeros(len(config.data.names), 2, dtype=torch.float64, device=device)
        self._row = 0  # behind the last one of the stream that was asked for

    @classmethod
    def check(cls, config: RunConfig) -> None:
        vocab_size = Tokenizer(config.data.tokenizer, config.data.end_of_text).vocab_size
        if config.model.vocab_size < vocab_size:
            raise BadInput(
                f"model.vocab_size={config.model.vocab_size}: must be at least {vocab_size}, "
                f"that of data.tokenizer={config.data.tokenizer}"
            )
        if config.data.seq_len > config.model.max_seq_len:
            raise BadInput(
                f"data.seq_len={config.data.seq_len}: must be at most "
                f"model.max_seq_len={config.model.max_seq_len}"
            )
        open_corpus(config.data)
        _prompts(config)

    @property
    def corpus(self) -> Corpus:
        """Opened at first use, so that a model can be built where there are no data."""
        return open_corpus(self.config.data)

    def build_model(self) -> nn.Module:
        return Decoder(self.config.model, mesh=self.mesh)

    @property
    def mixture(self) -> Mixture:
        """The order of the sources' rows."""
        if self._mixture is None:
            self._mixture = self.corpus.mixture()
        return self._mixture

    def batch(self, rows: range) -> Batch:
        seed, found, numbers = self.config.train.seed, [], []
        for row in rows:
            number, index = self.mixture.locate(row)
            numbers.append(number)
            source = self.corpus.sources[number]
            if self._apart:
                found.append(source.packed_row("train", source.packed_place(seed, index)))
            else:
                found.append(source.train_row(seed, index))
        batch = _stacked(found)
        return (
            batch if len(self.mixture.names) == 1 else {**batch, "sources": torch.tensor(numbers)}
        )

    def tokens(self, rows: range) -> int:
        self._row = rows.stop
        if not self._apart:
            return len(rows) * self.config.data.seq_len
        return sum(source.packed_tokens(place) for source, place in self._places(rows))

    def targets(self, rows: range) -> int:
        if not self.config.data.conversations:
            return self.tokens(rows)
        return sum(source.packed_targets(place) for source, place in self._places(rows))

    def _places(self, rows: range) -> Iterator[tuple[Source, int]]:
        for row in rows:
            number, index = self.mixture.locate(row)
            source = self.corpus.sources[number]
            yield source, source.packed_place(self.config.train.seed, index)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        losses_T, targets = self.token_losses(model, batch)
        self._add_sources(losses_T, targets, batch)
        return losses_T.sum()

    def token_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy [T] of this rank's tokens, 0 where nothing is learnt, and all targets."""
        assert isinstance(model, Decoder)
        ids, targets, layout = _packed(batch)
        return model.token_losses(ids, targets, layout=layout), targets

    def logits(self, model: nn.Module, ids_BS: Tensor, token_mask: Tensor | None) -> Tensor:
        """[B, S, V], of texts that padding follows where `token_mask` is False."""
        logits_BSV: Tensor = model(ids_BS, token_mask)
        return logits_BSV

    def training_sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The loss of each source, where there are several."""
        names, sums = self.config.data.names, self._by_source
        self._by_source = torch.zeros_like(sums)
        if len(names) == 1:
            return {}
        return {name: (own[0], own[1]) for name, own in zip(names, sums, strict=True)}

    def _add_sources(self, losses_T: Tensor, targets: Tensor, batch: Batch) -> None:
        # A census has no gradients, and is of the same rows.
        if len(self._by_source) > 1 and torch.is_grad_enabled():
            self._by_source += self._sums_by_source(losses_T.detach(), targets, batch)

    def _sums_by_source(self, losses_T: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Loss and targets of each source on this rank, float64 [sources, 2]."""
        shards = self.mesh.shards
        own = even_shards(targets.numel(), shards) if shards > 1 else None
        source_B = batch.get("sources", torch.zeros(1, dtype=torch.int64))
        source_BS = source_B[:, None].expand_as(batch["input_ids"])
        source_T = source_BS.flatten().to(losses_T.device)
        if "documents" in batch:
            source_T = source_T[layout_from_documents(batch["documents"], source_T.device)[1]]
        # Context ranks have the losses of their own tokens only.
        source_T = own_context_rows(source_T, self.mesh, shard_sizes=own)
        counted_T = own_context_rows(targets.flatten() >= 0, self.mesh, shard_sizes=own)
        sums = []
        for number in range(len(self._by_source)):
            mine_T = source_T == number
            sums += [losses_T.where(mine_T, 0).sum(), (counted_T & mine_T).sum()]
        return torch.stack([x.double() for x in sums]).unflatten(0, (-1, 2))

    def adapt(self, whole: WholeState) -> WholeState:
        """Grow parameter tokens, where this phase's model is a TokenFormer that has more."""
        if getattr(self.config.model, "pattention", None) is None:
            return whole
        return grow_whole(whole, self.config.model)[0]

    def work(self, batch: Batch) -> Work | None:
        if self._apart:
            return Work.of(layout_from_documents(batch["documents"])[0])
        return Work.dense(*batch["input_ids"].shape)

    def shared_state(self, engine: TrainedModel) -> dict[str, Tensor]:
        """What every source has given so far, so that other weights can go on from there."""
        return self.mixture.state(self._row)

    def load_shared_state(self, engine: TrainedModel, state: dict[str, Tensor]) -> None:
        self._mixture, changed = self.mixture.resumed(state)
        self._row = int(state["mixture"][1])
        if changed is not None and is_first():
            print(changed, flush=True)

    def start_phase(self, engine: TrainedModel) -> None:
        if is_first():
            for line in self.corpus.describe():
                print(f"data: {line}", flush=True)

    @property
    def validation_rows(self) -> int:
        return self.corpus.held_out_rows

    def validation_batch(self, rows: range) -> Batch:
        found = [self.corpus.held_out_row(row) for row in rows]
        sources = torch.tensor([number for number, _ in found])
        return {**_stacked([row for _, row in found]), "sources": sources}

    def validation_sums(self, model: nn.Module, batch: Batch) -> Sums:
        """`loss`, and that of each source where there are several."""
        losses_T, targets = self.token_losses(model, batch)
        by_source = self._sums_by_source(losses_T, targets, batch)
        sums: Sums = {"loss": (losses_T.sum(), int(by_source[:, 1].sum()))}
        names = self.config.data.names
        if len(names) > 1:
            for name, (loss, count) in zip(names, by_source, strict=True):
                sums[f"loss/{name}"] = (loss, int(count))
        return sums

    def report(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:
        """Pictures of who computed a held-out text."""
        ids_S = torch.from_numpy(self.corpus.validation_row(0))[:-1].long()
        tokenizer = Tokenizer(self.config.data.tokenizer)
        texts = [tokenizer.decode([token]) for token in ids_S.tolist()]
        show_routing(engine, ids_S, texts, step, log, self._probe)

    def sample(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:
        """What the model goes on with behind the prompts."""
        asked, data, model = self.config.monitor.samples, self.config.data, self.config.model
        if not asked.tokens or non_causal_layers(engine.model):
            return
        tokenizer = Tokenizer(data.tokenizer, data.end_of_text)
        prompts = _prompts(self.config)
        if not prompts:
            half = min(asked.tokens, model.max_seq_len // 2)
            ids_S = self.corpus.validation_row(0)[: max(half, 1)].tolist()
            prompts = {tokenizer.decode(ids_S): ids_S}
        made = continued(
            engine,
            list(prompts.values()),
            logits=self.logits,
            tokens=asked.tokens,
            sampling=Sampling(asked.temperature),
            vocab_size=tokenizer.vocab_size,
            longest=model.max_seq_len,
            end=tokenizer.end,
        )
        if log is not None:
            texts = [tokenizer.decode(tokens) for tokens in made]
            log.text(step, "samples", shown_samples(list(prompts), texts))

    def generation_command(self, checkpoint: Path) -> str:
        prompt = "What can you do?" if self.config.data.conversations else "def "
        return command("launch.generate", checkpoint, "--prompt", prompt)


def _prompts(config: RunConfig) -> dict[str, list[int]]:
    """Token ids of the prompts of `monitor.samples`.

    Raises:
        BadInput: one has none, or leaves no room behind it.
    """
    data, longest = config.data, config.model.max_seq_len
    tokenizer = Tokenizer(data.tokenizer, data.end_of_text)
    found = {}
    for number, prompt in enumerate(config.monitor.samples.prompts):
        where = f"monitor.samples.prompts[{number}]"
        found[prompt] = first_tokens(data, tokenizer, prompt.encode(), where=where)
        if not 1 <= len(found[prompt]) < longest:
            raise BadInput(
                f"{where}: has {len(found[prompt])} tokens, must have at least 1 and fewer than "
                f"model.max_seq_len={longest}"
            )
    return found


def _stacked(rows: Sequence[np.ndarray | Row]) -> dict[str, Tensor]:
    """Rows as a batch: windows, whose last token is only a target, or packed documents."""
    if isinstance(rows[0], Row):
        names = Row._fields
        columns = zip(*rows, strict=True)
        return {n: torch.from_numpy(np.stack(c)) for n, c in zip(names, columns, strict=True)}
    ids = torch.from_numpy(np.stack(rows))
    return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def _packed(batch: Batch) -> tuple[Tensor, Tensor, TokenLayout | None]:
    """(ids, targets, layout) without padding: [B, S] each, or [1, T] with documents apart."""
    ids, targets = batch["input_ids"], batch["targets"]
    if "documents" not in batch:
        return ids, targets, None
    layout, valid = layout_from_documents(batch["documents"], ids.device)
    return ids.flatten()[valid][None], targets.flatten()[valid][None], layout
