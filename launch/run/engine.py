"""Engine: a DeepSpeed engine around a task's model, and what programs ask of one.

Nothing else in this project talks to DeepSpeed's engine. Names of parameters are the model's own,
at every ZeRO stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.observe.regions import region
from launch.checkpoint.engine_files import only_data, problem_with_shard
from launch.checkpoint.files import OPTIMIZER, save_tensors
from launch.checkpoint.shards import MOMENTS, TAG, link_moments, set_whole, write_errors_last
from launch.checkpoint.state import WholeState
from launch.run.compiled import compile_for
from launch.run.errors import BadInput
from launch.run.experts import count_every_expert_once, declare_experts, expert_groups
from launch.run.finite import gradient_is_finite, without_step
from launch.run.gradient_groups import gradient_norms
from launch.run.log import without_monitors
from launch.run.optimizer import audit_groups, parameter_groups
from launch.run.sections import RunConfig
from launch.tasks import Batch, Task
from parallel.gradients import part, whole
from parallel.mesh import Mesh


class Objective(nn.Module):
    """Model and task as the one module that a training engine runs: batch -> sum of the loss.

    Engines hook `forward` of their root module (ZeRO 3 gathers weights there), so every forward
    of a run, training or evaluation, comes through here. Parameters are named `model.…`.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(
        self, batch: Batch, *, function: Callable[[nn.Module, Batch], Any] | None = None
    ) -> Any:
        """`function(model, batch)`, by default the task's loss."""
        call = self._task.loss_sum if function is None else function
        return call(self.model, batch)


