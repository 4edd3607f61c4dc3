"""A run on one rank: all its phases, from the newest checkpoint or from nothing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adaptive.compiling import graphs
from adaptive.observe.alarms import Alarm
from adaptive.observe.metric_log import MetricLog
from adaptive.observe.monitor import Monitor
from launch.checkpoint.contents import newest_checkpoint
from launch.checkpoint.files import find_checkpoint, read_state
from launch.checkpoint.state import RunState
from launch.run.config import save_resolved
from launch.run.engine import Engine
from launch.run.errors import BadInput, Failed
from launch.run.failures import clear as clear_errors
from launch.run.folder import how_to_continue, only_run_in, where_to_start
from launch.run.left_out import TRIES, Spike, jump
from launch.run.log import open_log
from launch.run.loop import Loop
from launch.run.marks import FINISHED, STOPPED, Marks
from launch.run.marks import clear as clear_marks
from launch.run.memory import memory_in_use
from launch.run.optimizer import learning_rate_at
from launch.run.peak import dtype_of, measured_peak
from launch.run.preflight import changed_settings, check_continues
from launch.run.progress import Progress, final_summary
from launch.run.ranks import StopRequest, is_first, join_ranks
from launch.run.sections import RunConfig
from launch.run.terminal import announced
from launch.tasks.registry import task_class
from parallel.mesh import Mesh


def run(config: RunConfig, marks: Marks | None = None) -> None:
    """Train all phases, from the newest checkpoint or from nothing; `marks` say how far it is."""
    marks = Marks() if marks is None else marks
    with announced("waiting for all ranks"):
        device = join_ranks()
    if is_first():
        print(f"{dist.get_world_size()} ranks have met on {device.type}", flush=True)
    with ExitStack() as held:
        with announced(f"looking for a checkpoint in {config.output}"):
            source = _found_by_first_rank(lambda: _begin(config, held), output=config.output)
        marks.open(Path(config.output), dist.get_rank())
        stopped = _run_phases(config, source, device, marks)
    marks(STOPPED if stopped else FINISHED, slow=True)


def _begin(config: RunConfig, held: ExitStack) -> Path | None:
    """Take the run's folder, until `held` ends; the checkpoint to start from."""
    output = Path(config.output)
    held.enter_context(only_run_in(output))
    source = where_to_start(config)
    clear_marks(output)
    clear_errors(output)
    save_resolved(config, output / "run.yaml")
    return source


def _run_phases(config: RunConfig, source: Path | None, device: torch.device, marks: Marks) -> bool:
    """Train all phases from a checkpoint; say where everything is. Whether it was stopped."""
    begun = time.perf_counter()
    mesh = Mesh.create(**vars(config.parallel))
    stop = StopRequest()
    state = RunState()
    if source is not None:
        check_continues(config, source)
        state = read_state(source)
    origin, said = source, list[Alarm]()
    while True:
        try:
            source, state, stopped = _run_to_end(
                config, state, source, said, mesh=mesh, device=device, stop=stop, marks=marks
            )
            break
        except Spike as spike:
            source, state, said = _go_back(config, spike, origin=origin, said=said)
    if is_first():
        assert source is not None
        if stopped:
            print(f"stopped at step {state.step} as asked; {how_to_continue(config)}", flush=True)
        task = task_class(config.task)(config, mesh=mesh, device=device)
        print(
            final_summary(
                checkpoint=source,
                output=Path(config.output),
                tensorboard=config.monitor.tensorboard,
                generate=task.generation_command(source),
                seconds=time.perf_counter() - begun,
            ),
            flush=True,
        )
    return stopped


def _run_to_end(
    config: RunConfig,
    state: RunState,
    source: Path | None,
    said: Sequence[Alarm],
    *,
    mesh: Mesh,
    device: torch.device,
    stop: StopRequest,
    marks: Marks,
) -> tuple[Path | None, RunState, bool]:
    """Train what is left of all phases; the checkpoint, where it is and whether it was stopped.

    Args:
        said: alarms that the log must have behind the step of `state`.

    Raises:
        Spike: the loss jumped.
    """
    # What a run wrote after its last checkpoint, before it was killed or went back, goes.
    first_step = 0 if source is None else state.step + 1
    phases = config.phase_configs()
    stopped = False
    with announced("opening the log"):
        opened = open_log(config, first_step=first_step, command=sys.argv)
    with opened as log:
        for alarm in said if log is not None else ():
            log.alarm(alarm.step, layer=alarm.layer, kind=alarm.kind, message=alarm.message)
        while not stopped:
            if state.phase_step >= phases[state.phase].train.steps:
                if state.phase + 1 == len(phases):
                    break
                state = replace(state, phase=state.phase + 1, phase_step=0)
            source, state, stopped = _run_phase(
                config,
                phases[state.phase],
                state,
                source=source,
                mesh=mesh,
                device=device,
                stop=stop,
                log=log,
                marks=marks,
            )
    return source, state, stopped


