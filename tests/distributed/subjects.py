"""Small models of every family, for the parity check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.delete_gate import DeleteGateConfig
from adaptive.blocks.learned_budget import LearnedBudgetConfig
from adaptive.blocks.method import Method, methods
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.segments import SegmentsConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.blocks.token_merging import TokenMergingConfig
from adaptive.models import (
    Decoder,
    DecoderConfig,
    DiffusionConfig,
    DiffusionTransformer,
    VisionConfig,
    VisionTransformer,
)
from adaptive.models.decoder.rope_scaling import RopeScaling
from adaptive.models.diffusion.flow_matching import Draws, draw, flow_matching_loss
from adaptive.routing.gumbel import GumbelSchedule
from adaptive.routing.layout import TokenLayout
from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import RoutingTape
from parallel.mesh import Mesh
from parallel.parity import Batch, Share
from parallel.tensor import is_split

TINY = DecoderConfig(
    vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=64, init_std=0.2
)


@dataclass(frozen=True)
class LanguageModel:
    """A decoder on random tokens."""

    config: DecoderConfig = TINY
    rows: int = 4
    seq_len: int = 24
    documents: tuple[int, ...] = ()  # lengths of those in each row; empty: each row is one

    def build(self, mesh: Mesh) -> nn.Module:
        return Decoder(self.config, mesh=mesh)

    def batch(self, step: int) -> Batch:
        draw = torch.Generator().manual_seed(1000 + step)
        shape = (self.rows, self.seq_len + 1)
        ids = torch.randint(0, self.config.vocab_size, shape, generator=draw)
        return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    def tokens(self, step: int) -> int:
        return self.rows * self.seq_len

    def losses(
        self, model: nn.Module, micro_batches: Sequence[Batch], share: Share
    ) -> Iterator[Tensor]:
        scope = BatchScope.of(share.mesh, share.tokens, micro_batches=share.micro_batches)
        if share.micro_batches > 1:
            scope.start_census()
            for batch in micro_batches:
                with torch.no_grad(), RoutingTape(scope=scope):
                    self._task_loss(model, batch, scope)
            scope.finish_census()
        for batch in micro_batches:
            with RoutingTape(model, scope=scope) as tape:
                loss = self._task_loss(model, batch, scope)
            yield loss + tape.loss()

    def _task_loss(self, model: nn.Module, batch: Batch, scope: BatchScope) -> Tensor:
        assert isinstance(model, Decoder)
        ids_BS = batch["input_ids"]
        layout = None
        if self.documents:
            lengths = self.documents * ids_BS.shape[0]
            layout = TokenLayout.from_lengths(lengths, device=ids_BS.device)
        losses_T = model.token_losses(ids_BS, batch["targets"], layout=layout)
        return scope.share_of(losses_T.sum(), losses_T.numel()) * scope.replicas


DEPTHS = MixtureOfDepthsConfig(capacity=0.25)
EXPERTS = MixtureOfExpertsConfig(num_experts=4, ffn_dim=32, z_coefficient=0.01)
# More than the paper's two channels for four experts: normalising those amplifies rounding.
HYPERSPHERICAL = replace(
    EXPERTS, router="hyperspherical", projection_dim=8, top_k=1, shared_experts=1, shared_gate=True
)
PATTENTION = PattentionConfig(tokens=32, ffn_tokens=64)
TOKENFORMER = replace(TINY, norm="parameter_free")

# Without noise: data ranks draw their own.
QUIET = GumbelSchedule(noise=0.0)

FAMILIES = {
    "documents": LanguageModel(
        replace(TINY, num_kv_heads=2, mixture_of_depths=DEPTHS), documents=(5, 1, 18)
    ),
    "dense": LanguageModel(
        replace(
            TINY,
            tie_embeddings=True,
            qk_norm="projection",
            rope_scaling=RopeScaling("linear", factor=2.0),
        )
    ),
    "mixture_of_depths": LanguageModel(replace(TINY, num_kv_heads=2, mixture_of_depths=DEPTHS)),
    "keys_of_all_tokens": LanguageModel(
        replace(TINY, num_kv_heads=2, mixture_of_depths=replace(DEPTHS, keys="all")),
        # None so short that its tokens may all be one id: those tie, and rounding would choose.
        documents=(4, 8, 12),
    ),
    "mixture_of_depths_ffn": LanguageModel(
        replace(TINY, mixture_of_depths=replace(DEPTHS, granularity="ffn"))
    ),
    "mixture_of_experts": LanguageModel(replace(TINY, mixture_of_experts=EXPERTS)),
    "hyperspherical": LanguageModel(replace(TINY, mixture_of_experts=HYPERSPHERICAL)),
    "mixture_of_depths_and_experts": LanguageModel(
        replace(TINY, mixture_of_depths=DEPTHS, mixture_of_experts=replace(EXPERTS, idle_experts=2))
    ),
    "pattention": LanguageModel(replace(TOKENFORMER, pattention=PATTENTION)),
    "pattention_channels": LanguageModel(
        replace(TOKENFORMER, pattention=replace(PATTENTION, split="channels"))
    ),
    "skip_layer": LanguageModel(
        replace(
            TINY,
            num_kv_heads=2,
            # A target far from the half that executes at first: at 0.5 the router bias' gradient is
            # a sum whose terms are together 41 times as large; here 6.5 times.
            skip_layer=SkipLayerConfig(
                schedule=QUIET, density=0.25, density_over="model", controller_gain=0.1
            ),
        )
    ),
    "sized_feed_forward": LanguageModel(
        replace(TINY, sized_feed_forward=SizedFeedForwardConfig(schedule=QUIET))
    ),
    "adaptive_computation": LanguageModel(
        replace(TINY, adaptive_computation=AdaptiveComputationConfig(schedule=QUIET))
    ),
    "delete_gate": LanguageModel(
        replace(TINY, num_layers=3, delete_gate=DeleteGateConfig(before=1, proportional=5.0))
    ),
    "segments": LanguageModel(
        replace(TINY, num_layers=3, segments=SegmentsConfig(prior=0.4, schedule=QUIET))
    ),
}
# A method without a family of its own is checked as its defaults are.
for _method in methods("linear", "feed_forward", "layer", "stack"):
    if _method.name not in FAMILIES:
        FAMILIES[_method.name] = LanguageModel(TINY.with_method(_method()))


def draw_weights(model: nn.Module, whole: nn.Module, mesh: Mesh) -> None:
    """Random weights, nothing left at zero: this rank's parts of what `whole` would have."""
    generator = torch.Generator().manual_seed(2)
    for own, full in zip(model.parameters(), whole.parameters(), strict=True):
        value = torch.randn(full.shape, generator=generator) * 0.1
        if is_split(own):
            value = value.chunk(mesh.tensor, own.partition_dim)[mesh.tensor_rank]  # type: ignore[attr-defined]
        own.data.copy_(value)