class Engine:
    """The model of a task, sharded and stepped by DeepSpeed.

    Args:
        config: of this phase.
        task: makes the model.
        mesh: how the ranks share it.
        device: where it goes.

    Attributes:
        model: the task's model itself (under ZeRO 3 its parameters are empty outside forwards).
        audit: the line of the optimizer audit.
        accumulation: micro-batches of one step.
        micro_batch: rows of one micro-batch on one rank.
        replicas: what the engine divides summed gradients by.
    """

    def __init__(self, config: RunConfig, task: Task, *, mesh: Mesh, device: torch.device) -> None:
        import deepspeed

        self.config, self.mesh, self.device, self._task = config, mesh, device, task
        self.micro_batch, self.accumulation = batch_split(config, mesh.data)
        self.replicas = mesh.replicas * self.accumulation
        torch.manual_seed(config.train.seed)
        objective = Objective(task.build_model(), task).to(device)
        groups = parameter_groups(objective.model, config.train)
        self.audit = audit_groups(objective.model, groups)
        settings = engine_settings(config, mesh.data, replicas=mesh.replicas)
        stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        compile_for(config, objective.model)
        if stage:
            fit_zero(settings["zero_optimization"], objective, mesh, device)
        declare_experts(objective, mesh, zero_stage=stage)
        groups = expert_groups(groups)
        optimizer = None
        if "optimizer" not in settings:
            train = config.train
            optimizer = torch.optim.AdamW(
                groups, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.eps
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            model_parameters=None if optimizer is not None else groups,
            config=settings,
            mpu=mesh.mpu,
            dist_init_required=False,
        )
        # Whoever made the optimizer, and before a checkpoint brings another run's.
        self._group_settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._engine.optimizer.param_groups
        ]
        self._linked = self._saves_data = False
        self._gradient_norm: float | None = None
        self._watch_gradient_norm()

    @property
    def model(self) -> nn.Module:
        return self._engine.module.model

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    @property
    def gradient_norm(self) -> float | None:
        """Global norm before clipping, of the last step."""
        norm = self._engine.get_global_grad_norm() if self.zero_stage else self._gradient_norm
        return None if norm is None else float(norm)

    def gradient_norms(self) -> dict[str, float]:
        """Norms before clipping by part of the model, between a batch's last backward and step.

        Collective: one all-reduce.
        """
        return gradient_norms(self.named_parameters(), self.mesh, self._engine.optimizer)

    def forward(
        self, batch: Batch, function: Callable[[nn.Module, Batch], Any] | None = None
    ) -> Any:
        """`function(model, batch)`, by default the task's loss; moves the batch to the device."""
        with region("forward"):
            moved = self._task.on_device(batch, self.device)
            return self._engine(moved, function=function)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, which the engine averages over replicas."""
        with region("backward"):
            self._engine.backward(loss)

    def gradient_is_finite(self) -> bool:
        """Asked between a batch's last backward and step: the same on every rank. Collective.

        In fp16 it always is: DeepSpeed lowers the scale of a loss whose gradient overflows, and
        leaves out the step.
        """
        if self._engine.fp16_enabled():
            return True
        return gradient_is_finite(self.named_parameters(), self._engine.optimizer, self.device)

    def step(self, learning_rate: float, *, leave_out: bool = False) -> None:
        """To be called after every backward; takes an optimizer step after the last of a batch.

        Args:
            learning_rate: of that step.
            leave_out: drop the gradient instead: weights and moments stay.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        with region("step"), without_step(self._engine.optimizer) if leave_out else nullcontext():
            self._engine.step()
        # Not after the first step: fp16 skips steps that overflow, and leaves no moments then.
        if not self._linked and self.keeps_moments:
            link_moments(self._engine)
            self._linked = True

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter once (tied ones under their first name)."""
        return self.model.named_parameters()

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """float32, whole, detached, whatever the ZeRO stage. Collective over data ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        return whole((parameter if full is None else full).detach().float(), parameter, self.mesh)

    def full_moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        """`exp_avg` or `exp_avg_sq`, whole; None before there was a step. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            moment = safe_get_full_optimizer_state(parameter, key)
        else:
            moment = self._engine.optimizer.state.get(parameter, {}).get(key)
        return None if moment is None else whole(moment, parameter, self.mesh)

    @property
    def stepped(self) -> bool:
        """Whether the last `step` took one: fp16 skips what overflows."""
        return bool(self._engine.was_step_applied())

    @property
    def keeps_moments(self) -> bool:
        """Whether the optimizer has Adam's moments of all that it has stepped: one like Adam."""
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        states = [state for state in inner.state.values() if state]
        return bool(states) and all("exp_avg" in state for state in states)

    def full_moments(self) -> dict[str, Tensor]:
        """`exp_avg/NAME` and `exp_avg_sq/NAME`, whole; zeros before the first step. Collective.

        Rank 0 gets them, on the CPU; the other ranks an empty dictionary.
        """
        moments = {}
        for kind in MOMENTS:
            for name, parameter in self.named_parameters():
                if not parameter.requires_grad:
                    continue
                moment = self.full_moment(parameter, kind)
                if moment is None:
                    moment = torch.zeros_like(self.full_parameter(parameter))
                if torch.distributed.get_rank() == 0:
                    moments[f"{kind}/{name}"] = moment.float().cpu().clone()
        return moments

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer of the model, float32 on the CPU. Collective.

        Rank 0 gets them; the other ranks an empty dictionary.
        """
        mine = torch.distributed.get_rank() == 0
        weights = {}
        for name, parameter in self.named_parameters():
            full = self.full_parameter(parameter)
            if mine:
                weights[name] = full.cpu().clone()
        if mine:
            parameters = {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
            for name, tensor in self.model.state_dict().items():
                if name not in parameters:
                    weights[name] = tensor.detach().cpu().clone()
        return weights

    def save(self, folder: Path) -> None:
        """Write the sharded weights and optimizer state of every rank. Collective.

        Where the model is split, the moments are written whole, beside the whole weights that
        every checkpoint has: DeepSpeed would keep the experts of one rank alone, and its universal
        format wants to be told how each parameter was sliced.
        """
        if self.mesh.expert > 1 or self.mesh.tensor > 1:
            moments = self.full_moments()
            if torch.distributed.get_rank() == 0:
                save_tensors(moments, folder / OPTIMIZER)
            return
        info = {"universal_checkpoint_version": 0.2}
        with write_errors_last(self._engine, folder):
            self._engine.save_checkpoint(
                str(folder),
                tag=TAG,
                client_state={"universal_checkpoint_info": info},
                save_latest=False,
            )
        if not self._saves_data:
            self._check_shards(folder)
            self._saves_data = True

    def _check_shards(self, folder: Path) -> None:
        """Check that what an optimizer of one's own keeps can be read again, by the first save."""
        shards = sorted((folder / TAG).rglob("*.pt"))
        for shard in shards[torch.distributed.get_rank() :: torch.distributed.get_world_size()]:
            problem = problem_with_shard(shard)
            if problem is not None:
                raise OSError(f"{shard.name} could never be read again: it {problem}")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, with the same ranks and ZeRO stage. Collective."""
        with only_data(folder / TAG):
            loaded, _ = self._engine.load_checkpoint(
                str(folder), tag=TAG, load_lr_scheduler_states=False
            )
        if loaded is None:
            raise BadInput(f"{folder}: holds no engine state")
        # The checkpoint brings its own; this run's configuration rules.
        optimizer = self._engine.optimizer
        for group, settings in zip(optimizer.param_groups, self._group_settings, strict=True):
            group.update(settings)
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = self.config.train.gradient_clip

    def load_whole(self, state: WholeState, *, moments: bool = True) -> None:
        """Take whole weights and moments, from any ranks and ZeRO stage. Collective.

        Raises:
            BadInput: names the first parameter in which the models differ.
        """
        parameters = dict(self.named_parameters())
        buffers = {n: t for n, t in state.weights.items() if n not in parameters}

        def own(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
            names = [name for name in tensors if name in parameters]
            return {prefix + n: part(tensors[n], parameters[n], self.mesh) for n in names}

        given = {}
        if moments:
            there = state.exp_avg.keys() & state.exp_avg_sq.keys()
            for name, parameter in parameters.items():
                stepped = parameter.requires_grad and state.weights[name].numel()
                if there and stepped and name not in there:
                    raise BadInput(f"the checkpoint holds no moments of {name}")
            given = own(state.exp_avg, "exp_avg/") | own(state.exp_avg_sq, "exp_avg_sq/")
        set_whole(
            self._engine,
            parameters,
            own(state.weights),
            given,
            optimizer_steps=state.state.optimizer_steps,
        )
        held = self.model.state_dict()
        for name, tensor in buffers.items():
            held[name].copy_(tensor)

    def close(self) -> None:
        """Free what the engine holds, so that another phase can build its own."""
        self._engine.destroy()

    def _watch_gradient_norm(self) -> None:
        # Without ZeRO, DeepSpeed clips and forgets the norm that it clipped by.
        def keep(norm: Tensor) -> None:
            self._gradient_norm = float(norm)

        count_every_expert_once(self._engine, self.mesh, keep)


def batch_split(config: RunConfig, data_ranks: int) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step.

    Raises:
        BadInput: when they do not multiply to the batch.
    """
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch % data_ranks:
        raise BadInput(
            f"train.batch_size={batch}: must be a multiple of the {data_ranks} data-parallel ranks"
        )
    rows = batch // data_ranks
    micro = rows if micro is None else micro
    if rows % micro:
        raise BadInput(
            f"train.micro_batch_size={micro}: must divide {rows}, "
            f"the rows of train.batch_size={batch} on each of {data_ranks} ranks"
        )
    return micro, rows // micro


