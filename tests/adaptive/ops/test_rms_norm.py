"""RMS norm in few passes: torch's own numbers, and first and second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from adaptive.ops.backend import choose
from adaptive.ops.rms_norm import _FewPasses, rms_norm


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTIVE_BACKEND", raising=False)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 5), (300, 64), (5, 3, 8)])
def test_output_and_gradients_are_those_of_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.rand(shape[-1]) + 0.5
    results = []
    for dtype in (torch.float32, torch.float64):
        x_, weight_ = (v.to(dtype, copy=True).requires_grad_() for v in (x, weight))
        if dtype == torch.float32:
            assert choose("rms_norm", x_).name == "torch"
            out = rms_norm(x_, weight_, 1e-6)
        else:
            out = F.rms_norm(x_, (shape[-1],), weight_, 1e-6)
        (out * torch.arange(float(out.numel())).view_as(out).cos()).sum().backward()
        results.append([out, x_.grad, weight_.grad])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-5)


def test_first_and_second_derivatives_are_right() -> None:
    """The inverse root is saved, and depends on x: a second derivative must see that."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    norm = lambda *inputs: _FewPasses.apply(*inputs, 0.1)  # noqa: E731
    assert gradcheck(norm, (x, weight))
    assert gradgradcheck(norm, (x, weight))


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-6).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1000.0))


def test_transforms_and_compilers_see_torchs_operators() -> None:
    x, weight = torch.randn(3, 4), torch.ones(4)
    want = F.rms_norm(x, (4,), weight, 1e-6)
    mapped = torch.func.vmap(lambda row: rms_norm(row[None], weight, 1e-6)[0])(x)
    torch.testing.assert_close(mapped, want)
    compiled = torch.compile(lambda x: rms_norm(x, weight, 1e-6), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    _, tangent = torch.func.jvp(lambda x: rms_norm(x, weight, 1e-6), (x,), (x,))
    # Scaling x by a constant changes almost nothing.
    assert tangent.abs().max() < 1e-3
