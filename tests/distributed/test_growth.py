"""A grown checkpoint continues as if it had never grown: every ZeRO stage, other ranks, twice."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.checkpoint.files import find_checkpoint, load_model, read_state
from launch.checkpoint.growth import grow_checkpoint
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.loop import Loop
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

LARGER = {"tokens": 24, "ffn_tokens": 40}
LARGEST = {"tokens": 28, "ffn_tokens": 64}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growth")
    for inside in (folder, folder / "two", folder / "source"):
        inside.mkdir(exist_ok=True)
        write_text(inside)
    return folder


def tree(folder: Path, name: str, stage: int = 0, **sections: Any) -> dict[str, Any]:
    """A TokenFormer at a constant learning rate: that the schedule restarts changes nothing."""
    model = {
        "mixture_of_depths": None,
        "norm": "parameter_free",
        "rotary_fraction": 0.25,
        "pattention": {"tokens": 16, "ffn_tokens": 32},
    }
    train = {"warmup_steps": 0, "final_learning_rate": 1.0, "steps": 8}
    zero = {"zero_optimization": {"stage": stage}}
    return tiny_config(
        folder, output=str(folder / name), model=model, train=train, deepspeed=zero, **sections
    )


def continue_one_step(
    source: Path, folder: Path, name: str, stage: int, sizes: dict[str, int] | None = None
) -> State:
    """One step from a checkpoint, parameter tokens beyond the first ones frozen: the old state."""
    plain = tree(folder, name, stage)
    plain["model"]["pattention"] = sizes or plain["model"]["pattention"]
    loop = make_loop(from_mapping(plain), replace(read_state(source), phase_step=0))
    loop.load(source)
    old_rows = dict.fromkeys(("query", "key", "value", "output"), 16) | {"ffn": 32}
    for parameter_name, parameter in loop.engine.named_parameters():
        rows = old_rows.get(parameter_name.split(".")[-2])
        if rows is not None:
            parameter.register_hook(lambda grad, rows=rows: freeze(grad, rows))
    loop.step()
    state = whole_state(loop, old_rows)
    loop.engine.close()
    return state


def freeze(grad: Tensor, rows: int) -> Tensor:
    grad = grad.clone()
    grad[rows:] = 0
    return grad


def whole_state(loop: Loop, old_rows: dict[str, int]) -> State:
    """Weights and moments of the old parameter tokens."""
    state = {}
    for name, parameter in loop.engine.named_parameters():
        rows = old_rows.get(name.split(".")[-2])
        state[name] = loop.engine.full_parameter(parameter)[:rows].cpu().clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = loop.engine.full_moment(parameter, kind)
            assert moment is not None
            moment = moment.view(-1, *state[name].shape[1:])
            state[f"{kind}/{name}"] = moment[:rows].cpu().clone()
    return state


def train_and_save(folder: Path, stages: tuple[int, ...]) -> list[Path]:
    """Two steps at each ZeRO stage; the checkpoints."""
    saved = []
    for stage in stages:
        loop = make_loop(from_mapping(tree(folder, f"small{stage}", stage)))
        for _ in range(2):
            loop.step()
        saved.append(loop.save())
        loop.engine.close()
    return saved


def continue_all(folder: Path, stages: tuple[int, ...], *sources: list[Path]) -> list[list[State]]:
    """Never grown, grown, grown twice, each a step further, at each ZeRO stage."""
    sizes = (None, LARGER, LARGEST)
    return [
        [
            continue_one_step(source[index], folder, f"continued{size}", stage, size)
            for source, size in zip(sources, sizes, strict=False)
        ]
        for index, stage in enumerate(stages)
    ]


def assert_same(grown: State, never: State, of: Any) -> None:
    assert grown.keys() == never.keys()
    for name, tensor in never.items():
        torch.testing.assert_close(
            grown[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{of} {n}: {m}"
        )


def test_a_step_after_growth_equals_never_growing_at_every_zero_stage(folder: Path) -> None:
    stages = (0, 1, 2, 3)
    small = run_ranks(train_and_save, 2, folder, stages, timeout=120)[0]
    once, twice = [], []
    for source, stage in zip(small, stages, strict=True):
        grow_checkpoint(source, folder / f"larger{stage}", **LARGER)
        once.append(find_checkpoint(folder / f"larger{stage}"))
        grow_checkpoint(once[-1], folder / f"largest{stage}", **LARGEST)
        twice.append(find_checkpoint(folder / f"largest{stage}"))
    results = run_ranks(continue_all, 2, folder, stages, small, once, twice, timeout=240)
    for stage, (never, grown, grown_twice) in zip(stages, results[0], strict=True):
        assert_same(grown, never, of=f"ZeRO {stage}, grown once:")
        assert_same(grown_twice, never, of=f"ZeRO {stage}, grown twice:")


def test_two_ranks_grow_into_four(folder: Path) -> None:
    small = run_ranks(train_and_save, 2, folder / "two", (1,), timeout=120)[0]
    grow_checkpoint(small[0], folder / "four", **LARGER)
    grown = find_checkpoint(folder / "four")
    ((never, once),) = run_ranks(continue_all, 4, folder, (1,), small, [grown], timeout=120)[0]
    assert_same(once, never, of="2 -> 4 ranks:")


def run_growing(plain: dict[str, Any]) -> list[str]:
    """A whole run by the program's own loop; the validation losses that it logged."""
    from launch.run.training import run

    run(from_mapping(plain))
    dist.barrier()
    metrics = Path(plain["output"]) / "metrics.jsonl"
    return metrics.read_text(encoding="utf-8").splitlines()


