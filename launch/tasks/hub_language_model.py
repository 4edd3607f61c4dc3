"""Next-token prediction on text, with any causal language model of transformers, adapted.

Shape legend: B rows, S tokens of a row, N documents, L the longest, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptive.blocks.wrapping import filled_columns, from_rows, to_rows
from adaptive.flops import Work
from adaptive.hub.flops import unknown_operations
from adaptive.routing.layout import layout_from_documents
from launch.run.errors import BadInput
from launch.run.ranks import is_first
from launch.run.sections import RunConfig
from launch.run.sizes import without_memory
from launch.tasks import Batch, TrainedModel
from launch.tasks.hub_model import ADAPTED, HubModelConfig
from launch.tasks.language_model import LanguageModelTask
from parallel.mesh import Mesh


class HubLanguageModelTask(LanguageModelTask):
    """Loss: that of a language model, or in part the distance to the dense model (distillation)."""

    model_config: ClassVar[type] = HubModelConfig

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> None:
        super().__init__(config, mesh=mesh, device=device)
        self._teacher: PreTrainedModel | None = None
        self._counts: bool | None = None
        # Of the text and of distillation, losses and targets on this rank since last asked for.
        self._terms = torch.zeros(2, 2, dtype=torch.float64, device=device)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        model, data = config.model, config.data
        if model.pretrained is not None and data.tokenizer == "bytes" and model.vocab_size > 256:
            raise BadInput(
                f"data.tokenizer=bytes: must be the pretrained model's own, {model.pretrained}"
            )
        if model.distill is not None and model.settings["model_type"] == ADAPTED:
            raise BadInput(
                f"model.distill: {model.pretrained or 'model.settings'} is adapted already, and "
                "what it was before is not in it; leave model.distill out"
            )
        if model.distill is not None:
            cls._check_pretrained(model)
        super().check(config)

    @staticmethod
    def _check_pretrained(model: HubModelConfig) -> None:
        folder = model.pretrained
        if folder is not None and not list(Path(folder).expanduser().glob("*.safetensors")):
            raise BadInput(f"model.pretrained={folder}: has no *.safetensors")

    def check_first_weights(self) -> None:
        self._check_pretrained(self.config.model)

    def build_model(self) -> nn.Module:
        for axis in ("tensor", "context", "expert"):
            ranks = getattr(self.mesh, axis)
            if ranks > 1:
                raise BadInput(
                    f"parallel.{axis}={ranks}: must be 1, models of transformers are trained on "
                    "the data axis alone (ZeRO shards their weights)"
                )
        model: HubModelConfig = self.config.model
        return model.adapted(model.dense())

    def first_weights(self) -> dict[str, Tensor] | None:
        model: HubModelConfig = self.config.model
        return model.first_weights(self.config.train.seed)

    def work(self, batch: Batch) -> Work | None:
        """None where modules do not say what they compute; `start_phase` says which."""
        if self._counts is None:
            with without_memory():
                self._counts = unknown_operations(self.build_model()) is None  # type: ignore[arg-type]
        return super().work(batch) if self._counts else None

    def start_phase(self, engine: TrainedModel) -> None:
        super().start_phase(engine)
        unknown = unknown_operations(engine.model)  # type: ignore[arg-type]
        if unknown is not None and is_first():
            print(f"operations are not counted: {unknown}", flush=True)
        if self.config.model.distill is None:
            return
        teacher = self._teacher_for(engine.model)
        if is_first():
            count = sum(p.numel() for p in teacher.parameters())
            tokens = self.config.train.batch_size * self.config.data.seq_len
            print(
                f"distillation: the dense model, {count:,} parameters on every rank, adds a "
                f"forward of about {2e-9 * count * tokens:,.3g} GFLOP a step, which is not counted",
                flush=True,
            )

    def _teacher_for(self, model: nn.Module) -> PreTrainedModel:
        """The dense model, no part of the one that is trained; made once, where that one is."""
        if self._teacher is None:
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            teacher = self.config.model.teacher(self.config.train.seed)
            self._teacher = teacher.to(self.device, dtype)
        return self._teacher

    def logits(self, model: nn.Module, ids_BS: Tensor, token_mask: Tensor | None) -> Tensor:
        mask = None if token_mask is None else token_mask.long()
        output = model(input_ids=ids_BS, attention_mask=mask, use_cache=False)
        logits_BSV: Tensor = output.logits
        return logits_BSV

    def token_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Documents that see nothing of one another are rows of their own, padded."""
        logits_TV, targets_T = self._judged(model, batch)
        return _cross_entropy(logits_TV, targets_T), targets_T

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        distill = self.config.model.distill
        # A census wants the model's routing alone.
        if distill is None or not torch.is_grad_enabled():
            return super().loss_sum(model, batch)
        logits_TV, targets_T = self._judged(model, batch)
        losses_T = _cross_entropy(logits_TV, targets_T)
        self._add_sources(losses_T, targets_T, batch)
        with torch.no_grad():
            taught_TV, _ = self._judged(self._teacher_for(model), batch)
        distances_T = distances(logits_TV, taught_TV, temperature=distill.temperature)
        distances_T = distances_T.where(targets_T >= 0, 0)
        terms = torch.stack([losses_T.sum(), distances_T.sum()])
        counted = (targets_T >= 0).sum().expand(2)
        self._terms += torch.stack([terms.detach().double(), counted.double()], 1)
        return (1 - distill.weight) * terms[0] + distill.weight * terms[1]

    def training_sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The loss of each source, and of the text and of distillation where there is that."""
        sums, terms = super().training_sums(), self._terms
        if self.config.model.distill is None:
            return sums
        self._terms = torch.zeros_like(terms)
        names = ("text", "distillation")
        return sums | {n: (term[0], term[1]) for n, term in zip(names, terms, strict=True)}

    def _judged(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [T, V] in float32 and targets [T] of all valid tokens."""
        ids, targets = batch["input_ids"], batch["targets"]
        if "documents" not in batch:
            return self.logits(model, ids, None).flatten(0, 1).float(), targets.flatten()
        layout, valid = layout_from_documents(batch["documents"], ids.device)
        ids_NL = to_rows(ids.flatten()[valid][:, None], layout)[..., 0]
        logits_NLV = self.logits(model, ids_NL, filled_columns(layout))
        return from_rows(logits_NLV, layout).float(), targets.flatten()[valid]


def distances(student_TV: Tensor, teacher_TV: Tensor, *, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student's next token from the teacher's, [T], nats.

    Both are softened by the temperature, by whose square it is multiplied, so that gradients keep
    their size.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.
    """
    student = F.log_softmax(student_TV / temperature, -1)
    teacher = F.log_softmax(teacher_TV / temperature, -1)
    apart_TV = F.kl_div(student, teacher, reduction="none", log_target=True)
    return apart_TV.sum(-1) * temperature**2


def _cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """[T]; 0 where a target is below 0, which is not learnt."""
    losses_T = F.cross_entropy(logits_TV, targets_T.clamp(min=0), reduction="none")
    return losses_T.where(targets_T >= 0, 0)
