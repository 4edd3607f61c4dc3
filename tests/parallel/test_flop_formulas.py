"""torch's FLOP counter knows our operators whenever it was imported or made."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import adaptive.ops  # noqa: F401
from parallel.flop_formulas import flop_formula

ROOT = Path(__file__).parents[2]
OPERATORS = (
    "grouped_rows",
    "grouped_weight_gradient",
    "varlen_attention",
    "varlen_attention_backward",
)
COUNTER_FIRST = "from torch.utils.flop_counter import FlopCounterMode\nimport adaptive.ops"
OURS_FIRST = """
import adaptive.ops  # noqa: F401
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
assert not [f for f in sys.meta_path if type(f).__module__ == "parallel.flop_formulas"]
"""


@pytest.mark.parametrize("imports", [COUNTER_FIRST, OURS_FIRST], ids=["counter", "ours"])
def test_a_counter_made_before_the_first_kernel_counts_it(imports: str) -> None:
    code = f"""
import os, sys
os.environ["TRITON_INTERPRET"], os.environ["ADAPTIVE_BACKEND"] = "1", "triton"
{imports}
counter = FlopCounterMode(display=False)
import torch
from adaptive.ops.grouped_linear import grouped_linear
x, w = torch.randn(5, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
assert "adaptive.ops.kernels" not in sys.modules
with counter:
    grouped_linear(x, w, torch.tensor([4, 1])).sum().backward()
assert "adaptive.ops.kernels" in sys.modules
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(3 * 2 * 5 * 8 * 3)], done.stdout + done.stderr


def test_every_operator_with_products_has_a_formula() -> None:
    for name in OPERATORS:
        assert getattr(torch.ops.adaptive, name) in flop_registry


def test_a_formula_given_after_the_counter_is_there_counts_at_once() -> None:
    @torch.library.custom_op("adaptive::counted_for_a_test", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    flop_formula(torch.ops.adaptive.counted_for_a_test)(lambda shape, **_: 7 * shape[0])
    with FlopCounterMode(display=False) as counter:
        operator(torch.zeros(3))
    assert counter.get_total_flops() == 21
    del flop_registry[torch.ops.adaptive.counted_for_a_test]