def test_a_run_grows_at_its_steps(folder: Path) -> None:
    plain = tree(folder, "growing", stage=2)
    plain["train"] |= {
        "steps": 4,
        "growth": [{"step": 1, **LARGER}, {"step": 3, "ffn_tokens": 64, "tokens": 28}],
    }
    run_ranks(run_growing, 2, plain, timeout=180)
    model, config = load_model(folder / "growing")
    assert config.model.pattention.tokens == 28
    assert model.layers[0].ffn.num_tokens == 64
    assert float(model.layers[0].ffn.scale) == 32**0.5
    state = read_state(find_checkpoint(folder / "growing"))
    assert (state.step, state.phase, state.phase_step) == (4, 2, 1)
    assert state.optimizer_steps == 4


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return run_ranks(train_and_save, 1, folder / "source", (0,), timeout=120)[0][0]


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_receipt_says_what_happened_and_the_source_stays(source: Path, folder: Path) -> None:
    before = checksums(source.parent.parent)
    receipt = grow_checkpoint(source, folder / "receipt", **LARGER)
    assert checksums(source.parent.parent) == before
    assert receipt.logit_change <= 1e-5
    assert receipt.largest_logit > 0.1
    assert receipt.rows == 4
    # 2 layers, 8 tokens more in each Pattention; keys and values of 32, but 2 of 4 heads have
    # keys and values of their own.
    added = 2 * 8 * (3 * (32 + 32) + 2 * (32 + 16))
    growth = receipt.growth
    assert growth.parameters_after - growth.parameters_before == receipt.fresh == added
    assert receipt.kept == growth.parameters_before
    text = str(receipt)
    assert f"kept for {receipt.kept:,} numbers, zero for {added:,} new ones" in text
    assert "query 16 -> 24" in text
    assert f"launch.start --config {folder / 'receipt'}/run.yaml" in text


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({}, "give a size"),
        ({"tokens": 12}, "tokens=12: must be at least 16"),
        ({"ffn_tokens": 32}, "must add parameter tokens"),
    ],
)
def test_bad_sizes_are_one_line_and_write_nothing(
    sizes: dict[str, int], line: str, source: Path, folder: Path
) -> None:
    with pytest.raises(BadInput, match=line):
        grow_checkpoint(source, folder / "bad", **sizes)
    assert not (folder / "bad").exists()


def test_sizes_must_suit_the_tensor_degree(source: Path, folder: Path, monkeypatch: Any) -> None:
    from launch.checkpoint import growth

    saved = growth.load_saved(source)
    split = replace(saved, parallel=replace(saved.parallel, tensor=2))
    monkeypatch.setattr(growth, "load_saved", lambda _: split)
    with pytest.raises(BadInput, match="tokens=23: must be a multiple of parallel"):
        grow_checkpoint(source, folder / "bad", tokens=23)


