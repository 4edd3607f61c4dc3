"""Router replay: choices made while a text was sampled are made again in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive import RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepths, MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.routing.forced import choices_of, replay
from parallel.mesh import Mesh
from tests.ranks import run_ranks

DEPTHS = MixtureOfDepthsConfig(capacity=0.5)
FAMILIES: dict[str, dict[str, Any]] = {
    "depths": {"mixture_of_depths": DEPTHS},
    "depths, keys of all": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5, keys="all")},
    "skip": {"skip_layer": SkipLayerConfig()},
    "experts": {"mixture_of_experts": MixtureOfExpertsConfig(num_experts=4, top_k=2)},
    "idle experts": {"mixture_of_experts": MixtureOfExpertsConfig(num_experts=4, idle_experts=2)},
    "both": {
        "mixture_of_depths": DEPTHS,
        "mixture_of_experts": MixtureOfExpertsConfig(num_experts=4, top_k=1),
    },
    "two sizes": {"sized_feed_forward": SizedFeedForwardConfig()},
}
Choices = dict[str, Tensor]


def decoder(family: str, mesh: Mesh | None = None, **keys: Any) -> Decoder:
    torch.manual_seed(0)
    given = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, **keys}
    model = Decoder(DecoderConfig(**given, **FAMILIES[family]), mesh=mesh).double()
    with torch.no_grad():  # routers that begin at zero would choose alike whatever they read
        for name, parameter in model.named_parameters():
            if "router" in name or "predictor" in name:
                parameter.normal_(0, 0.5)
    return model


def run(model: Decoder, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Choices]:
    """Logits, with gradients of their squares left in the model, and what was chosen."""
    model.zero_grad()
    torch.manual_seed(1)
    with RoutingTape(model) as tape:
        logits = model(ids, token_mask=mask)
        (logits.square().sum() + tape.loss()).backward()
    return logits.detach(), choices_of(tape.records)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_chosen_is_chosen_again_and_free_when_it_agrees(
    family: str, padded: bool, tmp_path: Path
) -> None:
    ids = torch.randint(50, (2, 12))
    mask = torch.arange(12) < torch.tensor([[12], [7]]) if padded else None
    sampler = decoder(family)
    free, chosen = run(sampler, ids, mask)
    grads = {name: p.grad.clone() for name, p in sampler.named_parameters() if p.grad is not None}
    save_file(chosen, tmp_path / "choices.safetensors")
    with replay(sampler, load_file(tmp_path / "choices.safetensors")):
        again, repeated = run(sampler, ids, mask)
    torch.testing.assert_close(again, free, rtol=0, atol=0)
    for name, parameter in sampler.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=0)

    trained = decoder(family)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "router" in name or "predictor" in name:
                parameter.neg_()
    _, own = run(trained, ids, mask)
    with replay(trained, chosen):
        _, repeated = run(trained, ids, mask)
    assert any(not torch.equal(own[name], chosen[name]) for name in chosen)
    for name, choice in chosen.items():
        assert torch.equal(repeated[name], choice)
    # The choice is the sampler's, the weights of it are the trained router's own.
    routers = [p for name, p in trained.named_parameters() if "router.weight" in name]
    assert routers
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)


def test_recomputation_repeats_replayed_choices() -> None:
    ids = torch.randint(50, (2, 12))
    _, chosen = run(decoder("both"), ids)
    flipped = {name: 1 - choice if choice.dim() == 1 else choice for name, choice in chosen.items()}
    results = []
    for recompute in (False, True):
        model = decoder("both", recompute=recompute)
        with replay(model, {name: c for name, c in flipped.items() if c.dim() == 1}):
            logits, _ = run(model, ids)
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


def test_generation_takes_replayed_depths() -> None:
    from adaptive.models.decoder.generate import generate

    model = decoder("depths").float().eval()
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, MixtureOfDepths)}
    for chosen in (0, 1):
        with replay(model, {name: torch.full((1,), chosen) for name in blocks}):
            made = list(generate(model, torch.randint(50, (1, 1)), max_new_tokens=1))[-1]
        assert made.layers[0][-1] == 2 - len(blocks) * (1 - chosen)


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ({"nowhere": torch.zeros(12)}, r"nowhere: takes no replayed choices; must be one of lay"),
        ({"layers.0": torch.zeros(12)}, r"layers.0: takes no replayed choices"),
        ({"layers.1": torch.zeros(12)}, r"layers.1: choices of torch.float32: must be integers"),
        ({"layers.1": torch.full((12,), 2)}, r"layers.1: choices from 2 to 2: must be from 0 to 1"),
        ({"layers.1": torch.ones(11).long()}, r"forced choices of shape \[11\]: must be \[12\]"),
    ],
)
def test_choices_that_the_model_cannot_make_are_one_line(choices: Choices, line: str) -> None:
    model = decoder("depths")
    with pytest.raises(ValueError, match=line), replay(model, choices):
        run(model, torch.zeros(1, 12, dtype=torch.long))


def _on_mesh(chosen: Choices, ids: Tensor) -> tuple[Tensor, Tensor]:
    mesh = Mesh.create(tensor=2, sequence_parallel=True)
    model = decoder("both", mesh)
    rows = ids.numel() // 2
    own = {
        name: choice[mesh.tensor_rank * rows : (mesh.tensor_rank + 1) * rows]
        for name, choice in chosen.items()
        if choice.dim() == 1
    }
    with replay(model, own):
        logits, repeated = run(model, ids)
    return logits, repeated["layers.1"]


def test_two_ranks_replay_what_one_did() -> None:
    ids = torch.randint(50, (1, 12))
    model = decoder("both")
    _, chosen = run(model, ids)
    chosen["layers.1"] = (torch.arange(12) % 3 > 0).long()  # another count than its capacity
    depths = {name: choice for name, choice in chosen.items() if choice.dim() == 1}
    with replay(model, depths):
        alone, _ = run(model, ids)
    results = run_ranks(_on_mesh, 2, chosen, ids)
    assert torch.equal(torch.cat([own for _, own in results]), chosen["layers.1"])
    for logits, _ in results:
        torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-10)
