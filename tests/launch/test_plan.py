"""The planner against what real ranks hold, keep and send."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from launch.plan import main
from launch.planning.machines import PUBLISHED, with_given
from launch.planning.plans import activation_numbers, plan
from launch.run.config import from_mapping
from launch.run.sections import RunConfig
from parallel.checks.traffic import Traffic
from parallel.mesh import Mesh
from tests.ranks import run_ranks

ROWS, SEQ_LEN = 4, 128
H100 = PUBLISHED["h100"].machine(mixed=False)
MODEL = DecoderConfig(
    vocab_size=256,
    dim=64,
    num_layers=4,
    num_heads=4,
    ffn_dim=192,
    mixture_of_depths=MixtureOfDepthsConfig(capacity=0.125, predictor="none"),
)


def run_config(**model: object) -> RunConfig:
    plain = {"vocab_size": 256, "dim": 64, "num_layers": 4, "num_heads": 4, "ffn_dim": 192}
    routed = {"mixture_of_depths": {"capacity": 0.125, "predictor": "none"}}
    return from_mapping(
        {
            "model": {**plain, **routed, **model},
            "data": {"seq_len": SEQ_LEN},
            "train": {"batch_size": ROWS},
        }
    )


def _real(degrees: dict[str, Any], model: DecoderConfig) -> tuple[int, int, int]:
    """Weights held, numbers kept and bytes sent by this rank."""
    mesh = Mesh.create(**degrees)
    torch.manual_seed(0)
    decoder = Decoder(model, mesh=mesh)
    held = sum(p.numel() for p in decoder.parameters())
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    ids = torch.randint(0, 256, (ROWS // mesh.data, SEQ_LEN))
    with Traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = decoder.token_losses(ids, ids).mean()
        numbers = sum(kept.values())
        loss.backward()
    return held, numbers, traffic.sent


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"context": 2},
        {"context": 2, "context_attention": "ring"},
        {"tensor": 2, "context": 2, "sequence_parallel": True},
    ],
    ids=str,
)
def test_plan_is_what_real_ranks_hold_keep_and_send(degrees: dict[str, Any]) -> None:
    mesh = Mesh(**degrees)
    by_rank = run_ranks(_real, mesh.world, degrees, MODEL)
    planned = plan(run_config(), mesh, H100, mixed=False)
    held = by_rank[0][0]
    # Weight, gradient and two moments of 4 bytes each: ZeRO 0, everything fits.
    assert planned.zero_stage == 0
    assert planned.state == held * 16
    kept = sum(numbers for _, numbers, _ in by_rank) / mesh.world
    # Rotary tables, log-sum-exps and masks are left out.
    assert activation_numbers(MODEL, mesh, ROWS * SEQ_LEN) == pytest.approx(kept, rel=0.2)
    sent = sum(count for _, _, count in by_rank) / mesh.world
    inside = sum(count for axis, count in planned.sent.items() if axis != "data")
    # The cross-entropy's three numbers a token are left out.
    assert inside == pytest.approx(sent, rel=0.05)


def test_heads_of_another_width_keep_as_much_as_they_are_wide() -> None:
    wide = replace(MODEL, head_dim=64, mixture_of_depths=None)
    ((_, kept, _),) = run_ranks(_real, 1, {}, wide)
    planned = activation_numbers(wide, Mesh.single(), ROWS * SEQ_LEN)
    # Rotary tables, log-sum-exps and masks are left out.
    assert planned == pytest.approx(kept, rel=0.2)


def test_zero_stage_is_the_lowest_that_fits() -> None:
    mesh = Mesh(data=4)
    whole = plan(run_config(), mesh, H100, mixed=False)
    stages = []
    # Of 16 bytes a weight, 4 ranks save 6 of the optimizer's 8, 3 of the gradient, 3 of itself.
    for spared in (0.0, 0.3, 0.5, 0.7):
        limit = (whole.state * (1 - spared) + whole.activations) / 1e9
        small = with_given(H100, memory=limit)
        stages.append(plan(run_config(), mesh, small, mixed=False).zero_stage)
    assert stages == [0, 1, 2, 3]


def test_recomputation_keeps_less() -> None:
    mesh = Mesh.single()
    plain = activation_numbers(MODEL, mesh, 100)
    assert activation_numbers(replace(MODEL, recompute=True), mesh, 100) < plain / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "6", "--meshes", "tensor=4"], "tensor=4: must divide the 6 ranks"),
        (["--gpus", "3", "--meshes", "tensor=3"], "vocab_size=256: must be a multiple of tensor=3"),
        (
            ["train.batch_size=8", "train.micro_batch_size=3", "--gpus", "2"],
            "train.micro_batch_size=3: must divide 4, the rows of train.batch_size=8",
        ),
        # Keys may stand on both sides of an option.
        (["--gpus", "2", "train.batch_size=0"], "train.batch_size=0: must be at least 1"),
        (["--gpus", "2", "--machine", "b9"], "--machine=b9: must be one of this, a100, h100, h200"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "recipes/mod_lm.yaml", "model.num_kv_heads=2", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_table_names_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "recipes/mod_lm.yaml", "--gpus", "4", "--memory", "0.01"])
    source, *lines = capsys.readouterr().out.strip().splitlines()
    assert "published peaks" in source
    assert "not measured" in source
    assert lines[0].split()[:3] == ["mesh", "ZeRO", "micro"]
    assert any("does not fit in 0.01 GB" in line for line in lines)
