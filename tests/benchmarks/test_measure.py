"""How benchmarks measure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

MEASURE = Path(__file__).parents[2] / "benchmarks" / "measure.py"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # It makes the checkout importable for scripts.
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("measure", MEASURE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gradients_of_the_run_before_make_no_peak_smaller(measure: ModuleType) -> None:
    """Cases that share a layer are compared: the first has nothing to free, the next all of it."""
    layer = nn.Linear(256, 256, bias=False)
    rows = torch.randn(8, 256)

    def run() -> None:
        layer.zero_grad()
        layer(rows).sum().backward()

    peaks = [measure.peak_bytes(run) for _ in range(3)]
    assert peaks[0] >= 256 * 256 * 4
    assert peaks[1] == peaks[2] == peaks[0]
