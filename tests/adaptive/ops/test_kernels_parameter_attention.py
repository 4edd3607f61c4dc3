"""The parameter attention kernels against the formula, and the shape of what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive.ops.kernels import parameter_attention as kernels
from adaptive.ops.kernels.parameter_attention import parameter_attention
from tests.adaptive.ops.kernel_checks import (
    COMPILED,
    DEVICE,
    DTYPES,
    assert_within_twice_the_reference_error,
    draw,
)


def formula(x, keys, values, scale, activation):
    scores = x @ keys.T
    if activation == "l2_norm_gelu":
        return F.gelu(scale * scores / scores.norm(dim=1, keepdim=True)) @ values
    weights = F.gelu(scores)
    return scale * weights / weights.norm(dim=1, keepdim=True) @ values


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 tokens, the fewest."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize(
    ("tokens", "params", "width", "out"),
    [
        (0, 5, 4, 3),
        (1, 1, 1, 1),
        (133, 37, 11, 7),
        pytest.param(1000, 300, 64, 48, marks=COMPILED),
    ],
)
def test_weights_of_parameter_tokens_and_all_gradients(
    tokens, params, width, out, activation, dtype
) -> None:
    x, keys, values = draw(tokens, width), draw(params, width, seed=1), draw(params, out, seed=2)
    scale = params**0.5
    assert_within_twice_the_reference_error(
        lambda x, k, v: parameter_attention(x, k, v, scale=scale, activation=activation),
        lambda x, k, v: formula(x, k, v, scale, activation),
        [x, keys, values],
        dtype,
    )


def test_more_parameter_tokens_than_a_block_holds() -> None:
    x, keys, values = draw(3, 4), draw(2100, 4, seed=1), draw(2100, 2, seed=2)
    assert_within_twice_the_reference_error(
        lambda x, k, v: parameter_attention(x, k, v, scale=45.0),
        lambda x, k, v: formula(x, k, v, 45.0, "l2_norm_gelu"),
        [x, keys, values],
        torch.float32,
    )


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_a_row_without_direction_gives_zeros_not_nan(activation: str) -> None:
    x = draw(3, 4)
    x[1] = 0
    inputs = [x, draw(5, 4, seed=1), draw(5, 2, seed=2)]
    inputs = [t.requires_grad_() for t in inputs]
    out = parameter_attention(*inputs, scale=2.0, activation=activation)
    out.sum().backward()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(inputs[0].grad[1], torch.zeros_like(x[1]))
    assert all(t.grad.isfinite().all() for t in inputs)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.usefixtures("small_chunks")
def test_no_matrix_of_tokens_by_parameter_tokens_is_made() -> None:
    tokens, params = 384, 24
    inputs = [draw(tokens, 4), draw(params, 4, seed=1), draw(params, 4, seed=2)]
    inputs = [t.requires_grad_() for t in inputs]
    with LargestTensor() as seen:
        parameter_attention(*inputs, scale=9.0).sum().backward()
    # The backward's two chunks of 128 tokens, however many tokens there are.
    assert seen.elements == 2 * 128 * params < tokens * params


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs() -> None:
    x = draw(9, 6).to(torch.bfloat16).requires_grad_()
    keys, values = draw(11, 6, seed=1).requires_grad_(), draw(11, 5, seed=2).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = parameter_attention(x, keys, values, scale=11**0.5)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert keys.grad is not None
    assert keys.grad.dtype == torch.float32
    exact = formula(x.double(), keys.double(), values.double(), 11**0.5, "l2_norm_gelu")
    torch.testing.assert_close(out.double(), exact, atol=0.1, rtol=0.05)