def _go_back(
    config: RunConfig, spike: Spike, *, origin: Path | None, said: Sequence[Alarm]
) -> tuple[Path | None, RunState, list[Alarm]]:
    """Where a run goes on whose loss has jumped: checkpoint, state, and what its log must say.

    Args:
        origin: what it goes back to before it has a checkpoint of its own; None: its beginning.
        said: what it had to say when it last went back.

    Raises:
        Failed: it has gone back there too often.
    """
    root = Path(config.output) / "checkpoints"
    found = _found_by_first_rank(lambda: newest_checkpoint(root), output=config.output)
    source = found or origin
    back = RunState() if source is None else read_state(source)
    state, alarm = spike.behind(back)
    earlier = [one for one in said if one.step == alarm.step]
    if is_first():
        print(alarm, flush=True)
    if len(earlier) >= TRIES:
        raise Failed(
            f"{spike.said}, for the {TRIES + 1}th time behind step {back.step}: training stopped"
        )
    if config.monitor.on_alarm == "stop":
        raise Failed("an alarm was raised and monitor.on_alarm=stop")
    return source, state, [*earlier, alarm]


def _run_phase(
    run_config: RunConfig,
    config: RunConfig,
    state: RunState,
    *,
    source: Path | None,
    mesh: Mesh,
    device: torch.device,
    stop: StopRequest,
    log: MetricLog | None,
    marks: Marks,
) -> tuple[Path, RunState, bool]:
    """Train one phase to its end, or until asked to stop; returns the checkpoint it ends with."""
    marks("building the engine", step=state.step, slow=True)
    task = task_class(config.task)(config, mesh=mesh, device=device)
    with announced("building the model and its optimizer"):
        engine = Engine(config, task, mesh=mesh, device=device)
    peak = _peak(config, device)
    monitor = Monitor(
        engine.model,
        log=log,
        every=config.monitor.every,
        group=mesh.token_group,
        peak=None if peak is None else peak * dist.get_world_size(),
        device=device,
    )
    loop = Loop(config, task, engine, state=state, stop=stop, monitor=monitor, marks=marks)
    train = config.train
    name = run_config.phases[state.phase].name if run_config.phases else "step"
    progress = Progress(steps=train.steps, every=train.log_every, name=name, speak=is_first())
    progress.say(engine.audit)
    if config.monitor.peak_tflops == "measured" and peak is not None:
        progress.say(f"large products reach {peak / 1e12:.3g} TFLOP/s on each rank: MFU is of that")
    task.start_phase(engine)
    if source is None and config.checkpoint.weights is not None:
        marks("reading a checkpoint", slow=True)
        with announced(f"reading {config.checkpoint.weights}"):
            weights = find_checkpoint(config.checkpoint.weights)
            loop.load(weights, moments=False, task_state=False)
        progress.say(f"beginning with the weights of {weights}")
    elif source is not None:
        marks("reading a checkpoint", slow=True)
        with announced(f"reading {source}"):
            loop.load(source, moments=_keeps_moments(run_config, state))
        progress.say(f"continuing from {source}")
        # At the beginning of a phase other settings are what it is for.
        changed = changed_settings(config, source) if state.phase_step else []
        if changed:
            progress.say(f"with other settings than it: {'; '.join(changed)}")
    else:
        loop.begin()
    asked = said_uncounted = False
    in_a_row = 0
    begun = loop.state.phase_step
    compiled = 0
    checkpoint: Path | None = None
    while loop.state.phase_step < train.steps and not asked:
        since, before = time.perf_counter(), loop.state
        first, due = loop.state.phase_step == begun, monitor.due(loop.state.step + 1)
        with announced("taking the first step", speak=None if first else False):
            report = loop.step(gradient_norms=due)
        if report.left_out:
            in_a_row += 1
            last = loop.state.rows - 1
            rows = f"rows {loop.state.rows - train.batch_size} to {last} are left out"
            said = f"{rows}: their gradient is not finite ({loop.state.left_out} steps so far)"
            # A request to stop is heeded behind the next step: this one has nothing to save.
            alarm = Alarm(loop.state.step + 1, "", "left_out", said)
            monitor.say(alarm)
            alarms_end = in_a_row > train.skip_steps
            _handle_alarms([alarm], config, progress, loss=report.loss if alarms_end else 0.0)
            if alarms_end:
                raise Failed(
                    f"the gradient is not finite, more than train.skip_steps={train.skip_steps} "
                    "times in a row: training stopped"
                )
            continue
        in_a_row = 0
        said = jump(before, report.loss, train.spike)
        if said is not None:
            loop.close()
            raise Spike(loop.state, said)
        loop.check_moved()
        number, step, asked = loop.state.phase_step, loop.state.step, report.stop
        learning_rate = learning_rate_at(number - 1, train)
        seconds = time.perf_counter() - since
        norm = engine.gradient_norm
        progress.step(number, report, seconds, learning_rate=learning_rate, gradient_norm=norm)
        if loop.uncounted and not said_uncounted:
            said_uncounted = True
            progress.say(f"operations are not counted: {loop.uncounted}")
        if train.compile and graphs() > compiled:
            compiled = graphs()
            progress.say(f"{name} {number}/{train.steps}  {compiled} graphs compiled so far")
        scalars = {"loss/train": report.loss, "learning_rate": learning_rate}
        scalars["data/waiting"] = report.waited / seconds
        if due:
            scalars |= {"progress/left_out": float(loop.state.left_out)}
            scalars |= {"progress/rollbacks": float(loop.state.rollbacks)}
            if norm is not None:
                scalars["gradient_norm"] = norm
            scalars |= memory_in_use(device)
            if train.compile:
                scalars["compile/graphs"] = float(compiled)
        alarms = monitor.end_step(
            step,
            scalars,
            tokens=report.tokens,
            seconds=seconds,
            operations=(report.executed_flops, report.nominal_flops),
            details={f"gradients/{name}": of for name, of in report.gradient_norms.items()},
            sums={f"loss/train/{k}": v for k, v in task.training_sums().items()} if due else {},
        )
        _handle_alarms(alarms, config, progress, loss=report.loss)
        evaluates = _due(number, train.evaluate_every) or number == train.steps
        if evaluates:
            if train.calibrate_rows:
                loop.calibrate()
            metrics = loop.evaluate()
            if metrics:
                said = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
                progress.say(f"{name} {number}/{train.steps}  validation {said}")
            named = {f"validation/{key}": value for key, value in metrics.items()}
            named |= {"progress/executed_flops": loop.state.executed_flops}
            named |= {"progress/tokens": float(loop.state.tokens)}
            _handle_alarms(monitor.end_evaluation(step, named), config, progress)
        images = config.monitor.images_every
        if _due(number, images) if images else evaluates:
            marks("pictures", slow=True)
            task.report(engine, step, log)
            monitor.histograms(step, report.records)
        spoken = train.evaluate_every * config.monitor.samples.every
        if config.monitor.shows_texts and (_due(number, spoken) or number == train.steps):
            marks("samples", slow=True)
            task.sample(engine, step, log)
        checkpoint = None
        if _due(number, config.checkpoint.every) or number == train.steps or asked:
            checkpoint = loop.save()
    loop.close()
    assert checkpoint is not None
    return checkpoint, loop.state, asked and loop.state.phase_step < train.steps


