"""The train loop: steps, evaluations and checkpoints of one phase of a run, for every task."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adaptive.blocks.calibration import calibrate
from adaptive.flops import executed_flops, nominal_flops
from adaptive.observe.monitor import Monitor
from adaptive.observe.regions import region
from adaptive.routing.schedules import start_step
from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import RoutingRecord, RoutingTape
from launch.checkpoint.contents import newest_checkpoint
from launch.checkpoint.files import (
    OPTIMIZER,
    TASK_STATE,
    WEIGHTS,
    check_moments_fit,
    first_difference,
    read_state,
    read_whole,
    save_tensors,
    shard_format,
    weight_shapes,
    write_description,
    write_problem,
    write_whole,
)
from launch.checkpoint.shards import TAG
from launch.checkpoint.state import RunState, WholeState
from launch.run.ahead import Ahead
from launch.run.config import load_saved
from launch.run.engine import Engine
from launch.run.errors import BadInput, Failed
from launch.run.finite import Counters
from launch.run.left_out import next_rows, with_loss
from launch.run.marks import Marks
from launch.run.optimizer import learning_rate_at
from launch.run.ranks import StopRequest, is_first
from launch.run.sections import RunConfig
from launch.run.sizes import without_memory
from launch.tasks import Batch, Task
from parallel.checkpoint import collectively, save_atomically, step_of
from parallel.mesh import Mesh

Tensors = dict[str, Tensor]


@dataclass
class StepReport:
    """What one optimizer step did, over all ranks.

    Attributes:
        loss: of the task, mean over the targets of the global batch.
        tokens: of the global batch.
        executed_flops, nominal_flops: forward and backward.
        stop: whether some rank was asked to end.
        records: of this rank's last micro-batch.
        waited: seconds in which this rank had no batch to compute.
        gradient_norms: before clipping, by part of the model, where they were asked for.
        left_out: whether its gradient was not finite: nothing but the stream has moved on.
    """

    loss: float
    tokens: int
    executed_flops: float
    nominal_flops: float
    stop: bool
    records: list[RoutingRecord]
    waited: float = 0.0
    gradient_norms: dict[str, float] = field(default_factory=dict)
    left_out: bool = False


class Loop:
    """One phase of a run on this rank: an engine, its task, and where they are.

    Args:
        config: of the phase.
        state: where the run is; its `phase_step` is where this phase continues.
        task, engine: of this phase.
        monitor: is shown what was routed; None: nobody.
        stop: whether this process was asked to end.
        marks: are told how far it is; None: nobody.

    Attributes:
        uncounted: why operations are not counted; None while they are.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        engine: Engine,
        *,
        state: RunState,
        stop: StopRequest,
        monitor: Monitor | None = None,
        marks: Marks | None = None,
    ) -> None:
        self.config, self.task, self.engine = config, task, engine
        self.state, self.stop, self.monitor = state, stop, monitor
        self._mark = Marks() if marks is None else marks
        self._done: set[str] = set()
        self.root = Path(config.output) / "checkpoints"
        self._unmoved = [n for n, p in engine.named_parameters() if p.requires_grad]
        self._takes_census = True
        self.uncounted: str | None = None
        self._ahead = Ahead(self._micro_batches)
        # Whole shapes: the model's own parameters are slices, and under ZeRO 3 empty.
        with without_memory() as meta:
            self._shapes = type(task)(config, mesh=Mesh.single(), device=meta).build_model()
        trained = [n for n, p in self._shapes.named_parameters() if p.requires_grad and p.numel()]
        self._unmoved = trained

    def step(self, *, gradient_norms: bool = False) -> StepReport:
        """Take one optimizer step on the next rows of the stream that are not left out.

        Where the gradient is not finite, on any rank, it leaves them out itself.

        Args:
            gradient_norms: also take those of the model's parts; the same on every rank.
        """
        train, mesh, engine = self.config.train, self.engine.mesh, self.engine
        number = self.state.phase_step
        self._begin("batch")
        rows = next_rows(self.state.rows, train.batch_size, train.skip_rows)
        counters = Counters(engine.model)
        tokens, targets = self.task.tokens(rows), self.task.targets(rows)
        start_step(engine.model, number)
        scope = BatchScope.of(mesh, tokens, micro_batches=engine.accumulation)
        with region("data"):
            parts = self._ahead.take(rows)
        if len(parts) > 1 and self._takes_census:
            self._take_census(parts, scope)
        # loss, executed and nominal operations, stop: one collective for all of them.
        sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
        engine.train()
        records: list[RoutingRecord] = []
        norms: dict[str, float] = {}
        left_out, tapes = False, list[RoutingTape]()
        for part, (own, batch) in enumerate(parts, 1):
            self._seed(own)
            self._begin("forward")
            with RoutingTape(engine.model, scope=scope) as tape:
                loss_sum = engine.forward(batch)
            self._begin("backward")
            engine.backward(loss_sum * (engine.replicas / targets) + tape.loss())
            self._begin("optimizer step")
            if part == len(parts):
                norms = engine.gradient_norms() if gradient_norms else {}
                left_out = not engine.gradient_is_finite()
            engine.step(learning_rate_at(number, train), leave_out=left_out)
            with region("monitor"):
                tapes += [tape] if self.monitor is not None else []
                records = tape.records
                sums[0] += loss_sum.detach()
                self._count_operations(sums, records, batch)
        self._takes_census = scope.totals > 0
        sums[3] = float(self.stop.asked)
        _sum_over(sums, mesh)
        loss, executed, nominal, stop = sums.tolist()
        report = StepReport(
            loss / targets,
            tokens,
            executed,
            nominal,
            stop > 0,
            records,
            self._ahead.waited,
            norms,
            left_out,
        )
        self._done |= {"batch", "forward", "backward", "optimizer step"}
        if left_out:
            counters.restore()
            left = self.state.left_out + 1
            self.state = replace(self.state, rows=rows.stop, left_out=left)
            return report
        with region("monitor"):
            for tape in tapes if self.monitor is not None else []:
                self.monitor.observe(tape)
        self._advance(report, rows)
        self.task.after_step(engine, self.state.step)
        return report

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows, means over all ranks."""
        engine, mesh = self.engine, self.engine.mesh
        total = self.task.validation_rows
        span = engine.micro_batch
        sums: dict[str, Tensor] = {}
        engine.train(False)
        with torch.no_grad():
            for start in range(0, total, span * mesh.data):
                first = start + mesh.data_rank * span
                rows = range(first, min(first + span, total))
                # A rank without rows of its own still takes part in every collective.
                counted = len(rows) > 0
                rows = rows if counted else range(1)
                self._seed(rows)
                batch = self.task.validation_batch(rows)
                self._begin("evaluation")
                with RoutingTape(engine.model) as tape:
                    results = engine.forward(batch, self.task.validation_sums)
                if counted and self.monitor is not None:
                    self.monitor.observe_evaluation(tape)
                for name, (value, count) in results.items():
                    pair = torch.tensor([float(value), float(count)], dtype=torch.float64)
                    sums[name] = sums.get(name, torch.zeros_like(pair)) + pair * counted
        self._done.add("evaluation")
        engine.train()
        metrics = {}
        for name, pair in sums.items():
            on_device = pair.to(engine.device)
            _sum_over(on_device, mesh)
            metrics[name] = float(on_device[0] / on_device[1])
        return metrics

    def calibrate(self) -> dict[str, float]:
        """Set the thresholds of predictors on held-out rows, the same ones on every rank."""
        last = min(self.config.train.calibrate_rows, self.task.validation_rows)
        span, engine = self.engine.micro_batch, self.engine
        batches = [
            self.task.validation_batch(range(start, min(start + span, last)))
            for start in range(0, last, span)
        ]
        return calibrate(
            engine.model,
            batches,
            forward=self._calibrating,
        )

    def _calibrating(self, batch: Batch) -> Any:
        self._begin("calibration")
        return self.engine.forward(batch, self.task.validation_sums)

    def _begin(self, part: str) -> None:
        """Leave a mark; what a phase does for the first time may be compiled, which takes long."""
        self._mark(part, step=self.state.step, slow=part not in self._done)

    def save(self) -> Path:
        """Write a checkpoint of where the run is. Collective.

        Raises:
            Failed: on every rank, when one could not write or weights are not finite; the
                checkpoints before stay.
        """

        def write(folder: Path) -> None:
            weights = self.engine.full_weights()
            shared = self.task.shared_state(self.engine)
            self._mark("writing weights", slow=True)
            # Rank 0 may fail here, and the engine's part has collectives.
            collectively(lambda: self._describe(folder, weights, shared) if is_first() else None)
            self._mark("writing the optimizer", slow=True)
            self.engine.save(folder)
            self._mark("checking what was written", slow=True)

        self._mark("gathering weights", slow=True)
        step, keep = self.state.step, self.config.checkpoint.keep
        try:
            return save_atomically(self.root, step, write, keep=keep)
        except (OSError, RuntimeError, SafetensorError, FloatingPointError) as error:
            reason = write_problem(error)
            if reason is None:
                raise
            newest = newest_checkpoint(self.root, checksums=False)
            left = "there is none" if newest is None else f"newest is step {step_of(newest)}"
            raise Failed(
                f"{self.config.output}: {reason} (checkpoint of step {step} not written; {left})"
            ) from error

    def _describe(self, folder: Path, weights: Tensors, shared: Tensors) -> None:
        """Rank 0's part of a checkpoint: all that is not the engine's."""
        # A resume writes no step up to this one again: all that is said of them must be there.
        if self.monitor is not None:
            self.monitor.flush()
        for name, _ in self.engine.named_parameters():
            if not weights[name].isfinite().all():
                raise FloatingPointError(f"weights are not finite, first of {name}")
        save_tensors(weights, folder / WEIGHTS)
        if shared:
            save_tensors(shared, folder / TASK_STATE)
        write_description(folder, self.state, self.config)

    def begin(self) -> None:
        """Take the weights that the task begins a run with. Collective."""
        weights = self.task.first_weights()
        if weights is not None:
            whole = WholeState(weights, {}, {}, self.state, self.config)
            self.engine.load_whole(whole, moments=False)

    def load(self, folder: Path, *, moments: bool = True, task_state: bool = True) -> None:
        """Continue from a checkpoint, of any ranks and ZeRO stage. Collective.

        Args:
            folder: the checkpoint.
            moments: False to start the optimizer anew.
            task_state: False to start the task anew too, from the weights alone.

        At the beginning of a phase the task may fit the state to another model (`Task.adapt`).

        Raises:
            BadInput: it is of another model (names the first parameter that differs), or of an
                optimizer whose moments this run's does not have.
        """
        saved = read_state(folder)
        sharded = (folder / TAG).is_dir() and moments
        same = saved.ranks == dist.get_world_size() and saved.zero_stage == self.engine.zero_stage
        writer = load_saved(folder)
        same = same and writer.parallel == self.config.parallel
        same = same and shard_format(writer) == shard_format(self.config)
        if moments and not same:
            check_moments_fit(writer, self.config, folder)
        fits = first_difference(self._shapes, weight_shapes(folder)) is None
        if fits and sharded and same:
            self.engine.load(folder)
        else:
            whole = _read_once(folder, self.root, moments=moments)
            if not fits and self.state.phase_step == 0:
                whole = self.task.adapt(whole)
            shapes = {name: tuple(tensor.shape) for name, tensor in whole.weights.items()}
            problem = first_difference(self._shapes, shapes)
            if problem is not None:
                raise BadInput(f"{folder}: is a checkpoint of another model: {problem}")
            self.engine.load_whole(whole, moments=moments)
        if not moments:
            self.state = replace(self.state, optimizer_steps=0)
        if task_state and (folder / TASK_STATE).is_file():
            self.task.load_shared_state(self.engine, load_file(folder / TASK_STATE))

    def close(self) -> None:
        """Free the engine, and make no more batches."""
        self._ahead.close()
        self.engine.close()

    def check_moved(self) -> None:
        """Check that every parameter had a gradient by now, when the time for that is over.

        Raises:
            Failed: names those that had none.
        """
        within = self.config.train.move_within
        if not within or not self._unmoved or not self.engine.keeps_moments:
            return
        parameters = dict(self.engine.named_parameters())
        waiting = []
        for name in self._unmoved:
            moment = self.engine.full_moment(parameters[name], "exp_avg")
            # Without ZeRO a parameter that never had a gradient has no moment at all.
            if moment is None or not moment.any():
                waiting.append(name)
        self._unmoved = waiting
        if waiting and self.state.phase_step >= within:
            names = ", ".join(waiting[:5]) + (
                f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
            )
            raise Failed(f"{names}: had no gradient within train.move_within={within} steps")

    def _micro_batches(self, rows: range) -> list[tuple[range, Batch]]:
        engine, span = self.engine, self.engine.micro_batch
        parts = []
        for index in range(engine.accumulation):
            start = (engine.mesh.data_rank * engine.accumulation + index) * span
            own = rows[start : start + span]
            parts.append((own, self.task.batch(own)))
        return parts

    def _take_census(self, parts: list[tuple[range, Batch]], scope: BatchScope) -> None:
        """Count over all micro-batches what losses that are not linear in the tokens need."""
        scope.start_census()
        with torch.no_grad():
            for own, batch in parts:
                self._seed(own)
                self._begin("census")
                with RoutingTape(self.engine.model, scope=scope):
                    self.engine.forward(batch)
        scope.finish_census()

    def _seed(self, rows: range) -> None:
        """Random draws inside the model are a function of the seed and the rows they serve."""
        sequence = np.random.SeedSequence([self.config.train.seed, rows.start])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)

    def _count_operations(self, sums: Tensor, records: list[RoutingRecord], batch: Batch) -> None:
        work = None if self.uncounted else self.task.work(batch)
        if work is None:
            return
        # Every context rank counts the whole of the sequences that they share.
        ranks = self.engine.mesh.context
        try:
            executed = executed_flops(self._shapes, records, work, backward=True) / ranks
            nominal = nominal_flops(self._shapes, work, backward=True) / ranks
        except ValueError as error:  # a module of one's own that does not say what it computes
            self.uncounted = str(error)
            return
        sums[1] += executed
        sums[2] += nominal

    def _advance(self, report: StepReport, rows: range) -> None:
        state = self.state
        state = replace(
            state,
            step=state.step + 1,
            phase_step=state.phase_step + 1,
            rows=rows.stop,
            tokens=state.tokens + report.tokens,
            executed_flops=state.executed_flops + report.executed_flops,
            nominal_flops=state.nominal_flops + report.nominal_flops,
            optimizer_steps=state.optimizer_steps + self.engine.stepped,
            ranks=dist.get_world_size(),
            zero_stage=self.engine.zero_stage,
        )
        self.state = with_loss(state, report.loss)


def _sum_over(sums: Tensor, mesh: Mesh) -> None:
    """Sum over all ranks, each token once: tensor ranks have the losses of the same tokens."""
    if dist.get_world_size() == 1:
        return
    dist.all_reduce(sums)
    sums *= mesh.replicas / dist.get_world_size()


def _read_once(folder: Path, root: Path, *, moments: bool) -> WholeState:
    """A checkpoint as whole tensors; what must be converted is converted by one rank.

    Args:
        folder: the checkpoint, of which nothing is changed.
        root: the run's own checkpoints, a folder that every rank sees.
        moments: see `read_whole`.
    """
    if not moments or (folder / OPTIMIZER).is_file() or dist.get_world_size() == 1:
        return read_whole(folder, moments=moments)
    scratch = root / f".whole-{folder.name}"
    if is_first():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        write_whole(scratch, read_whole(folder))
    dist.barrier()
    whole = read_whole(scratch)
    dist.barrier()
    if is_first():
        shutil.rmtree(scratch)
    return whole
