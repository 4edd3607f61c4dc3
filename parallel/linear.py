"""Linear layers, and the matrix products below them, by the faster of torch's two libraries.

torch multiplies float32 matrices on x86 through MKL, which takes its AVX2 path on processors that
are not Intel's. torch also carries oneDNN, which compiles for the vector width it finds: on an AMD
EPYC with AVX-512 it is 2.2 times as fast (docs/matrix_products.md). The choice depends on the
machine and the shape only, never on a measurement: ranks that repeat each other's computation must
get the same numbers. Everywhere else, and wherever torch does something with a call that it cannot
do with a Function of ours (`plain_eager`), a layer is `torch.nn.functional.linear`.

oneDNN compiles a product once per shape, in about 0.25 ms, and keeps the last thousand. Callers
whose number of rows changes from step to step round it up by `rounded_rows`, with rows of zeros, so
that shapes come back.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from parallel.flop_formulas import flop_formula

_ROW_MULTIPLE = 16
"""Of rows that shapes are rounded up to; layers compile for fewer rows too, but not for other
counts above it, which, as skipping leaves them, rarely come back."""
_WORTH_COMPILING = 128**3
"""Multiplications from which oneDNN's dearer call pays."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, as `torch.nn.functional.linear`.

    Args:
        x: [..., in].
        weight_OI: [out, in].
        bias_O: [out] or None.

    Returns:
        [..., out].
    """
    if torch.compiler.is_compiling():
        return _compiled(x, weight_OI, bias_O)
    rows = x.numel() // max(x.shape[-1], 1)
    coming_back = rows < _ROW_MULTIPLE or rows % _ROW_MULTIPLE == 0
    if (
        not coming_back
        or not worth_compiling(rows, weight_OI)
        or not uses_onednn(x)
        or not uses_onednn(weight_OI)
        or not plain_eager()
    ):
        return F.linear(x, weight_OI, bias_O)
    # A slice of a wider weight is copied: a thousandth of the products' time, and oneDNN wants it.
    weight_OI = weight_OI.contiguous()
    x_TI = x if x.dim() == 2 else x.reshape(rows, x.shape[-1])
    kept_TI = _Keep.apply(x_TI, weight_OI)
    if kept_TI.grad_fn is not None:
        out_TO = _Linear.apply(kept_TI, weight_OI, bias_O, kept_TI.grad_fn, x.requires_grad)
    elif bias_O is not None and bias_O.requires_grad and torch.is_grad_enabled():
        out_TO = product(x_TI, weight_OI.t()) + bias_O
    else:
        out_TO = product(x_TI, weight_OI.t(), bias=bias_O)
    return out_TO if x.dim() == 2 else out_TO.view(*x.shape[:-1], weight_OI.shape[0])


def _compiled(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` in a compiled graph, where a product by oneDNN is an operator of its own."""
    rows = x.numel() // max(x.shape[-1], 1)
    if (
        _serves_compiled()
        and x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and rows % _ROW_MULTIPLE == 0
        and worth_compiling(rows, weight_OI)
    ):
        out = matrix_product(x.reshape(rows, x.shape[-1]), weight_OI.t())
        out = out if bias_O is None else out + bias_O
        return out.view(*x.shape[:-1], weight_OI.shape[0])
    return F.linear(x, weight_OI, bias_O)


def _serves_compiled() -> bool:
    return bool(torch.backends.mkldnn.enabled) and onednn_is_faster()


