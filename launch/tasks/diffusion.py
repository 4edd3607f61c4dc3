"""Flow matching on labelled images or latents, with a DiffusionTransformer.

Shape legend: B rows (images), S tokens of an image, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptive.flops import Work
from adaptive.models.diffusion.flow_matching import Draws, draw, flow_matching_loss
from adaptive.models.diffusion.model import DiffusionConfig, DiffusionTransformer
from adaptive.models.diffusion.samplers import SamplingConfig, sample
from adaptive.observe.metric_log import MetricLog
from launch.data.images import DiffusionImageConfig, DiffusionImageData, tile, to_pixels
from launch.run.averaging import AverageConfig, WeightAverage
from launch.run.errors import BadInput
from launch.run.ranks import is_first
from launch.run.sections import RunConfig
from launch.run.terminal import command
from launch.tasks import Batch, Sums, Task, TrainedModel, row_generator
from parallel.mesh import Mesh

AVERAGE = "average."  # of the names of averaged weights in checkpoints
_VALIDATION_SEED = 20251021


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """How samples are drawn: of the grids that training shows, and `launch.sample`'s defaults.

    Attributes:
        per_class: columns of those grids.
    """

    per_class: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class < 1:
            raise ValueError(f"per_class={self.per_class}: must be at least 1")


class DiffusionTask(Task):
    """Loss: squared error of the velocity, mean over the pixels of the global batch.

    Everything random about row n (noise, time, label dropout, kept tokens, path drop) is drawn
    from (seed, n), so a run resumes exactly and does not depend on its ranks.
    """

    model_config: ClassVar[type] = DiffusionConfig
    data_config: ClassVar[type] = DiffusionImageConfig
    sections: ClassVar[dict[str, type]] = {"average": AverageConfig, "sampling": SampleConfig}
    on_host: ClassVar[frozenset[str]] = frozenset({"drop_path"})

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> None:
        super().__init__(config, mesh=mesh, device=device)
        self._data: DiffusionImageData | None = None
        self._average: WeightAverage | None = None

    @classmethod
    def check(cls, config: RunConfig) -> None:
        axes = config.parallel
        for name, value in (("context", axes.context), ("expert", axes.expert)):
            if value != 1:
                raise BadInput(f"parallel.{name}={value}: must be 1, task=diffusion does not split")
        # Every rank checks; one look into every file is enough.
        DiffusionImageData(config.data, config.model, verify=is_first())

    @property
    def data(self) -> DiffusionImageData:
        """Opened at first use, so that a model can be built where there are no data."""
        if self._data is None:
            self._data = DiffusionImageData(self.config.data, self.config.model, verify=False)
        return self._data

    def build_model(self) -> nn.Module:
        return DiffusionTransformer(self.config.model, mesh=self.mesh)

    def batch(self, rows: range) -> Batch:
        seed, data = self.config.train.seed, self.data
        indices = [data.train_index(seed, row) for row in rows]
        labels = data.labels(indices)
        draws = [
            draw(
                labels[place : place + 1],
                self.config.model,
                class_drop=self.config.data.class_drop,
                generator=_generator(seed, row),
            )
            for place, row in enumerate(rows)
        ]
        joined = {name: torch.cat([getattr(d, name) for d in draws]) for name in Draws._fields}
        features = {} if data.features is None else {"features": data.feature_rows(indices)}
        return {"images": data.images(indices), **features, **joined}

    def tokens(self, rows: range) -> int:
        return len(rows) * self.config.model.tokens

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, DiffusionTransformer)
        draws = Draws(*(batch[name] for name in Draws._fields))
        losses_B = flow_matching_loss(model, batch["images"], draws, features=batch.get("features"))
        return losses_B.sum() * model.config.tokens

    def work(self, batch: Batch) -> Work:
        return Work.dense(len(batch["images"]), self.config.model.tokens)

    @property
    def validation_rows(self) -> int:
        return len(self.data.validation)

    def validation_batch(self, rows: range) -> Batch:
        """Held-out images with fixed noise, at times that cover the training distribution."""
        data, model = self.data, self.config.model
        indices = data.validation[rows.start : rows.stop]
        noise, quantiles = [], []
        for row in rows:
            random = _generator(_VALIDATION_SEED, row)
            shape = (model.channels, model.image_size, model.image_size)
            noise.append(torch.randn(shape, generator=random))
            quantiles.append((row + 0.5) / self.validation_rows)
        normal = torch.special.ndtri(torch.tensor(quantiles))
        return {
            "images": data.images(indices),
            "noise": torch.stack(noise),
            "t": torch.sigmoid(normal),
            "y": data.labels(indices),
            "keep_ids": torch.arange(model.tokens).expand(len(rows), -1),
            "drop_path": torch.zeros(len(rows), dtype=torch.bool),
        }

    def validation_sums(self, model: nn.Module, batch: Batch) -> Sums:
        tokens = len(batch["images"]) * self.config.model.tokens
        return {"loss": (self.loss_sum(model, batch), tokens)}

    def start_phase(self, engine: TrainedModel) -> None:
        average = self.config.average
        self._average = WeightAverage(engine, decay=average.decay, warmup=average.warmup)

    def after_step(self, engine: TrainedModel, step: int) -> None:
        if self._average is not None:
            self._average.update(engine, step)

    def shared_state(self, engine: TrainedModel) -> dict[str, Tensor]:
        if self._average is None:
            return {}
        return {AVERAGE + name: value for name, value in self._average.gather(engine).items()}

    def load_shared_state(self, engine: TrainedModel, state: dict[str, Tensor]) -> None:
        if self._average is not None:
            self._average.load(engine, averaged_weights(state))

    def report(self, engine: TrainedModel, step: int, log: MetricLog | None) -> None:
        """A grid of samples of the averaged weights, one row a class."""
        weights = averaged_weights(self.shared_state(engine))
        if log is None or self.config.model.channels not in (1, 3):
            return
        with torch.random.fork_rng(devices=[]):
            model = DiffusionTransformer(self.config.model)
        # Buffers are not averaged: [MASK] is the trained model's own.
        own = model.state_dict()
        own.update((n, b) for n, b in engine.model.named_buffers() if n in own)
        model.load_state_dict({**own, **weights})
        per_class = self.config.sampling.per_class
        classes = min(self.config.model.num_classes, len(self.data.source.classes), 10)
        labels = torch.arange(classes, device=self.device).repeat_interleave(per_class)
        images = sample(model.to(self.device), labels, self.config.sampling, seed=0)
        sheet = tile(to_pixels(images), per_class, zoom=max(1, 32 // self.config.model.image_size))
        log.image(step, "samples", torch.from_numpy(sheet))

    def generation_command(self, checkpoint: Path) -> str:
        return command("launch.sample", checkpoint, "--png", "samples.png")


def averaged_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights in a task's shared state, by the model's own names."""
    return {n.removeprefix(AVERAGE): v for n, v in state.items() if n.startswith(AVERAGE)}


def _generator(seed: int, row: int) -> torch.Generator:
    random = row_generator(seed, row, stream=2)
    return torch.Generator().manual_seed(int(random.integers(2**63)))
