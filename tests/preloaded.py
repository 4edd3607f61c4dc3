"""What the ranks of tests import: `tests.ranks` forks them from a process that has it."""

import atexit
import gc
from importlib import import_module

from launch.run.builds import build_no_collectives
from launch.run.config import from_mapping

for name in (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.cpu",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "hypothesis",
    "megatron.core.tensor_parallel",
    "pytest",
    "torch.distributed.nn.functional",
    "adaptive.growth",
    "adaptive.observe.monitor",
    "launch.run.parity",
    "launch.run.training",
    "launch.tasks.diffusion",
    "launch.tasks.hub_language_model",
    "parallel.megatron",
    "tests.distributed.runs",
    "tests.distributed.subjects",
):
    import_module(name)
build_no_collectives()
from_mapping({})  # makes, once, what checks a configuration

# A collection in a rank would write to, and so copy, every page that it shares with this process.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
