"""torch's FLOP counter knows our operators where it is made by `torch_flop_counter`."""

import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import flop_registry

import adaptive.ops  # noqa: F401
from parallel.flop_formulas import _FORMULAS, flop_formula, torch_flop_counter

ROOT = Path(__file__).parents[2]
OPERATORS = (
    "grouped_rows",
    "grouped_weight_gradient",
    "varlen_attention",
    "varlen_attention_backward",
)


def test_a_counter_counts_kernels_that_were_never_used_and_loads_none() -> None:
    code = """
import os, sys
os.environ["TRITON_INTERPRET"], os.environ["ADAPTIVE_BACKEND"] = "1", "triton"
import torch
from adaptive.ops.grouped_linear import grouped_linear
from parallel.flop_formulas import torch_flop_counter
assert not {"torch.utils.flop_counter", "triton"} & set(sys.modules)
x, w = torch.randn(5, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
counter = torch_flop_counter(display=False)
assert "adaptive.ops.kernels.launching" not in sys.modules
with counter:
    grouped_linear(x, w, torch.tensor([4, 1])).sum().backward()
assert "adaptive.ops.kernels.launching" in sys.modules
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(3 * 2 * 5 * 8 * 3)], done.stdout + done.stderr


def test_every_operator_with_products_has_a_formula() -> None:
    torch_flop_counter(display=False)
    for name in OPERATORS:
        assert getattr(torch.ops.adaptive, name) in flop_registry


def test_a_formula_given_after_a_counter_was_made_is_in_the_next() -> None:
    torch_flop_counter(display=False)

    @torch.library.custom_op("adaptive::counted_for_a_test", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    flop_formula(torch.ops.adaptive.counted_for_a_test)(lambda shape, **_: 7 * shape[0])
    with torch_flop_counter(display=False) as counter:
        operator(torch.zeros(3))
    assert counter.get_total_flops() == 21
    del flop_registry[torch.ops.adaptive.counted_for_a_test]
    del _FORMULAS[torch.ops.adaptive.counted_for_a_test]
