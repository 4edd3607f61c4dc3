"""Next-token prediction on text, with a Decoder.

Shape legend: B rows, S tokens of a row, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.flops import Work
from adaptive.models.decoder.model import Decoder, DecoderConfig
from adaptive.routing.collapse import FluctuationProbe
from launch.checkpoint.growth import grow_whole
from launch.checkpoint.state import WholeState
from launch.data.text import Corpus, TextConfig, Tokenizer, open_corpus
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.run.terminal import command
from launch.tasks import Batch, Sums, Task, TrainedModel
from launch.tasks.pictures import show_routing
from parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class LanguageModelTask(Task):
    """Loss: cross-entropy of the next token, nats, mean over the tokens of the global batch."""

    model_config: ClassVar[type] = DecoderConfig
    data_config: ClassVar[type] = TextConfig

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> None:
        super().__init__(config, mesh=mesh, device=device)
        self._probe = FluctuationProbe()

    @classmethod
    def check(cls, config: RunConfig) -> None:
        vocab_size = Tokenizer(config.data.tokenizer).vocab_size
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

    @property
    def corpus(self) -> Corpus:
        """Opened at first use, so that a model can be built where there are no data."""
        return open_corpus(self.config.data)

    def build_model(self) -> nn.Module:
        return Decoder(self.config.model, mesh=self.mesh)

    def batch(self, rows: range) -> Batch:
        return _shifted([self.corpus.train_row(self.config.train.seed, row) for row in rows])

    def tokens(self, rows: range) -> int:
        return len(rows) * self.config.data.seq_len

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Decoder)
        return model.token_losses(batch["input_ids"], batch["targets"]).sum()

    def adapt(self, whole: WholeState) -> WholeState:
        """Grow parameter tokens, where this phase's model is a TokenFormer that has more."""
        if getattr(self.config.model, "pattention", None) is None:
            return whole
        return grow_whole(whole, self.config.model)[0]

    def work(self, batch: Batch) -> Work:
        return Work.dense(*batch["input_ids"].shape)

    @property
    def validation_rows(self) -> int:
        return self.corpus.validation_rows

    def validation_batch(self, rows: range) -> Batch:
        return _shifted([self.corpus.validation_row(row) for row in rows])

    def validation_sums(self, model: nn.Module, batch: Batch) -> Sums:
        assert isinstance(model, Decoder)
        # Context ranks have the losses of their own tokens only.
        losses_T = model.token_losses(batch["input_ids"], batch["targets"])
        return {"loss": (losses_T.sum(), losses_T.numel())}

    def report(self, engine: TrainedModel, step: int, writer: SummaryWriter | None) -> None:
        """Pictures of who computed a held-out text."""
        ids_S = torch.from_numpy(self.corpus.validation_row(0))[:-1].long()
        tokenizer = Tokenizer(self.config.data.tokenizer)
        texts = [tokenizer.decode([token]) for token in ids_S.tolist()]
        show_routing(engine, ids_S, texts, step, writer, self._probe)

    def sample_command(self, checkpoint: Path) -> str:
        return command("launch.generate", checkpoint, "--prompt", "def ")


def _shifted(rows: list[np.ndarray]) -> Batch:
    ids = torch.from_numpy(np.stack(rows))
    return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
