"""Everything that a GPU runs, on a device that is not the CPU (`tests/elsewhere.py`).

Run by `test_elsewhere.py` in a process of its own.

No operator mixes devices, results are those of the CPU, and the places that wait for the device
are the ones that say so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adaptive.growth import grow
from adaptive.models import Decoder
from adaptive.models.convert.acm import convert as convert_to_learners
from adaptive.models.decoder.decode_depth import SkipDecode, generate_at_depth
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.oracle import search
from adaptive.models.decoder.speculation.drafts import ExitDraft
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter, distil_adapter
from adaptive.models.decoder.speculative import speculate
from adaptive.models.diffusion.samplers import SamplingConfig, sample
from adaptive.observe.monitor import Monitor
from adaptive.routing.tape import RoutingTape
from parallel.mesh import Mesh
from parallel.parity import Share
from tests.distributed.subjects import FAMILIES, SUBJECTS
from tests.elsewhere import DEVICE, elsewhere, moved

# The loop over experts and attention over segments are the references of ops that kernels serve.
# On a GPU without kernels they wait, as their docstrings say.
REFERENCES = {"adaptive/ops/grouped_linear.py", "adaptive/ops/varlen_attention.py"}
# Choices of variable size read one count a layer.
WAITING = {
    # Padding must be nobody's key, so that valid tokens are packed first.
    "keys_of_all_tokens": {"adaptive/routing/selection.py", "adaptive/routing/layout.py"},
    "mixture_of_depths_and_experts": {"adaptive/routing/assignment.py"},
    "skip_layer": {"adaptive/routing/selection.py"},
    "sized_feed_forward": {"adaptive/routing/selection.py"},
    "adaptive_computation": {"adaptive/routing/selection.py"},
    "segments": {"adaptive/routing/grouping.py"},
    # A protected class token leaves the number of groups open.
    "token_merging": {"adaptive/routing/grouping.py"},
}


def ids(*shape: int) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(3))


def decoder(family: str, **changes: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(FAMILIES[family].config, **changes))


def places(reads: list[str]) -> set[str]:
    """Files of ours that waited, the references of kernels left out."""
    files = {read.split(" at ")[1].split(":")[0] for read in reads}
    return files - REFERENCES - {"the test"}


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_a_training_step(name: str) -> None:
    subject = SUBJECTS[name]
    share = Share(subject.tokens(0), Mesh.single())
    torch.manual_seed(0)
    model = subject.build(share.mesh)
    batch = subject.batch(0)
    for loss in subject.losses(model, [batch], share):
        loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # What cancels to nearly zero (the bias of keys under a softmax) is rounding alone.
    least = max(float(gradient.abs().max()) for gradient in expected.values()) / 1000
    model.zero_grad()
    with elsewhere() as reads:
        moved(model)
        batch = {key: value.to(DEVICE) for key, value in batch.items()}
        reads.clear()
        for again in subject.losses(model, [batch], share):
            again.backward()
        waited = places(reads)
        torch.testing.assert_close(again.cpu(), loss)
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                wanted = expected[parameter_name]
                close = {"atol": 1e-5 * max(float(wanted.abs().max()), least), "rtol": 1e-5}
                torch.testing.assert_close(
                    parameter.grad.cpu(), wanted, **close, msg=lambda m, n=parameter_name: n + m
                )
    # Attention of uneven documents is not the wrappers' to choose.
    documents = {"adaptive/routing/selection.py", "adaptive/routing/layout.py"}
    assert waited == (documents if name == "documents" else WAITING.get(name, set()))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_evaluation_monitoring_and_generation(family: str) -> None:
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 20:] = False
    with elsewhere():
        model = moved(decoder(family))
        monitor = Monitor(model, every=1, device=torch.device(DEVICE))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tokens = ids(2, 24).to(DEVICE)
        with RoutingTape(model) as tape:
            losses = model.token_losses(tokens, tokens, mask.to(DEVICE))
        (losses.mean() + tape.loss()).backward()
        optimizer.step()
        monitor.observe(tape)
        monitor.end_step(1, {"loss": float(losses.detach().mean())}, tokens=44, seconds=1.0)
        model.eval()
        with torch.no_grad(), RoutingTape(model):
            logits = model(tokens, mask.to(DEVICE))
        sampling = Sampling(temperature=0)
        made = list(generate(model, [[1, 2, 3], [4]], max_new_tokens=3, sampling=sampling))
        found = logits.cpu()
    assert monitor.latest["loss"] > 0
    assert found.isfinite().all()
    assert [len(row) for row in made[-1].tokens] == [3, 3]


def draft(model: Decoder) -> None:
    adapter = moved(ExitAdapter.of(model, 1))
    assert len(list(distil_adapter(model, adapter, [ids(2, 8).to(DEVICE)]))) == 1
    list(speculate(model, [[1, 2, 3]], ExitDraft(adapter), max_new_tokens=5))


def fade(model: Decoder) -> None:
    made = generate_at_depth(model, [[1, 2], [3]], SkipDecode(2, 2, 1, 4), max_new_tokens=4)
    assert [len(row) for row in made] == [4, 4]


def convert(model: Decoder) -> None:
    config = FAMILIES["adaptive_computation"].config.adaptive_computation
    assert config is not None
    convert_to_learners(model, config, [ids(2, 8).to(DEVICE)])


def find_paths(model: Decoder) -> None:
    search(model, ids(12).to(DEVICE), [3, 7], [0.5])


def widen(model: Decoder) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tokens = ids(2, 8).to(DEVICE)
    for size in (None, 48):
        if size:
            grow(model, tokens=size, optimizer=optimizer)
        model.token_losses(tokens, tokens).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("family", "use"),
    [
        ("dense", draft),
        ("dense", fade),
        ("dense", convert),
        ("skip_layer", find_paths),
        ("pattention", widen),
    ],
)
def test_what_else_is_done_with_a_model(family: str, use: Callable[[Decoder], None]) -> None:
    with elsewhere():
        use(moved(decoder(family, tie_embeddings=False)).eval())


@pytest.mark.parametrize("guidance", ["classifier_free", "path_drop"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_images_are_those_of_the_cpu(sampler: str, guidance: str) -> None:
    torch.manual_seed(0)
    model = SUBJECTS["sprint"].build(Mesh.single())
    config = SamplingConfig(sampler=sampler, steps=3, guidance=guidance, scale=2.0)
    labels = torch.tensor([0, 3])
    expected = sample(model, labels, config)
    with elsewhere():
        got = sample(moved(model), labels.to(DEVICE), config).cpu()
    torch.testing.assert_close(got, expected)


def test_a_tensor_made_on_the_cpu_by_mistake_is_noticed() -> None:
    with elsewhere() as reads:
        x = torch.randn(4, 8).to(DEVICE)
        with pytest.raises(RuntimeError, match="tensors on elsewhere:0 and on cpu"):
            x + torch.ones(4, 8)
        with pytest.raises(RuntimeError, match="copies from the host and waits"):
            x.new_tensor(1.0)
        reads.clear()
        assert x.sum().item() == pytest.approx(float(x.cpu().sum()))
    assert len(reads) == 2


@pytest.mark.parametrize("inside", [True, False], ids=["tape open", "tape closed"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_recomputation_in_another_thread(family: str, inside: bool) -> None:
    """A GPU's backward runs in a thread of its own, which has none of this one's contexts."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        model = decoder(family, recompute=recompute)
        tokens = ids(3, 24)
        torch.manual_seed(5)
        with RoutingTape(model) as tape:
            loss = model.token_losses(tokens, tokens).mean() + tape.loss()
            thread = threading.Thread(target=loss.backward)
            if inside:
                thread.start()
                thread.join()
        if not inside:
            thread.start()
            thread.join()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients(False), gradients(True)
    assert expected.keys() == got.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=name)
