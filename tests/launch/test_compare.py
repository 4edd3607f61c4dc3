"""Comparisons spend the same executed operations on every arm, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launch.compare import held_out_loss, load_comparison, main, plan_runs
from launch.errors import BadInput
from tests.distributed.runs import tiny_config, write_text


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    write_text(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    path = tmp_path / "comparison.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "title": "Dense and routed",
                "recipe": "recipe.yaml",
                "operations": 2e9,
                "seeds": [0],
                "arms": {"dense": ["model.mixture_of_depths=null"], "routed": []},
                "points": 3,
                "output": str(tmp_path / "runs"),
                "results": str(tmp_path / "results" / "table"),
            }
        )
    )
    return path


def test_arms_get_equal_executed_operations_and_finished_runs_are_kept(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(comparison), "--jobs", "2"])
    said = capsys.readouterr().out
    assert "dense seed 0" in said
    numbers = json.loads((comparison.parent / "results" / "table.json").read_text())
    dense, routed = numbers["runs"]
    # Steps are whole: a step of the tiny model is about 1% of the budget.
    assert dense["executed_flops"] == pytest.approx(2e9, rel=0.02)
    assert routed["executed_flops"] == pytest.approx(2e9, rel=0.02)
    assert routed["tokens"] > 1.2 * dense["tokens"]
    assert routed["nominal_flops"] > 1.2 * routed["executed_flops"]
    assert dense["validation_loss"] == pytest.approx(dense["curve"][-1][1])
    assert dense["validation_loss_training_choice"] == dense["validation_loss"]
    flops = [point[0] for point in routed["curve"]]
    assert flops == sorted(flops)
    assert flops[-1] == pytest.approx(routed["executed_flops"])
    assert (comparison.parent / "results" / "table.png").stat().st_size > 1000
    assert "| routed |" in (comparison.parent / "results" / "table.md").read_text()

    main([str(comparison)])
    assert "seed 0:" not in capsys.readouterr().out
    assert json.loads((comparison.parent / "results" / "table.json").read_text()) == numbers


def test_a_comparison_that_cannot_run_is_one_line(comparison: Path) -> None:
    with pytest.raises(BadInput, match=r"comparison.operatoins: unknown key; did you mean oper"):
        load_comparison(comparison, ["operatoins=3"])
    broken = load_comparison(comparison, ["arms={dense: [model.dmi=3]}"])
    with pytest.raises(BadInput, match=r"model.dmi: unknown key"):
        plan_runs(broken, comparison.parent)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("points=0", "comparison.points=0: must be at least 1"),
        ("seeds=[]", "comparison.seeds=[]: must hold at least one seed"),
        ("seeds=[1, 2, 1]", "comparison.seeds=[1, 2, 1]: must hold 1 once"),
        ("arms={}", "comparison.arms={}: must name at least one arm"),
        ("arms={a b: [], a_b: []}", "comparison.arms: 'a b': a_b must be the folder of one arm"),
        ("operations=.nan", "comparison.operations=nan: must be a number above 0"),
        ("operations=0", "comparison.operations=0.0: must be a number above 0"),
        ("results=/proc/a/b", "results=/proc/a: /proc cannot be written"),
        ("seeds=", "seeds=: has no value"),
        ("seeds=[", "seeds=[: not valid YAML"),
        ("common=[data.path=]", "data.path=: has no value"),
    ],
)
def test_keys_of_a_comparison_are_checked(
    override: str, line: str, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(comparison), override])
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {line}")
    assert not (comparison.parent / "runs").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"title: [", "not valid YAML"),
        (b"title: \xff", "not valid YAML"),
        (b"", "must be a mapping of keys"),
        (b"[1, 2]", "must be a mapping of keys"),
    ],
)
def test_a_file_that_is_no_comparison_is_one_line(
    content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {path}: {line}")


def test_held_out_loss_counts_every_row_once(tmp_path: Path) -> None:
    import torch

    from launch.config import from_mapping
    from launch.tasks import task_class
    from parallel.mesh import Mesh

    write_text(tmp_path)
    config = from_mapping(tiny_config(tmp_path, data={"validation_rows": 11}))
    task = task_class(config.task)(config, mesh=Mesh.single(), device=torch.device("cpu"))
    model = task.build_model().eval()
    rows = range(task.validation_rows)
    value, count = task.validation_sums(model, task.validation_batch(rows))["loss"]
    assert held_out_loss(model, task) == pytest.approx(value.item() / count, abs=1e-5)
