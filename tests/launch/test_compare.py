"""Comparisons spend the same executed operations on every arm, once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.checkpoint.files import find_checkpoint, load_model, read_state
from launch.checkpoint.models import held_out_loss
from launch.checkpoint.state import RunState
from launch.compare import main
from launch.comparison import runs
from launch.comparison.config import load_comparison
from launch.comparison.isoflop import isoflop_table
from launch.comparison.runs import Run, finish, known_runs, plan_runs, runs_at_optimum
from launch.run.children import Children
from launch.run.config import save_resolved
from launch.run.errors import BadInput
from launch.tasks.registry import task_class
from parallel.mesh import Mesh
from tests.distributed.runs import tiny_config, write_text, write_untrained

ROOT = Path(__file__).parents[2]


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

    # On another machine only the numbers are left: what changed is trained, the rest taken.
    results = comparison.parent / "results" / "table.json"
    elsewhere = [
        f"output={comparison.parent / 'elsewhere'}",
        "arms={dense: [model.mixture_of_depths=null], routed: [model.dim=8, model.num_heads=2]}",
    ]
    main([str(comparison), "--known", str(results), *elsewhere])
    said = capsys.readouterr().out
    assert "routed seed 0:" in said
    assert "dense seed 0:" not in said
    assert json.loads(results.read_text())["runs"][0] == dense


SIZES = {f"{dim}": [f"model.dim={dim}", "model.num_heads=2"] for dim in (8, 16, 24, 32)}
SWEEP = ["operations=[5e7, 1e8]", f"sizes={json.dumps(SIZES)}", "optimum_seeds=[7]", "points=1"]


def test_a_sweep_repeats_the_best_size_of_every_arm_and_its_neighbours(comparison: Path) -> None:
    sweep = load_comparison(comparison, SWEEP)
    planned = plan_runs(sweep, comparison.parent)
    assert len({run.folder for run in planned}) == len(planned) == 2 * 2 * len(SIZES)
    steps = {(run.arm, run.size, run.operations): run.config.train.steps for run in planned}
    assert steps["dense", "8", 1e8] > steps["dense", "16", 1e8] > steps["dense", "16", 5e7]
    best = {("dense", 5e7): "8", ("dense", 1e8): "16", ("routed", 5e7): "24", ("routed", 1e8): "32"}

    def outcome(run: Run) -> dict[str, Any]:
        at_best = best[run.arm, run.operations] == run.size
        loss = math.nan if run.size == "8" and not at_best else 2.0 - at_best - run.seed / 10
        numbers = {"validation_loss": loss, "validation_loss_training_choice": loss, "seconds": 1.0}
        numbers |= {"parameters": int(run.size), "steps": 3, "tokens": 30}
        labels = {"arm": run.arm, "size": run.size, "operations": run.operations, "seed": run.seed}
        return labels | numbers

    outcomes = [outcome(run) for run in planned]
    again = runs_at_optimum(sweep, comparison.parent, outcomes)
    chosen: dict[tuple[str, float], list[str]] = {}
    for run in again:
        assert run.seed == 7
        chosen.setdefault((run.arm, run.operations), []).append(run.size)
    assert chosen == {
        ("dense", 5e7): ["8", "16"],
        ("dense", 1e8): ["8", "16", "24"],
        ("routed", 5e7): ["16", "24", "32"],
        ("routed", 1e8): ["24", "32"],
    }
    rows = isoflop_table(sweep, outcomes + [outcome(run) for run in again]).splitlines()
    for (arm, operations), size in best.items():
        (row,) = [
            r for r in rows if r.startswith(f"| {operations:.3g} | {arm} | {size} | {size} |")
        ]
        # The mean of 1.0 and 0.3.
        assert "| 0.650 ± 0.495 |" in row


@pytest.mark.slow  # eight runs
def test_a_sweep_writes_its_curves(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = [*SWEEP, "operations=5e7", f"sizes={json.dumps({k: SIZES[k] for k in ('8', '16')})}"]
    main([str(comparison), "--jobs", "2", *sweep])
    results = comparison.parent / "results"
    runs = json.loads((results / "table.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0] * 4 + [7] * 4
    assert (results / "table.png").stat().st_size > 1000
    capsys.readouterr()
    main([str(comparison), *sweep])
    assert " seed " not in capsys.readouterr().out


def one_arm(comparison: Path, *overrides: str) -> Run:
    changed = load_comparison(
        comparison, ["arms={dense: [checkpoint.keep=1, model.mixture_of_depths=null]}", *overrides]
    )
    return plan_runs(changed, comparison.parent)[0]


def test_a_changed_arm_is_measured_alone(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = one_arm(comparison, "operations=4e8")
    short = one_arm(comparison, "operations=2e8")
    first, second = (
        finish(long, threads=1, children=Children()),
        finish(short, threads=1, children=Children()),
    )
    assert first is not None
    assert second is not None
    assert second["steps"] == short.config.train.steps < first["steps"]
    assert second["executed_flops"] == pytest.approx(second["curve"][-1][0])
    model, _ = load_model(short.folder)
    task = task_class(short.config.task)(
        short.config, mesh=Mesh.single(), device=torch.device("cpu")
    )
    # Under the arm's own key: its weights and its curve are of one run.
    assert held_out_loss(model, task) == pytest.approx(second["validation_loss"], abs=1e-5)
    earlier = short.folder.with_name(f"{short.folder.name}-earlier-1")
    assert read_state(find_checkpoint(earlier)).step == first["steps"]
    assert f"is now {earlier}" in capsys.readouterr().out
    # Another model, too, is no checkpoint that the plan would have to refuse.
    assert one_arm(comparison, "operations=2e8", "common=[model.ffn_dim=64]").overrides


def test_a_run_that_hangs_is_named_and_ended(
    comparison: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = one_arm(comparison, "operations=2e8", "common=[train.hang_seconds=1.0]")
    program = comparison.parent / "hanging.py"
    program.write_text(
        f"import pathlib, sys, time; sys.path[0] = {str(ROOT)!r}\n"
        "from launch.run.marks import Marks\n"
        f"marks = Marks(); marks.open(pathlib.Path({str(run.folder)!r}), 0)\n"
        "marks('forward', step=3); time.sleep(60)"
    )
    monkeypatch.setattr(runs, "TRAIN", program)
    assert finish(run, threads=1, children=Children()) is None
    said = capsys.readouterr().err
    assert "no rank has made progress for train.hang_seconds=1: hanging: rank 0" in said
    assert "rank 0: step 3, forward" in said


def test_an_interrupted_run_goes_on_only_with_the_same_configuration(
    comparison: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = one_arm(comparison, "operations=2e8", "common=[checkpoint.every=1]")
    steps = run.config.train.steps
    starts = []

    def interrupted(_: Children, command: list[str], **options: Any) -> int:
        """What a run leaves that was asked to stop after its first step."""
        starts.append(read_steps(run.folder))
        reached = 1 if len(starts) < 3 else steps
        write_state(run, reached)
        return 0

    monkeypatch.setattr("launch.comparison.runs.Children.run", interrupted)
    monkeypatch.setattr("launch.comparison.runs.measure", lambda _: {"steps": steps})
    assert finish(run, threads=1, children=Children()) is None
    changed = one_arm(
        comparison, "operations=2e8", "common=[checkpoint.every=1, train.learning_rate=1e-4]"
    )
    run = changed  # of which `interrupted` leaves checkpoints from now on
    assert finish(changed, threads=1, children=Children()) is None
    assert f"is at step 1, {steps} are planned" in capsys.readouterr().out
    assert finish(changed, threads=1, children=Children()) is not None
    # The other learning rate began in an empty folder, the same one continued.
    assert starts == [0, 0, 1]
    assert len(json.loads((changed.folder / "seconds.json").read_text())) == 2


def test_a_result_that_could_not_be_written_whole_is_measured_again(
    comparison: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = one_arm(comparison, "operations=2e8")
    steps = run.config.train.steps

    def trained(_: Children, command: list[str], **options: Any) -> int:
        write_state(run, steps)
        return 0

    def full(path: Path, text: str, **options: Any) -> int:
        """A disk on which half of a result fits."""
        if "result.json" not in path.name:
            return whole(path, text, **options)
        whole(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launch.comparison.runs.Children.run", trained)
    monkeypatch.setattr("launch.comparison.runs.measure", lambda _: {"steps": steps})
    whole = Path.write_text
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            finish(run, threads=1, children=Children())
    for damage in ("", "[", "[" * 100_000, "[1]"):
        run.result.write_text(damage)
        (run.folder / "seconds.json").write_text(damage)
        outcome = finish(run, threads=1, children=Children())
        assert outcome is not None
        assert outcome["steps"] == steps


def read_steps(folder: Path) -> int:
    found = sorted((folder / "checkpoints").glob("step-*"))
    return read_state(found[-1]).step if found else 0


def write_state(run: Run, step: int) -> None:
    write_untrained(run.config, RunState(step=step))
    save_resolved(run.config, run.folder / "run.yaml")


def test_a_comparison_that_cannot_run_is_one_line(comparison: Path) -> None:
    with pytest.raises(BadInput, match=r"comparison.operatoins: unknown key; did you mean oper"):
        load_comparison(comparison, ["operatoins=3"])
    broken = load_comparison(comparison, ["arms={dense: [model.dmi=3]}"])
    with pytest.raises(BadInput, match=r"model.dmi: unknown key"):
        plan_runs(broken, comparison.parent)
    with pytest.raises(BadInput, match=r"known=/no/where: No such file or directory"):
        known_runs(Path("/no/where"))
    (comparison.parent / "other.json").write_text("{}")
    with pytest.raises(BadInput, match=r"must be the .json of a comparison's results"):
        known_runs(comparison.parent / "other.json")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("points=0", "comparison.points=0: must be at least 1"),
        ("seeds=[]", "comparison.seeds=[]: must hold at least one seed"),
        ("seeds=[1, 2, 1]", "comparison.seeds=[1, 2, 1]: must hold 1 once"),
        ("arms={}", "comparison.arms={}: must name at least one arm"),
        ("arms={a: [], ../a: []}", "comparison.arms: '../a': must name a folder: no / in it"),
        ("arms={a b: [], a_b: []}", "comparison.arms: 'a b': a_b must be the folder of one arm"),
        ("optimum_seeds=[3]", "comparison.optimum_seeds=[3]: needs sizes"),
        ("operations=[1e12, 0]", "comparison.operations=[1000000000000.0, 0.0]: must be a number"),
        ("operations=.nan", "comparison.operations=nan: must be a finite number"),
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
    from launch.run.config import from_mapping

    write_text(tmp_path)
    config = from_mapping(tiny_config(tmp_path, data={"validation_rows": 11}))
    task = task_class(config.task)(config, mesh=Mesh.single(), device=torch.device("cpu"))
    model = task.build_model().eval()
    rows = range(task.validation_rows)
    value, count = task.validation_sums(model, task.validation_batch(rows))["loss"]
    assert held_out_loss(model, task) == pytest.approx(value.item() / count, abs=1e-5)
