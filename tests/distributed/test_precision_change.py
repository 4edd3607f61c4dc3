"""A checkpoint continues in another precision; another kind of optimizer is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoint.files import find_checkpoint, read_state, read_whole
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

FLOAT = {"zero_optimization": {"stage": 1}}
HALF = {**FLOAT, "bf16": {"enabled": True}}
MOMENTUM = {"optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}}
TORCH_ADAM = {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    write_text(folder)
    return folder


def tree_of(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    # A momentum is no moment of Adam: nothing can be said about which parameters moved.
    return tiny_config(
        folder, output=str(folder / name), deepspeed=settings, train={"move_within": 0}
    )


def save_then_load(before: dict[str, Any], after: dict[str, Any]) -> Any:
    """Two steps, a checkpoint; what another engine holds after loading it, and its next loss."""
    loop = make_loop(from_mapping(before))
    for _ in range(2):
        loop.step()
    loop.save()
    expected = loop.step().loss
    loop.engine.close()
    checkpoint = find_checkpoint(before["output"])
    loop = make_loop(from_mapping(after), read_state(checkpoint))
    try:
        loop.load(checkpoint)
    except BadInput as error:
        return str(error)
    held = {**loop.engine.full_weights(), **loop.engine.full_moments()}
    return held, loop.step().loss, expected


@pytest.mark.parametrize(
    ("before", "after"),
    [(FLOAT, HALF), (HALF, FLOAT), (FLOAT, {**FLOAT, **TORCH_ADAM})],
    ids=["float32 to bf16", "bf16 to float32", "another Adam"],
)
def test_weights_and_moments_survive_a_change_of_precision(
    before: dict[str, Any], after: dict[str, Any], folder: Path
) -> None:
    name = f"{len(str(before))}-{len(str(after))}"
    first, second = tree_of(folder, name, before), tree_of(folder, name, after)
    held, loss, expected = run_ranks(save_then_load, 2, first, second, timeout=90)[0]
    whole = read_whole(find_checkpoint(first["output"]))
    for name, weight in whole.weights.items():
        assert torch.equal(held[name], weight), name
    for name, moment in whole.exp_avg_sq.items():
        assert moment.any(), name
        assert torch.equal(held[f"exp_avg_sq/{name}"], moment), name
        assert torch.equal(held[f"exp_avg/{name}"], whole.exp_avg[name]), name
    # 8 bits of mantissa in every activation: 2^-8 of a loss of about 5.
    assert loss == pytest.approx(expected, rel=2**-8)


@pytest.mark.parametrize(("before", "after"), [("AdamW", "SGD"), ("SGD", "AdamW")])
def test_moments_of_another_kind_are_refused_in_one_line(
    before: str, after: str, folder: Path
) -> None:
    settings = {"AdamW": FLOAT, "SGD": {**FLOAT, **MOMENTUM}}
    first = tree_of(folder, before, settings[before])
    second = tree_of(folder, before, settings[after])
    message = run_ranks(save_then_load, 1, first, second, timeout=60)[0]
    assert message.startswith(f"deepspeed.optimizer.type={after}: {folder}")
    assert f"is of {before}, and the state of SGD continues only with the same" in message


def test_momentum_at_another_zero_stage_is_refused_in_one_line(folder: Path) -> None:
    first = tree_of(folder, "stage", {**FLOAT, **MOMENTUM})
    second = tree_of(folder, "stage", {**MOMENTUM, "zero_optimization": {"stage": 2}})
    message = run_ranks(save_then_load, 1, first, second, timeout=60)[0]
    assert "the state of SGD continues only with the same optimizer, precision" in message
