"""`python -m launch.compare_routing`: the measures of real checkpoints, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoint.files import write_whole
from launch.checkpoint.state import RunState, WholeState
from launch.compare_routing import main
from launch.comparison.routing import compare, table
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.tasks.registry import task_class
from parallel.checkpoint import save_atomically
from parallel.mesh import Mesh
from tests.distributed.runs import tiny_config, write_text

EXPERTS = {"num_experts": 4, "ffn_dim": 16, "router": "hyperspherical", "top_k": 1}


def checkpoint(config: RunConfig, step: int, seed: int) -> Path:
    """A checkpoint as a run writes it, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    cpu = torch.device("cpu")
    model = task_class(config.task)(config, mesh=Mesh.single(), device=cpu).build_model()
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if "predictor" in name:
            # About half of the tokens, whichever they are.
            tensor.zero_() if name.endswith("bias") else tensor.normal_()
    whole = WholeState(weights, {}, {}, RunState(step=step), config)
    return save_atomically(
        Path(config.output) / "checkpoints", step, lambda folder: write_whole(folder, whole)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def run_config(
    folder: Path, name: str, *, data: dict[str, Any] | None = None, **model: Any
) -> RunConfig:
    model = {
        "mixture_of_depths": None,
        "tie_embeddings": False,
        "mixture_of_experts": EXPERTS,
        **model,
    }
    tree = tiny_config(folder, model=model, data=data or {}, output=str(folder / name))
    return from_mapping(tree)


def test_two_runs_are_compared_on_the_same_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seeds in (("a", (0, 0)), ("b", (0, 1))):
        for step, seed in enumerate(seeds):
            checkpoint(run_config(folder, name), step, seed)
    out = folder / "numbers.json"
    main([str(folder / "a"), str(folder / "b"), "--rows", "4", "--json", str(out)])
    numbers = json.loads(out.read_text())
    first, second = numbers["runs"]
    # Run a did not change between its checkpoints; run b ended with other weights.
    assert first["fluctuation"] == 0
    assert 0 < second["fluctuation"] <= 1
    assert first["loss"] != second["loss"]
    assert first["rc"] > 0
    assert 0 < first["cosine_spread"] < 1
    assert -1 <= numbers["consistency"] < 1
    text = capsys.readouterr().out
    assert f"| {folder / 'a'} | 1 |" in text
    assert "inter-run consistency" in text


def test_runs_that_learnt_from_other_text_are_compared_on_that_of_the_first(folder: Path) -> None:
    other = folder / "other.txt"
    other.write_text("".join(f"line {n} of another text\n" for n in range(2000)))
    checkpoint(run_config(folder, "a"), 0, 0)
    data = {"path": str(other), "validation_fraction": 0.1, "validation_rows": 2}
    checkpoint(run_config(folder, "b", data=data), 0, 0)
    rows, consistency = compare([str(folder / "a"), str(folder / "b")], rows=4)
    # Of the same weights everything must agree.
    assert rows[1].loss == rows[0].loss
    assert rows[1].rc == rows[0].rc
    assert consistency == pytest.approx(1)


def test_experts_behind_a_depth_router_are_compared_without_fluctuation(folder: Path) -> None:
    depth = {"capacity": 0.25, "schedule": "all"}
    for step in range(2):
        checkpoint(run_config(folder, "staged", mixture_of_depths=depth), step, step)
    ((row,), _) = compare([str(folder / "staged")], rows=3)
    assert row.rc > 0
    assert row.fluctuation != row.fluctuation  # other tokens at each checkpoint


def test_equal_runs_agree_entirely(folder: Path) -> None:
    for name in ("a", "b"):
        checkpoint(run_config(folder, name), 0, 0)
    rows, consistency = compare([str(folder / "a"), str(folder / "b")], rows=3)
    assert consistency == pytest.approx(1)
    assert rows[0].loss == rows[1].loss
    assert rows[0].fluctuation != rows[0].fluctuation  # one checkpoint: nothing to compare with


def test_runs_of_one_checkpoint_have_a_table_too(folder: Path) -> None:
    for name in ("a", "b"):
        checkpoint(run_config(folder, name), 0, 0)
    rows, consistency = compare([str(folder / "a"), str(folder / "b")], rows=2)
    assert "| nan ± nan |" in table(rows, consistency)


def test_a_model_without_experts_is_one_clear_line(folder: Path) -> None:
    checkpoint(run_config(folder, "dense", mixture_of_experts=None), 0, 0)
    with pytest.raises(BadInput, match="this model has no experts"):
        compare([str(folder / "dense")], rows=2)


def test_runs_with_other_numbers_of_experts_are_one_clear_line(folder: Path) -> None:
    checkpoint(run_config(folder, "a"), 0, 0)
    checkpoint(run_config(folder, "b", mixture_of_experts={**EXPERTS, "num_experts": 8}), 0, 0)
    with pytest.raises(BadInput, match=r"b: has \[layers, experts\] \[2, 8\], .*a has \[2, 4\]"):
        compare([str(folder / "a"), str(folder / "b")], rows=2)


def test_bad_rows_exit_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(folder), "--rows", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.strip() == "error: --rows=0: must be at least 1"