def test_outputs_in_use_are_refused(source: Path, folder: Path) -> None:
    run = source.parent.parent
    for output in (run, run / "checkpoints", source):
        with pytest.raises(BadInput, match="must be another folder than the source's"):
            grow_checkpoint(source, output, **LARGER)
    (folder / "file").write_text("")
    with pytest.raises(BadInput, match="is a file, must be a folder"):
        grow_checkpoint(source, folder / "file", **LARGER)
    grow_checkpoint(source, folder / "used", **LARGER)
    with pytest.raises(BadInput, match="already holds checkpoints"):
        grow_checkpoint(source, folder / "used", **LARGER)


def save_dense(folder: Path) -> Path:
    plain = tiny_config(folder, output=str(folder / "dense"))
    return make_loop(from_mapping(plain)).save()


def test_other_architectures_are_named(folder: Path) -> None:
    dense = run_ranks(save_dense, 1, folder, timeout=60)[0]
    with pytest.raises(BadInput, match=r"has no model.pattention, so it cannot grow"):
        grow_checkpoint(dense, folder / "bad", tokens=32)


@pytest.mark.parametrize(
    ("growth", "line"),
    [
        ([{"step": 0, "tokens": 24}], "step=0: must be at least 1"),
        ([{"step": 2}], "step=2: must give a size"),
        ([{"step": 8, "tokens": 24}], "step=8: must be between 1 and 7"),
        ([{"step": 2, "tokens": 24}, {"step": 2, "tokens": 32}], "step=2: must be between 3 and 7"),
        ([{"step": 2, "tokens": 15}], "step=2: tokens=15: must be at least 16"),
        ([{"step": 2, "ffn_tokens": 32}], "step=2: must add parameter tokens"),
        ([{"step": 2, "token": 24}], r"train.growth\[0\].token: unknown key; did you mean tokens"),
    ],
)
def test_bad_schedules_are_one_line(growth: list[dict[str, int]], line: str, folder: Path) -> None:
    plain = tree(folder, "schedule")
    plain["train"]["growth"] = growth
    with pytest.raises(BadInput, match=line):
        from_mapping(plain)


def test_a_schedule_needs_a_tokenformer_and_no_phases(folder: Path) -> None:
    plain = tree(folder, "schedule")
    plain["train"]["growth"] = [{"step": 2, "tokens": 24}]
    with pytest.raises(BadInput, match=r"train\.growth and phases: give one"):
        from_mapping({**plain, "phases": [{"name": "one"}]})
    plain["model"]["pattention"] = None
    with pytest.raises(BadInput, match=r"train\.growth: needs model\.pattention"):
        from_mapping(plain)


def split_losses(folder: Path) -> tuple[Path, float]:
    """Two steps of a model split over tensor ranks, its checkpoint, and the third step's loss."""
    loop = make_loop(from_mapping(tree(folder, "split", stage=1, parallel={"tensor": 2})))
    for _ in range(2):
        loop.step()
    saved = loop.save()
    loss = loop.step().loss
    loop.engine.close()
    return saved, loss


def loss_of_next_step(folder: Path, source: Path) -> float:
    plain = tree(folder, "split larger", stage=1, parallel={"tensor": 2})
    plain["model"]["pattention"] = LARGER
    loop = make_loop(from_mapping(plain), replace(read_state(source), phase_step=0))
    loop.load(source)
    loss = loop.step().loss
    loop.engine.close()
    return loss


def test_a_model_split_over_tensor_ranks_grows(folder: Path) -> None:
    source, loss = run_ranks(split_losses, 2, folder, timeout=120)[0]
    receipt = grow_checkpoint(source, folder / "split grown", **LARGER)
    assert receipt.logit_change <= 1e-5
    grown = find_checkpoint(folder / "split grown")
    assert run_ranks(loss_of_next_step, 2, folder, grown, timeout=120)[0] == pytest.approx(
        loss, abs=1e-5
    )