@dataclass(frozen=True)
class FlowMatching:
    """SPRINT's diffusion transformer, nothing left at zero, on random images, kept tokens and
    drops."""

    rows: int = 8

    def build(self, mesh: Mesh) -> DiffusionTransformer:
        config = DiffusionConfig(
            image_size=8,
            channels=2,
            patch_size=2,
            num_classes=5,
            dim=32,
            num_heads=4,
            encoder_depth=1,
            middle_depth=1,
            decoder_depth=1,
            mask_token="learnt",
        )
        model, whole = (DiffusionTransformer(config, mesh=m) for m in (mesh, Mesh.single()))
        draw_weights(model, whole, mesh)
        return model

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(self.rows, 2, 8, 8, generator=generator)
        config = self.build(Mesh.single()).config
        draws = draw(torch.arange(self.rows) % 5, config, generator=generator)
        return {"images": images, **draws._asdict()}

    def tokens(self, step: int) -> int:
        return self.rows

    def losses(
        self, model: nn.Module, micro_batches: Sequence[Batch], share: Share
    ) -> Iterator[Tensor]:
        assert isinstance(model, DiffusionTransformer)
        for batch in micro_batches:
            draws = Draws(*(batch[name] for name in Draws._fields))
            loss = flow_matching_loss(model, batch["images"], draws).sum()
            yield loss * share.mesh.replicas * share.micro_batches / share.tokens


@dataclass(frozen=True)
class Images:
    """A vision transformer whose tokens become fewer, on random images."""

    method: Method
    rows: int = 8

    def build(self, mesh: Mesh) -> VisionTransformer:
        config = VisionConfig(
            image_size=8, channels=1, patch_size=2, num_classes=5, dim=32, num_layers=2, num_heads=4
        )
        config = config.with_method(self.method)
        model, whole = (VisionTransformer(config, mesh=m) for m in (mesh, Mesh.single()))
        draw_weights(model, whole, mesh)
        return model

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(self.rows, 1, 8, 8, generator=generator)
        return {"images": images, "labels": torch.arange(self.rows) % 5}

    def tokens(self, step: int) -> int:
        return self.rows

    def losses(
        self, model: nn.Module, micro_batches: Sequence[Batch], share: Share
    ) -> Iterator[Tensor]:
        scope = BatchScope.of(share.mesh, share.tokens, micro_batches=share.micro_batches)
        if share.micro_batches > 1:
            scope.start_census()
            for batch in micro_batches:
                with torch.no_grad(), RoutingTape(scope=scope):
                    model(batch["images"])
            scope.finish_census()
        for batch in micro_batches:
            with RoutingTape(model, scope=scope) as tape:
                loss = F.cross_entropy(model(batch["images"]), batch["labels"], reduction="sum")
            yield loss * scope.replicas / share.tokens + tape.loss()


SUBJECTS: dict[str, LanguageModel | FlowMatching | Images] = {
    **FAMILIES,
    "sprint": FlowMatching(),
    "token_merging": Images(TokenMergingConfig(amount=4)),
    "learned_budget": Images(LearnedBudgetConfig(target=0.5)),
}


def splits_on(subject: str, degrees: Mapping[str, object]) -> bool:
    """Whether the subject's model can be split that way."""
    if subject in ("segments", "delete_gate"):  # whose tokens lie on one rank
        return set(degrees) <= {"tensor"}
    if subject in FAMILIES:
        return degrees.get("tensor") != 4 or FAMILIES[subject].config.kv_heads % 4 == 0
    # Neither takes context or expert ranks, and a vision transformer no sequence parallelism.
    return set(degrees) <= ({"tensor", "sequence_parallel"} if subject == "sprint" else {"tensor"})


def mixture_of_depths() -> LanguageModel:
    """As `python -m launch.parity --subject` takes it."""
    return FAMILIES["mixture_of_depths"]
