"""ops.parameter_attention: against golden tensors, float64 formulas and its own memory promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from adaptive import checkpoint
from adaptive.ops import parameter_attention as op
from adaptive.ops.parameter_attention import _mixed, parameter_attention

GOLDEN = Path(__file__).parents[2] / "golden"
ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def formula(x, keys, values, scale, activation):
    """The three definitions, written once more and left to autograd."""
    scores = x @ keys.T
    if activation == "softmax":
        return scale * torch.softmax(scores, -1) @ values
    if activation == "l2_norm_gelu":
        return F.gelu(scale * F.normalize(scores, dim=-1)) @ values
    return scale * F.normalize(F.gelu(scores), dim=-1) @ values


def tensors(tokens=70, width=12, count=20, out=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    shapes = ((tokens, width), (count, width), (count, out))
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def gradients(output, inputs):
    generator = torch.Generator().manual_seed(8)
    grad = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return torch.autograd.grad(output, inputs, grad)


@pytest.fixture(params=["reference", "torch"])
def backend(request, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_agrees_with_the_golden_layer(activation, save_memory, backend):
    golden = load_file(GOLDEN / f"pattention_{activation}.safetensors")
    x, keys, values = (golden[name].requires_grad_() for name in ("x", "key", "value"))
    y = parameter_attention(
        x.flatten(0, 1),
        keys,
        values,
        scale=math.sqrt(keys.shape[0]),
        activation=activation,
        save_memory=save_memory,
    ).view_as(golden["y"])
    torch.testing.assert_close(y, golden["y"], atol=1e-4, rtol=0)
    got = torch.autograd.grad(y, (x, keys, values), golden["grad_y"])
    for name, grad in zip(("grad_x", "grad_key", "grad_value"), got, strict=True):
        torch.testing.assert_close(grad, golden[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_gradients_equal_autograd_of_the_formula(activation, save_memory, monkeypatch):
    # Blocks smaller than the batch, with a remainder.
    monkeypatch.setattr(op, "_SAVING_ROWS", 64)
    monkeypatch.setattr(op, "_SPAN_ROWS", 128)
    monkeypatch.setattr(op, "_CACHED_NUMBERS", 64 * 20)
    inputs = tensors(tokens=300)
    scale = 3.7  # not √n: as after growth
    options = {"scale": scale, "activation": activation, "save_memory": save_memory}
    y = parameter_attention(*inputs, **options)
    expected = formula(*inputs, scale, activation)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)
    for got, want in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, backend):
    inputs = tensors(tokens=5, width=4, count=6, out=3)
    assert torch.autograd.gradcheck(
        lambda *args: parameter_attention(*args, scale=2.0, activation=activation), inputs
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_without_direction_are_finite_and_leave_the_others_alone(activation, backend):
    """Trap: at zero norm c a / ‖a‖ is 0/0, and one NaN row poisons every key's gradient."""
    x, keys, values = tensors(tokens=4, dtype=torch.float32)
    with torch.no_grad():
        x[1] = 0
    y = parameter_attention(x, keys, values, scale=2.0, activation=activation)
    others = [0, 2, 3]
    alone = parameter_attention(x[others].detach(), keys, values, scale=2.0, activation=activation)
    # The eps changes nothing elsewhere: float32 rounding of a product of another shape remains.
    torch.testing.assert_close(y[others], alone, atol=1e-6, rtol=0)
    if activation != "softmax":
        assert torch.equal(y[1], torch.zeros_like(y[1]))
        grad_x, grad_keys, grad_values = gradients(y, (x, keys, values))
        assert torch.equal(grad_x[1], torch.zeros_like(grad_x[1]))
    else:
        grad_x, grad_keys, grad_values = gradients(y, (x, keys, values))
    for grad in (grad_x, grad_keys, grad_values):
        assert grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_the_input_does_not_matter(size, backend):
    """L2-normalisation first means Θ(sx) = Θ(x); an eps added to the norm would break it."""
    x, keys, values = (t.detach() for t in tensors(dtype=torch.float32))
    y = parameter_attention(x, keys, values, scale=2.0)
    torch.testing.assert_close(parameter_attention(x * size, keys, values, scale=2.0), y)


