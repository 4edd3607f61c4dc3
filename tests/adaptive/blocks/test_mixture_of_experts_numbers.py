"""Experts in evaluation, under autocast and casts, and with what lies at padding."""

import pytest
import torch

from adaptive import HypersphericalRouter, RoutingTape
from tests.adaptive.blocks.test_mixture_of_experts import DIM, experts, tokens


def test_evaluation_drops_nothing_so_no_token_depends_on_later_ones() -> None:
    module = experts(top_k=2, capacity_factor=0.5).eval()
    dropless = experts(top_k=2).eval()
    torch.testing.assert_close(module(tokens()), dropless(tokens()))
    torch.testing.assert_close(module(tokens()[:1]), module(tokens())[:1])


def test_autocast_computes_the_experts_in_its_dtype_and_routes_in_32_bits() -> None:
    module, x = experts(z_coefficient=0.1, shared_experts=1).float(), tokens().float()
    exact = x.clone().requires_grad_()
    expected = module(exact)
    expected.square().sum().backward()
    low = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = module.router(x)
        hyperspherical = HypersphericalRouter(DIM, 4)(x)
        out = module(low)
    out.square().sum().backward()
    assert logits.dtype == hyperspherical.dtype == out.dtype == torch.float32
    assert torch.equal(logits, module.router(x))
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    assert exact.grad is not None
    torch.testing.assert_close(low.grad, exact.grad, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_rounds_neither_bias_nor_load(dtype: torch.dtype) -> None:
    module = experts(bias_rate=0.001).float()
    assert module.expert_bias is not None
    module.expert_bias.bias.fill_(0.1234567)
    module.to(dtype)
    bias = module.expert_bias.bias
    assert torch.equal(bias, torch.full_like(bias, 0.1234567))
    assert bias.dtype.itemsize >= 4
    for _ in range(64):
        module.expert_bias.count(torch.tensor([300.0, 301.0, 302.0, 303.0]))
    assert module.expert_bias.load.tolist() == [64 * n for n in (300, 301, 302, 303)]


def test_a_nan_at_padding_reaches_no_gradient() -> None:
    module = experts(z_coefficient=0.1)
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    x[~valid] = torch.nan
    with RoutingTape() as tape:
        out = module(x, token_mask=valid)
    (out[valid].square().sum() + tape.loss()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name
