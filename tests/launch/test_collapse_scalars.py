"""Evaluations of a mixture of experts write how far its representations have collapsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from launch.run.config import from_mapping
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks


class Log:
    """Keeps what a run's log would be given."""

    def __init__(self) -> None:
        self.written: dict[str, list[float]] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.written.setdefault(name, []).append(value)

    def image(self, *_: Any) -> None: ...

    def text(self, *_: Any) -> None: ...


def reported(tree: dict[str, Any]) -> dict[str, list[float]]:
    loop = make_loop(from_mapping(tree))
    log: Any = Log()
    loop.task.report(loop.engine, 0, log)
    loop.task.report(loop.engine, 1, log)
    with torch.no_grad():
        for name, parameter in loop.engine.named_parameters():
            if "router" in name:
                parameter.copy_(torch.randn_like(parameter))
    loop.task.report(loop.engine, 2, log)
    return dict(log.written)


def test_collapse_and_fluctuation_are_written_at_evaluations(tmp_path: Path) -> None:
    write_text(tmp_path)
    experts = {"num_experts": 4, "ffn_dim": 16, "router": "hyperspherical", "schedule": 2}
    model = {"mixture_of_depths": None, "mixture_of_experts": experts}
    scalars = run_ranks(reported, 1, tiny_config(tmp_path, model=model))[0]
    layer = "layers.1.ffn"
    assert len(scalars[f"collapse/{layer}/rc"]) == 3
    assert len(scalars[f"collapse/{layer}/cosine_spread"]) == 3
    same, other = scalars[f"collapse/{layer}/fluctuation"]
    assert same == 0
    assert 0 < other <= 1


def trained(tree: dict[str, Any]) -> list[str]:
    """The scalars of reports before and after the predictors chose other tokens."""
    loop = make_loop(from_mapping(tree))
    log: Any = Log()
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in loop.engine.named_parameters():
                if "predictor" in name:
                    # About half of the tokens, whichever they are.
                    parameter.zero_() if name.endswith("bias") else parameter.normal_()
        loop.task.report(loop.engine, 0, log)
    return list(log.written)


def test_staged_experts_are_reported_whichever_tokens_reach_them(tmp_path: Path) -> None:
    write_text(tmp_path)
    model = {
        "mixture_of_depths": {"capacity": 0.25, "schedule": "all"},
        "mixture_of_experts": {"num_experts": 4, "ffn_dim": 16},
    }
    scalars = run_ranks(trained, 1, tiny_config(tmp_path, model=model))[0]
    assert "collapse/layers.1.block.ffn/rc" in scalars
    assert not [name for name in scalars if "fluctuation" in name]
