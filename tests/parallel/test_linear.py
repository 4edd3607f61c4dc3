"""Linear layers through either library: values, gradients, gradients of gradients, transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from parallel import linear as matrix_product
from parallel import linear as module
from parallel.flop_formulas import torch_flop_counter
from parallel.linear import Linear, linear

IN, OUT = 24, 40


@pytest.fixture(autouse=True)
def onednn_takes_everything(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Whatever the processor: every product goes to oneDNN, and is written down."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matrix_product, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matrix_product, "_WORTH_COMPILING", 1)
    calls: list[tuple[int, ...]] = []
    real = matrix_product._onednn

    def noted(a: Tensor, b: Tensor, *rest: object) -> Tensor:
        calls.append((*a.shape, b.shape[0]))
        return real(a, b, *rest)

    monkeypatch.setattr(matrix_product, "_onednn", noted)
    return calls


def leaves(*batch: int, bias: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(*batch, IN), (OUT, IN), (OUT,)][: 3 if bias else 2]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(32,), (4, 16), (16, 1, 2), (0,), (7,), (17,)])
def test_values_and_gradients_equal_torch_in_float64(
    batch: tuple[int, ...], bias: bool, onednn_takes_everything: list[tuple[int, ...]]
) -> None:
    given = leaves(*batch, bias=bias)
    wide = [x.detach().double().requires_grad_() for x in given]
    out, wanted = linear(*given), F.linear(*wide)
    assert out.shape == wanted.shape
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(out, given, grad.float()),
        torch.autograd.grad(wanted, wide, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)
    rows = wanted.numel() // OUT
    expected = [(rows, IN, OUT), (rows, OUT, IN), (OUT, rows, IN)]
    # Row counts that rarely come back, as skipping leaves them, are not compiled for.
    assert onednn_takes_everything == (expected if rows in (7, 32, 64) else [])


def test_gradients_of_gradients_are_those_of_torch() -> None:
    given = leaves(32)

    def penalty(function) -> list[Tensor]:  # type: ignore[no-untyped-def]
        (slope,) = torch.autograd.grad(function(*given).tanh().sum(), given[0], create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), given[:2]))

    for a, b in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_only_asked_gradients_are_computed(
    needed: tuple[int, ...], onednn_takes_everything: list[tuple[int, ...]]
) -> None:
    given = [leaf.requires_grad_(i in needed) for i, leaf in enumerate(leaves(32))]
    grad = torch.randn(32, OUT)
    out = linear(*given)
    assert len(onednn_takes_everything) == 1
    asked = [given[i] for i in needed]
    got = torch.autograd.grad(out, asked, grad)
    for a, b in zip(got, torch.autograd.grad(F.linear(*given), asked, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(onednn_takes_everything) == 1 + (0 in needed) + (1 in needed)


def test_recomputation_leaves_the_last_product_out_as_torch_does() -> None:
    first, last, x = Linear(IN, OUT), Linear(OUT, IN), torch.randn(32, IN, requires_grad=True)
    with torch_flop_counter(display=False) as counter:
        checkpoint(
            lambda x: last(first(x).relu()), x, use_reentrant=False
        ).square().sum().backward()
    assert counter.get_total_flops() == (6 + 1) * 2 * 32 * IN * OUT


def test_a_slice_of_a_wider_weight_keeps_its_gradient() -> None:
    x, wide = torch.randn(32, IN), torch.randn(OUT, 2 * IN, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(f(x, wide[:, :IN]).square().sum(), wide)[0] for f in (linear, F.linear)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_operations_are_counted_forward_and_backward() -> None:
    layer, x = Linear(IN, OUT), torch.randn(32, IN, requires_grad=True)
    with torch_flop_counter(display=False) as counter:
        layer(x).sum().backward()
    # The gradient of a sum is an expanded number, which is no whole matrix: torch's own product.
    assert counter.get_total_flops() == 3 * 2 * 32 * IN * OUT


def test_autocast_and_transforms_stay_with_torch(
    onednn_takes_everything: list[tuple[int, ...]],
) -> None:
    x, weight, _ = (leaf.detach() for leaf in leaves(32))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    wanted = F.linear(x, weight)
    mapped = torch.func.vmap(linear, in_dims=(0, None))(x.view(2, 16, IN), weight)
    torch.testing.assert_close(mapped.flatten(0, 1), wanted)
    out, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    torch.testing.assert_close(out, tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        found = torch.autograd.forward_ad.unpack_dual(linear(dual, weight)).tangent
        torch.testing.assert_close(found, wanted)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert not onednn_takes_everything
    assert module.linear(x, weight).shape == (32, OUT)
    assert len(onednn_takes_everything) == 1


def test_a_compiled_graph_calls_the_same_products(
    onednn_takes_everything: list[tuple[int, ...]],
) -> None:
    x, weight, bias = leaves(32)
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    grad = torch.randn(32, OUT)
    found = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias), grad)
    assert len(onednn_takes_everything) == 3
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x, weight).dtype == torch.bfloat16
