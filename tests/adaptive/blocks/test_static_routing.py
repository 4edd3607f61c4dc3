"""Fixed-capacity and dropless routing read nothing back to the host: they compile and capture."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adaptive import MixtureOfDepths, MixtureOfExperts, RoutingTape
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from tests.adaptive.ops.kernel_checks import DEVICE

DIM = 32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def routed_layer() -> MixtureOfDepths:
    torch.manual_seed(0)
    norms = RMSNorm(DIM), RMSNorm(DIM)
    layer = DecoderLayer(norms[0], Attention(DIM, 4), norms[1], SwiGLU(DIM, 64))
    return MixtureOfDepths(layer, DIM, capacity=0.25)


def experts() -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(DIM, 64, 4, top_k=2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' path, whose launches are opaque to fake tensors as to compilers."""
    monkeypatch.setenv("ADAPTIVE_BACKEND", "triton")


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "reference")


def train_on_fake_tensors(module: nn.Module) -> Tensor:
    """One forward and backward in which no tensor has a value: reading one raises."""
    module = module.to(DEVICE)
    with FakeTensorMode() as mode:
        state = {n: mode.from_tensor(p) for n, p in module.state_dict(keep_vars=True).items()}
        x = torch.randn(2, 16, DIM, device=DEVICE, requires_grad=True)
        with RoutingTape(module) as tape:
            y = torch.func.functional_call(module, state, (x,))
        (y.sum() + tape.loss()).backward()
        assert x.grad is not None
    return y


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [routed_layer, experts])
def test_no_number_is_read_back_to_the_host(make: Callable[[], nn.Module]) -> None:
    assert train_on_fake_tensors(make()).shape == (2, 16, DIM)


@pytest.mark.usefixtures("reference")
def test_the_reference_of_the_fixed_capacity_path_reads_none_either() -> None:
    assert train_on_fake_tensors(routed_layer()).shape == (2, 16, DIM)


@pytest.mark.usefixtures("reference")
def test_a_choice_of_variable_size_is_noticed() -> None:
    with pytest.raises(DataDependentOutputException):
        train_on_fake_tensors(routed_layer().eval())


def compiled_equals_eager(backend: str) -> None:
    module = routed_layer().to(DEVICE)
    x = torch.randn(2, 16, DIM, device=DEVICE, requires_grad=True)
    expected = module(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    out = compiled(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("path", ["reference", "kernels"])
def test_the_fixed_capacity_block_compiles_into_one_graph(path, request) -> None:
    request.getfixturevalue(path)
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_the_fixed_capacity_block_compiles_with_inductor() -> None:
    compiled_equals_eager("inductor")


def test_a_tape_opened_after_compilation_records() -> None:
    module = routed_layer()
    x = torch.randn(2, 16, DIM)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    silent = compiled(x)
    with RoutingTape() as tape:
        heard = compiled(x)
    torch.testing.assert_close(heard, silent)
    assert len(tape.records) == 1
    assert tape.records[0].executed == 2 * 4
    assert tape.loss() > 0


@pytest.mark.gpu
@needs_gpu
def test_the_fixed_capacity_block_is_captured_in_a_cuda_graph() -> None:
    module = routed_layer().cuda().bfloat16()
    x = torch.randn(2, 64, DIM, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        held = x.detach().requires_grad_()
        out = module(held)
        (grad,) = torch.autograd.grad(out.float().square().sum(), held)
        return torch.cat([out, grad])

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("make", [routed_layer, experts])
def test_a_step_on_a_gpu_never_waits_for_the_host(make: Callable[[], nn.Module]) -> None:
    module = make().cuda()
    x = torch.randn(2, 64, DIM, device="cuda", requires_grad=True)
    module(x).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with RoutingTape(module) as tape:
            y = module(x)
        (y.sum() + tape.loss()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