def _peak(config: RunConfig, device: torch.device) -> float | None:
    """Operations a second that a rank's device could do: given, measured, or not known."""
    stated = config.monitor.peak_tflops
    if stated == "measured":
        return measured_peak(device, dtype_of(config.deepspeed))
    return None if stated is None else stated * 1e12


def _keeps_moments(run_config: RunConfig, state: RunState) -> bool:
    """Whether the optimizer continues: always inside a phase, as asked at its beginning."""
    if state.phase_step > 0 or not run_config.phases:
        return True
    return run_config.phases[state.phase].optimizer == "keep"


def _handle_alarms(
    alarms: Sequence[Alarm], config: RunConfig, progress: Progress, *, loss: float = 0.0
) -> None:
    """Say what is wrong; end the run where it cannot go on or is not to."""
    for alarm in alarms:
        progress.say(str(alarm))
    if not math.isfinite(loss):
        raise Failed("the loss is not finite: training stopped")
    if alarms and config.monitor.on_alarm == "stop":
        raise Failed("an alarm was raised and monitor.on_alarm=stop")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _found_by_first_rank(find: Callable[[], Path | None], *, output: str) -> Path | None:
    """What rank 0 finds, on every rank; `output` is the folder that it works in.

    Raises:
        BadInput: on every rank, when rank 0 meets bad input.
    """
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = find()
        except BadInput as error:
            box[1] = str(error)
        except OSError as error:
            box[1] = f"{error.filename or output}: {error.strerror or error}"
    dist.broadcast_object_list(box, src=0)
    path, problem = box
    if problem is not None:
        raise BadInput(problem)
    return None if path is None else Path(path)
