"""What runs, and why: automatic choice, a forced backend, one message a process."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptive import MixtureOfDepths, MixtureOfExperts, Pattention, SkipLayer
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.ops import backend
from adaptive.ops.backend import choose, explain, operations, refuses_triton

ROOT = Path(__file__).parents[3]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op with a reference, a kernel for rows of at most 8, and two versions of a library."""
    monkeypatch.delenv("ADAPTIVE_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_REGISTRY", {})
    backend.warn_once.cache_clear()

    def narrow(x: torch.Tensor) -> str | None:
        return "rows are too long" if x.shape[-1] > 8 else None

    backend.register("twice", "reference", lambda x: x + x)
    backend.register("twice", "triton", lambda x: 2 * x, lambda _: None, narrow)
    backend.register("twice", "flash", lambda x: x * 2, lambda _: None)
    backend.register("twice", "flash", lambda x: x * 2, lambda _: "not here")
    return "twice"


def test_the_last_that_can_serve_is_chosen_and_the_others_are_explained(op: str) -> None:
    assert choose(op, torch.zeros(4)).name == "flash"
    said = explain(op, torch.zeros(4))
    assert said == {"reference": "available", "triton": "available", "flash": "chosen"}


def test_an_older_version_of_a_forced_library_serves(op, monkeypatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "flash")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, torch.zeros(4)).name == "flash"


def test_a_forced_backend_that_cannot_serve_falls_back_and_says_so_once(op, monkeypatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "triton")
    assert choose(op, torch.zeros(8)).name == "triton"
    with pytest.warns(UserWarning, match="twice runs its reference instead: rows are too long"):
        assert choose(op, torch.zeros(9)).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, torch.zeros(9)).name == "reference"
    monkeypatch.setenv("ADAPTIVE_BACKEND", "torch")
    with pytest.warns(UserWarning, match="no such implementation"):
        assert choose(op, torch.zeros(9)).name == "reference"


def test_an_unknown_backend_is_refused(op, monkeypatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "tritn")
    with pytest.raises(ValueError, match="ADAPTIVE_BACKEND=tritn: must be one of reference, "):
        choose(op, torch.zeros(4))


def test_kernels_refuse_what_they_were_not_written_for(monkeypatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refuses_triton(torch.zeros(1)) is None
    assert "float64" in (refuses_triton(torch.zeros(1, dtype=torch.float64)) or "")
    assert "meta" in (refuses_triton(torch.zeros(1, device="meta")) or "")
    monkeypatch.delenv("ADAPTIVE_BACKEND")
    assert "only when ADAPTIVE_BACKEND=triton" in (refuses_triton(torch.zeros(1)) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "not on a GPU" in (refuses_triton(torch.zeros(1)) or "")


def test_every_op_has_a_reference_that_serves_everything() -> None:
    for name in operations():
        first = backend._REGISTRY[name][0]
        assert first.name == "reference"
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert first.refuses(torch.zeros(2, 2, 2, dtype=dtype)) is None


def outputs_and_gradients() -> list[torch.Tensor]:
    """Of the public blocks."""

    def layer() -> DecoderLayer:
        return DecoderLayer(RMSNorm(16), Attention(16, 2), RMSNorm(16), SwiGLU(16, 32))

    found = []
    for make in (
        lambda: MixtureOfDepths(layer(), 16, capacity=0.5),
        lambda: SkipLayer(layer(), 16),
        lambda: MixtureOfExperts(16, 32, 3, top_k=2),
        lambda: Pattention(16, 12, 20),
    ):
        torch.manual_seed(1)
        block, x = make(), torch.randn(2, 12, 16, requires_grad=True)
        torch.manual_seed(2)
        y = block(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
    return found


def test_a_forced_backend_serves_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public blocks on interpreted kernels: outputs and gradients as of the reference."""
    results = []
    for name in ("reference", "triton"):
        monkeypatch.setenv("ADAPTIVE_BACKEND", name)
        backend.warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results.append(outputs_and_gradients())
        fallbacks = [str(w.message) for w in said if "runs its reference" in str(w.message)]
        assert all("no such implementation" in line for line in fallbacks), fallbacks
    assert len(results[0]) == len(results[1]) > 20
    for mine, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_no_library_is_looked_for_while_a_compiler_traces(monkeypatch) -> None:
    """torch 2.11's refuses to trace find_spec, which a cache does not hide from it."""

    def refuse(*_: object) -> None:
        raise AssertionError("looked for a module")

    monkeypatch.setattr("importlib.util.find_spec", refuse)
    monkeypatch.setattr(backend, "find_spec", refuse)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    for library in ("flash_attn", "flash_attn_interface"):
        installed = backend.refuses_library(library, on_gpu) is None
        assert installed == (library in backend._INSTALLED)
    assert backend.refuses_library("torch.nn.attention.varlen", on_gpu) is None