_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size / ranks / train.micro_batch_size",
    "gradient_clipping": "train.gradient_clip",
}


def engine_settings(
    config: RunConfig, data_ranks: int, *, replicas: int | None = None
) -> dict[str, Any]:
    """The configuration given to DeepSpeed: section `deepspeed`, completed by the others.

    Args:
        config: of the run.
        data_ranks: ranks that split the batch.
        replicas: what DeepSpeed takes for data-parallel ranks (context ranks too).

    Raises:
        BadInput: when section `deepspeed` contradicts another section.
    """
    micro, accumulation = batch_split(config, data_ranks)
    derived: dict[str, Any] = {
        "train_batch_size": micro * accumulation * (replicas or data_ranks),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.gradient_clip,
    }
    given = without_monitors(config)
    for key, value in derived.items():
        if given.get(key, "auto") not in ("auto", value):
            raise BadInput(
                f"deepspeed.{key}={given[key]}: contradicts {value}, which follows from "
                f"{_OURS[key]}; leave it out or set that"
            )
    half = any(given.get(key, {}).get("enabled") for key in ("bf16", "bfloat16", "fp16"))
    if half and not int(given.get("zero_optimization", {}).get("stage", 0)):
        # DeepSpeed 0.19 then steps with FP16_UnfusedOptimizer: after one step of AdamW with
        # clipping the loss fell by 0.080, by 0.119 in float32 and in bf16 at every other stage.
        raise BadInput(
            "deepspeed.zero_optimization.stage=0: must be 1, 2 or 3 with bf16 or fp16, since "
            "DeepSpeed's unsharded 16-bit optimizer takes other steps"
        )
    if "scheduler" in given:
        raise BadInput(
            "deepspeed.scheduler: must be left out, train.warmup_steps and "
            "train.final_learning_rate set the schedule"
        )
    defaults = {
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    settings = {**defaults, **given, **derived}
    if "zero_optimization" in settings:
        settings["zero_optimization"] = dict(settings["zero_optimization"])
    return settings


# Numbers of a bucket. Memory above 32 MiB the C library hands back to the system, every time.
_BUCKET = {"cuda": int(5e8), "cpu": 7_500_000}


def fit_zero(zero: dict[str, Any], model: nn.Module, mesh: Mesh, device: torch.device) -> None:
    """Complete section zero_optimization by what suits a model, where it does not say itself.

    The bucket of gradients is no larger than all of them: DeepSpeed allocates its 5e8 numbers anew
    in every step, and a system gives them page by page; on a GPU they are 2 GB. And the bucket is
    summed where it lies: `reduce_scatter` copies it out and back, and sends as much. (Experts on
    several ranks need that: their sums are of other groups.)
    """
    if "reduce_bucket_size" not in zero:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        zero["reduce_bucket_size"] = min(max(trained, 1), _BUCKET[device.type])
    if int(zero["stage"]) in (1, 2) and mesh.expert == 1:
        zero.setdefault("reduce_scatter", False)
