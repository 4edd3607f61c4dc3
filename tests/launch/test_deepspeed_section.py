"""What DeepSpeed accepts is accepted; tests/launch/test_bad_input.py has what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.run.config import from_mapping
from launch.run.deepspeed_section import check_deepspeed
from launch.run.engine import engine_settings, fit_zero
from parallel.mesh import Mesh

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_accepted(path: Path) -> None:
    check_deepspeed(json.loads(path.read_text()))


# Of https://www.deepspeed.ai/docs/config-json/, but for what DeepSpeed itself has removed since.
DOCUMENTED: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1000}},
    "communication_data_type": "fp32",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 3,
        "allgather_bucket_size": 5e8,
        "reduce_bucket_size": "auto",
        "offload_param": {"device": "nvme", "nvme_path": "/local", "buffer_count": 5},
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.3},
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
        "zero_hpz_partition_size": 1,
    },
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "dump_state": False,
    "autotuning": {"enabled": False},
    "flops_profiler": {"enabled": False, "profile_step": 1, "detailed": True},
    "activation_checkpointing": {"partition_activations": False, "profile": False},
    "aio": {"block_size": 1048576, "queue_depth": 8},
    "tensorboard": {"enabled": False, "output_path": "logs/"},
    "wandb": {"enabled": False, "group": "mine"},
    "comet": {"enabled": False},
    "csv_monitor": {"enabled": False, "output_path": "logs/"},
    "comms_logger": {"enabled": False, "prof_all": True},
    "checkpoint": {"tag_validation": "Warn", "load_universal": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "data_efficiency": {"enabled": False, "seed": 1234},
    "compile": {"deepcompile": False},
    "timers": {"throughput": {"enabled": True}},
    "dataloader_drop_last": False,
    "memory_breakdown": False,
    "seq_parallel_communication_data_type": "fp32",
    "torch_autocast": {"enabled": False},
    "hybrid_engine": {"enabled": False},
    "data_parallel_size": 2,
    "sequence_parallel_size": 1,
}


@pytest.mark.parametrize("key", DOCUMENTED)
def test_every_documented_key_is_accepted(key: str) -> None:
    check_deepspeed({key: DOCUMENTED[key]})


def test_all_documented_keys_are_accepted_together_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = json.dumps(DOCUMENTED)
    check_deepspeed(DOCUMENTED)
    out, err = capfd.readouterr()
    assert out + err == ""
    assert json.dumps(DOCUMENTED) == before
    assert logging.getLogger("DeepSpeed").isEnabledFor(logging.CRITICAL)


@pytest.mark.parametrize("name", ["adamw", "AdamW", "LAMB", "SGD", "NAdam"])
def test_optimizers_of_deepspeed_and_torch_are_accepted(name: str) -> None:
    check_deepspeed({"optimizer": {"type": name}})


def test_what_only_other_keys_make_valid_is_accepted() -> None:
    half = {"enabled": True, "bf16_master_weights_and_grads": True}
    check_deepspeed({"bf16": half, "zero_optimization": {"stage": 2}})


def test_zero_is_given_what_suits_the_model_where_it_is_not_said() -> None:
    cpu, alone = torch.device("cpu"), Mesh.single()
    with torch.device("meta"):
        large = nn.Linear(4000, 4000)
    for given, model, mesh, expected in (
        ({"stage": 1}, nn.Linear(3, 4), alone, {"reduce_bucket_size": 16, "reduce_scatter": False}),
        ({"stage": 2}, large, alone, {"reduce_bucket_size": 7_500_000, "reduce_scatter": False}),
        ({"stage": 3}, nn.Linear(3, 4), alone, {"reduce_bucket_size": 16}),
        ({"stage": 1}, nn.Linear(3, 4), Mesh(data=2, expert=2), {"reduce_bucket_size": 16}),
        ({"stage": 1, "reduce_bucket_size": 7, "reduce_scatter": True}, large, alone, {}),
    ):
        zero: dict[str, object] = dict(given)
        fit_zero(zero, model, mesh, cpu)
        assert zero == {**given, **expected}
    # What a run's configuration says is not changed by the engine.
    said = {"zero_optimization": {"stage": 1}}
    config = from_mapping({"deepspeed": said})
    engine_settings(config, 1)["zero_optimization"]["stage"] = 2
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}