def test_no_tokens_still_give_every_parameter_a_gradient(backend):
    x, keys, values = tensors(tokens=0)
    y = parameter_attention(x, keys, values, scale=2.0)
    assert y.shape == (0, 9)
    for grad in gradients(y, (keys, values)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_inputs_cost_nothing_and_change_no_other_gradient(frozen, backend):
    inputs = tensors()
    wanted = dict(enumerate(gradients(formula(*inputs, 2.0, "l2_norm_gelu"), inputs)))
    for index in frozen:
        inputs[index].requires_grad_(False)
    rest = [index for index in range(3) if index not in frozen]
    y = parameter_attention(*inputs, scale=2.0)
    for index, grad in zip(rest, gradients(y, [inputs[i] for i in rest]), strict=True):
        torch.testing.assert_close(grad, wanted[index], atol=1e-10, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_chosen_is_the_dense_product(activation, backend):
    inputs = tensors()
    dense = parameter_attention(*inputs, scale=2.0, activation=activation)
    sparse = parameter_attention(*inputs, scale=2.0, activation=activation, top_k=20)
    torch.testing.assert_close(sparse, dense, atol=1e-12, rtol=0)
    for got, want in zip(gradients(sparse, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_top_k_drops_the_smallest_weights():
    x, keys, values = tensors()
    weights = F.gelu(2.0 * F.normalize(x @ keys.T, dim=-1))
    smallest = weights.abs().argsort(dim=1)[:, :13]
    expected = weights.scatter(1, smallest, 0) @ values
    y = parameter_attention(x, keys, values, scale=2.0, top_k=7)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    inputs = (x, keys, values)
    for got, want in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_implementation_drops_the_same_weights(activation, monkeypatch):
    inputs = tensors(tokens=150, count=400)
    results = []
    for backend, save_memory in (("reference", False), ("torch", False), ("torch", True)):
        monkeypatch.setenv("ADAPTIVE_BACKEND", backend)
        torch.manual_seed(3)
        y = parameter_attention(
            *inputs, scale=2.0, activation=activation, dropout=0.4, save_memory=save_memory
        )
        results.append([y, *gradients(y, inputs)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_dropout_keeps_the_mean_and_drops_its_share():
    ones = torch.ones(64, 1)
    keys, values = torch.ones(1000, 1), torch.eye(1000)
    dense = parameter_attention(ones, keys, values, scale=1000**0.5)
    dropped = parameter_attention(ones, keys, values, scale=1000**0.5, dropout=0.25)
    share = float((dropped == 0).double().mean())
    # 64,000 draws: a standard deviation of 0.0017.
    assert abs(share - 0.25) < 0.01
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], dense[kept] / 0.75)


@pytest.mark.parametrize("top_k", [None, 7])
def test_recomputation_repeats_dropout_and_choice(top_k):
    inputs = tensors()

    def run(*args):
        return parameter_attention(*args, scale=2.0, dropout=0.5, top_k=top_k)

    torch.manual_seed(5)
    plain = run(*inputs)
    torch.manual_seed(5)
    recomputed = checkpoint(run, *inputs)
    assert torch.equal(plain, recomputed)
    for got, want in zip(gradients(recomputed, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_low_precision_errs_no_more_than_twice_the_reference(activation, dtype, monkeypatch):
    exact = tensors(tokens=16)
    want = formula(*exact, 3.0, activation)
    wants = [want.detach(), *gradients(want, exact)]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    errors = {}
    for backend in ("reference", "torch"):
        monkeypatch.setenv("ADAPTIVE_BACKEND", backend)
        y = parameter_attention(*low, scale=3.0, activation=activation)
        assert y.dtype == dtype
        pairs = zip([y.detach(), *gradients(y, low)], wants, strict=True)
        errors[backend] = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    for reference, blocked in zip(errors["reference"], errors["torch"], strict=True):
        assert blocked <= 2 * reference + 1e-3


def test_autocast_computes_in_its_dtype():
    inputs = tensors(tokens=6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = parameter_attention(*inputs, scale=2.0)
    assert y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in gradients(y, inputs))


def live_scores(run, columns):
    """The most rows of any tensor as wide as the scores that `run` creates."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (columns,):
                    self.rows = max(self.rows, tensor.shape[0])
            return out

    with Widest() as widest:
        run()
    return widest.rows


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saving_memory_never_holds_more_than_a_block_of_scores(activation, monkeypatch):
    monkeypatch.setattr(op, "_SAVING_ROWS", 64)
    monkeypatch.setenv("ADAPTIVE_BACKEND", "torch")
    inputs = tensors(tokens=400, count=33)

    def train(save_memory):
        y = parameter_attention(*inputs, scale=2.0, activation=activation, save_memory=save_memory)
        gradients(y, inputs)

    assert live_scores(lambda: train(True), 33) == 64
    assert live_scores(lambda: train(False), 33) == 400

    def infer():
        with torch.no_grad():
            parameter_attention(*inputs, scale=2.0, activation=activation)

    assert live_scores(infer, 33) == 64


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"activation": "gelu"}, "activation='gelu': must be one of l2_norm_gelu"),
        ({"top_k": 0}, "top_k=0: must be between 1 and the 20 parameter tokens"),
        ({"top_k": 21}, "top_k=21: must be between 1 and the 20 parameter tokens"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(options, line):
    with pytest.raises(ValueError, match=line):
        parameter_attention(*tensors(), scale=1.0, **options)


def test_shards_that_are_seeded_alike_drop_other_weights() -> None:
    torch.manual_seed(0)
    x, keys, values = torch.randn(70, 6), torch.randn(40, 6), torch.randn(40, 5)
    out = []
    for shard in (0, 0, 1):
        torch.manual_seed(1)
        out.append(parameter_attention(x, keys, values, scale=1.0, dropout=0.5, shard=shard))
    assert torch.equal(out[0], out[1])
    assert not torch.isclose(out[0], out[2]).all(1).any()


def test_seeds_of_ranks_and_shards_differ_in_the_bits_that_a_cpu_takes() -> None:
    seeds = {_mixed(7, shard, rank, 64 * at) % 2**32
             for shard in range(8) for rank in range(8) for at in range(64)}  # fmt: skip
    assert len(seeds) == 8 * 8 * 64
