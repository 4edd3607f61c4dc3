"""Classes of images, with a VisionTransformer.

Shape legend: B rows (images), S tokens of an image, C channels, H W pixels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.flops import Work
from adaptive.models.vision.model import VisionConfig, VisionTransformer
from adaptive.observe.metric_log import MetricLog
from adaptive.observe.pictures import patch_map
from adaptive.routing.tape import RoutingRecord, RoutingTape
from launch.data.images import ImageConfig, ImageData
from launch.run.errors import BadInput
from launch.run.ranks import is_first
from launch.run.sections import RunConfig
from launch.tasks import Batch, Sums, Task, TrainedModel
from parallel.mesh import Mesh

_PICTURED = 8  # images in a picture of which patches merged


class ImageClassificationTask(Task):
    """Loss: cross-entropy of an image's class, mean over the images of the global batch."""

    model_config: ClassVar[type] = VisionConfig
    data_config: ClassVar[type] = ImageConfig

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> None:
        super().__init__(config, mesh=mesh, device=device)
        self._data: ImageData | None = None

    @classmethod
    def check(cls, config: RunConfig) -> None:
        axes = config.parallel
        for name, value in (("context", axes.context), ("expert", axes.expert)):
            if value != 1:
                raise BadInput(f"parallel.{name}={value}: must be 1, images are not split over it")
        if axes.sequence_parallel:
            raise BadInput("parallel.sequence_parallel=True: must be False, images are short")
        ImageData(config.data, config.model, verify=is_first())

    @property
    def data(self) -> ImageData:
        """Opened at first use, so that a model can be built where there are no data."""
        if self._data is None:
            self._data = ImageData(self.config.data, self.config.model, verify=False)
        return self._data

    def build_model(self) -> nn.Module:
        return VisionTransformer(self.config.model, mesh=self.mesh)

    def batch(self, rows: range) -> Batch:
        indices = [self.data.train_index(self.config.train.seed, row) for row in rows]
        return {"images": self.data.images(indices), "labels": self.data.labels(indices)}

    def tokens(self, rows: range) -> int:
        return len(rows) * self.config.model.tokens

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        logits_BK = model(batch["images"])
        loss = F.cross_entropy(logits_BK.float(), batch["labels"], reduction="sum")
        return loss * self.config.model.tokens

    def work(self, batch: Batch) -> Work:
        return Work.dense(len(batch["images"]), self.config.model.tokens)

    @property
    def validation_rows(self) -> int:
        return len(self.data.validation)

    def validation_batch(self, rows: range) -> Batch:
        indices = self.data.validation[rows.start : rows.stop]
        return {"images": self.data.images(indices), "labels": self.data.labels(indices)}

    def validation_sums(self, model: nn.Module, batch: Batch) -> Sums:
        logits_BK, labels_B = model(batch["images"]).float(), batch["labels"]
        loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
        right = (logits_BK.argmax(-1) == labels_B).sum()
        return {"loss": (loss, len(labels_B)), "accuracy": (right, len(labels_B))}

    def report(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:
        """Of held-out images, which patches stood for others after each layer that merges."""
        if not self.config.model.methods or not self.validation_rows:
            return
        records: list[RoutingRecord] = []

        def watch(model: nn.Module, batch: Batch) -> None:
            with RoutingTape(model) as tape:
                model(batch["images"])
            records.extend(tape.records)

        engine.train(False)
        with torch.no_grad():
            engine.forward(
                self.validation_batch(range(min(_PICTURED, self.validation_rows))), watch
            )
        engine.train()
        if log is None:
            return
        for name, image_HWC in merging_pictures(records, self.config.model).items():
            log.image(step, f"merging/{name}", image_HWC)


def merging_pictures(records: list[RoutingRecord], config: VisionConfig) -> dict[str, Tensor]:
    """A square an image for each layer that merged: patches that are left, and those that are not.

    Args:
        records: of one forward.
        config: of the model.
    """
    pictures: dict[str, Tensor] = {}
    left_T: Tensor | None = None
    for record in records:
        if record.kind not in ("token_merging", "learned_budget") or record.chosen is None:
            continue
        stands = record.chosen.cpu()
        # The record is of what was left before this layer; the picture of every patch.
        left_T = stands if left_T is None else left_T.masked_scatter(left_T, stands)
        patches_BS = left_T.unflatten(0, (-1, config.tokens))[:, config.prefix :]
        pictures[record.name] = patch_map(patches_BS, config.grid)
    return pictures
