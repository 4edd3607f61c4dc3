"""A checkpoint of one mesh continues on any other: the next losses are the undisturbed run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint.files import read_state, read_whole
from launch.reshard import main as reshard_main
from launch.reshard import verify
from launch.run.config import from_mapping
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

BEFORE, AFTER = 2, 3
EXPERTS = {"num_experts": 4, "ffn_dim": 32}


def _train(tree: dict[str, Any], checkpoint: str | None, steps: int) -> tuple[list[float], str]:
    """Losses of some steps, from a checkpoint or from nothing, and the checkpoint at their end."""
    config = from_mapping(tree)
    state = None if checkpoint is None else read_state(Path(checkpoint))
    loop = make_loop(config, state)
    if checkpoint is not None:
        loop.load(Path(checkpoint))
    losses = [loop.step().loss for _ in range(steps)]
    saved = str(loop.save())
    loop.engine.close()
    return losses, saved


@dataclass
class Origin:
    """A run that was saved half way: the losses that follow, and the checkpoint."""

    losses: list[float]
    checkpoint: str
    folder: Path
    model: dict[str, Any]


def _tree(folder: Path, name: str, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return tiny_config(folder, output=str(folder / name), model=model, **sections)


@pytest.fixture(scope="module", params=["mixture_of_depths", "mixture_of_experts"])
def origin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Saved at tensor 2 x data 2, ZeRO 1, and trained on there."""
    folder = tmp_path_factory.mktemp(request.param)
    write_text(folder)
    model: dict[str, Any] = {}
    if request.param == "mixture_of_experts":
        model = {"mixture_of_depths": None, "mixture_of_experts": EXPERTS}
    sections = {
        "parallel": {"tensor": 2, "sequence_parallel": True},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    first = _tree(folder, "first", model, **sections)
    _, checkpoint = run_ranks(_train, 4, first, None, BEFORE, timeout=120)[0]
    whole = _tree(folder, "whole", model, **sections)
    losses, _ = run_ranks(_train, 4, whole, None, BEFORE + AFTER, timeout=120)[0]
    return Origin(losses[BEFORE:], checkpoint, folder, model)


@pytest.mark.parametrize(
    ("ranks", "parallel", "stage"),
    [(4, {}, 2), (4, {"expert": 4}, 1), (2, {"tensor": 2}, 0), (1, {}, 0), (2, {"context": 2}, 1)],
    ids=str,
)
def test_next_losses_are_those_of_the_undisturbed_run(
    origin: Origin, ranks: int, parallel: dict[str, int], stage: int
) -> None:
    if "expert" in parallel and not origin.model:
        pytest.skip("a model without experts")
    tree = _tree(
        origin.folder,
        f"{ranks}-{parallel}-{stage}",
        origin.model,
        parallel=parallel,
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    losses, _ = run_ranks(_train, ranks, tree, origin.checkpoint, AFTER, timeout=120)[0]
    assert losses == pytest.approx(origin.losses, rel=1e-5)
    assert len(set(losses)) == AFTER


@pytest.mark.slow
def test_reshard_program_verifies_bit_by_bit(
    origin: Origin, capsys: pytest.CaptureFixture[str]
) -> None:
    to = "data=2,expert=2" if origin.model else "tensor=2,sequence_parallel=true"
    output = origin.folder / "resharded"
    reshard_main([origin.checkpoint, "--output", str(output), "--to", to])
    said = capsys.readouterr().out
    assert said.startswith(f"{output}/step-0000000{BEFORE}: ")
    assert said.endswith(f"; all equal after loading on {to}\n")
    written = output / f"step-0000000{BEFORE}"
    tree = _tree(origin.folder, "from resharded", origin.model)
    losses, _ = run_ranks(_train, 1, tree, str(written), AFTER, timeout=120)[0]
    assert losses == pytest.approx(origin.losses, rel=1e-5)
    whole = read_whole(written)
    name = next(name for name, tensor in whole.exp_avg.items() if tensor.any())
    whole.exp_avg[name] = whole.exp_avg[name] + 1e-7
    assert verify(written, whole, {}, 0) == f"exp_avg/{name}"


@pytest.mark.slow
def test_reshard_refuses_in_one_line(origin: Origin, capsys: pytest.CaptureFixture[str]) -> None:
    words = [origin.checkpoint, "--output", str(origin.folder / "refused"), "--to", "tensor=3"]
    with pytest.raises(SystemExit) as ended:
        reshard_main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --to: ")
    assert "must be a multiple of tensor=3" in error