# What torch.compiler.assume_constant_result does, which would import the compiler here.
_serves_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("adaptive::matrix_product", mutates_args=())
def matrix_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`product` as an operator that compilers call and do not look into; differentiable."""
    return product(a_MK, b_KN)


@matrix_product.register_fake
def _(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _factor_gradients(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    a_MK, b_KN = ctx.saved_tensors
    for_a, for_b = ctx.needs_input_grad
    return (
        matrix_product(grad_MN, b_KN.t()) if for_a else None,
        # As the layers do: a weight is what is transposed, and so is its gradient.
        matrix_product(grad_MN.t(), a_MK).t() if for_b else None,
    )


matrix_product.register_autograd(_factor_gradients, setup_context=_keep_factors)


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Keep(torch.autograd.Function):
    """`x` itself; saves what the products' gradients need before they are computed.

    A recomputed forward stops when it has saved what the first one saved. torch's own layers save
    their input and then multiply, so the last product of a checkpointed block is never repeated;
    a Function saves after it has computed. Hence two: this one saves, the next computes.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.set_materialize_grads(False)
        return x_TI.view_as(x_TI)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor | None) -> tuple[Tensor | None, None]:
        return grad_TI, None


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias`. `keeper` is the node of `_Keep` and has the two saved."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, keeper: Any, for_x: bool
    ) -> Tensor:
        ctx.keeper, ctx.for_x = keeper, for_x
        return product(x_TI, weight_OI.t(), bias=bias_O)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.keeper.saved_tensors
        _, for_weight, for_bias, *_ = ctx.needs_input_grad
        return (
            _product(grad_TO, weight_OI) if ctx.for_x else None,
            _product(grad_TO.t(), x_TI) if for_weight else None,
            grad_TO.sum(0) if for_bias else None,
            None,
            None,
        )


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`a @ b`, recorded where a backward is itself differentiated."""
    return _Product.apply(a_MK, b_KN) if torch.is_grad_enabled() else product(a_MK, b_KN)


class _Product(torch.autograd.Function):
    """`a @ b`, its own derivative's derivative: gradients of gradients are asked for too."""

    @staticmethod
    def forward(ctx: Any, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        ctx.save_for_backward(a_MK, b_KN)
        return product(a_MK, b_KN)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        a_MK, b_KN = ctx.saved_tensors
        for_a, for_b = ctx.needs_input_grad
        return (
            _product(grad_MN, b_KN.t()) if for_a else None,
            _product(a_MK.t(), grad_MN) if for_b else None,
        )


def product(
    a_MK: Tensor, b_KN: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`a @ b + bias`, [M, N]; not differentiable by autograd.

    Args:
        a_MK: [M, K].
        b_KN: [K, N], same dtype and device.
        bias: [N] or None.
        out: [M, N], memory that may be used for the result. The result is what is returned;
            whether it lies there depends on the library.
    """
    worth = worth_compiling(a_MK.shape[0], b_KN)
    if worth and uses_onednn(a_MK) and _dense_layout(a_MK) and _dense_layout(b_KN):
        if bias is None and not a_MK.is_contiguous() and _transposed_is_cheaper(a_MK, b_KN):
            transposed_MN = _onednn(b_KN.t(), a_MK, None, "none", [], "").t()
            return transposed_MN.contiguous() if out is None else out.copy_(transposed_MN)
        return _onednn(a_MK, b_KN.t(), bias, "none", [], "")
    if bias is not None:
        return torch.addmm(bias, a_MK, b_KN)
    return torch.mm(a_MK, b_KN, out=out) if out is not None else torch.mm(a_MK, b_KN)


def add_product(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """`total += a @ b`, in place."""
    if uses_onednn(a_MK):
        total_MN.add_(product(a_MK, b_KN))
    else:
        # Not addmm_, which FLOP counters do not know.
        torch.addmm(total_MN, a_MK, b_KN, out=total_MN)


def rounded_rows(rows: int, weight: Tensor) -> int:
    """How many rows to multiply by `weight` where `rows` of them mean anything."""
    if not (uses_onednn(weight) and worth_compiling(rows, weight)):
        return rows
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def worth_compiling(rows: int, weight: Tensor) -> bool:
    """Whether a product of that many rows and `weight`, [K, N] or [N, K], is large enough."""
    return rows * weight.shape[0] * weight.shape[1] >= _WORTH_COMPILING


def _transposed_is_cheaper(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether `a` is so large that `(bᵀ aᵀ)ᵀ`, and a copy of that, is cheaper than `a b`.

    oneDNN's call copies a first factor that is a transposed view.
    """
    (m, k), n = a_MK.shape, b_KN.shape[1]
    return k * (m - n) > 2 * m * n


def _dense_layout(matrix: Tensor) -> bool:
    """Whether it is no slice of a wider matrix: oneDNN takes a thousand times as long for those."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def plain_eager() -> bool:
    """Whether nothing but autograd looks at the operators: a Function may then stand in for them.

    False under compilation, autocast, transforms of torch.func and forward-mode differentiation,
    all of which know torch's operators and not a Function.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def uses_onednn(x: Tensor) -> bool:
    """Whether large products of tensors like `x` go to oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and torch has oneDNN."""
    if not torch.backends.mkldnn.is_available() or _onednn is None:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() != "GenuineIntel"


def _vendor() -> str:
    """The vendor_id of the first processor; Intel's where none can be read."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else "GenuineIntel"


# What torch's own compiler calls for linear layers: x [M, K], weight [N, K].
_packet: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_onednn: Any = None if _packet is None else _packet.default

if _packet is not None:

    @flop_formula(_packet)
    def _operations(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]
