"""Monitor: the routing of a run, reduced over micro-batches, steps and ranks, judged and written.

    monitor = Monitor(model, log=MetricLog(folder), every=10, group=mesh.data_group)
    ...
    monitor.observe(tape)                                    # after every micro-batch
    for alarm in monitor.end_step(step, {"loss/train": loss}, tokens=n, seconds=t): print(alarm)

Between two writings nothing is computed and nothing is waited for: scalars stay on the device.
Every `every` steps they are packed into one vector, summed over the ranks in one all-reduce and
read by the host once. The monitor draws no random number and touches no module, so a run is the
same with it and without.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.blocks.protocol import RoutedBlock
from adaptive.flops import FlopCounter, Work, executed_flops
from adaptive.observe.alarms import Alarm, AlarmLimits, Alarms
from adaptive.observe.metric_log import MetricLog
from adaptive.observe.pictures import load_map, patch_map
from adaptive.routing.summary import RoutingWindow, Summary
from adaptive.routing.tape import RoutingRecord, RoutingTape


class Monitor:
    """Watches one model. Every rank has one and makes the same calls.

    Args:
        model: the model given to the RoutingTape: its modules name the records, and tell FLOPs.
        log: where to write; None on all ranks but one, and where nothing is to be written.
        every: steps between writings: when the number of steps taken is a multiple of it, so that
            a resumed run writes at the same steps.
        group: ranks whose tokens differ (data and context ranks).
        limits: when alarms are raised.
        peak: operations a second that all ranks together could do at most, as stated by whoever
            built them; None: utilisation is not written.
        device: of the collective; by default that of the records.

    Attributes:
        latest: the scalars of the last writing, by name; on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        log: MetricLog | None = None,
        every: int = 10,
        group: dist.ProcessGroup | None = None,
        limits: AlarmLimits | None = None,
        peak: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.latest: dict[str, float] = {}
        self._model, self._log, self._every, self._device = model, log, every, device
        self._alarms, self._peak = Alarms(limits), peak
        self._training, self._evaluation = RoutingWindow(group), RoutingWindow(group)
        self._counts_flops = True
        self._lengths: list[Tensor] = []
        self._steps, self._seconds, self._tokens = 0, 0.0, 0.0
        self._given = (0.0, 0.0)

    def observe(self, tape: RoutingTape) -> None:
        """Take what a training micro-batch recorded."""
        self._training.add(tape.records)
        self._lengths += tape.lengths

    def end_step(
        self,
        step: int,
        scalars: Mapping[str, float],
        *,
        tokens: int,
        seconds: float,
        operations: tuple[float, float] | None = None,
        details: Mapping[str, float] | None = None,
        sums: Mapping[str, tuple[Tensor | float, Tensor | float]] | None = None,
    ) -> list[Alarm]:
        """An optimizer step has been taken. Writes, if this one's turn has come.

        Args:
            step: steps taken so far, this one included.
            scalars: losses, learning rate, …, by the name to write them under; the same numbers on
                every rank.
            tokens: valid tokens in the global batch.
            seconds: wall-clock time of the step.
            operations: executed and nominal ones of the global batch, where the caller counted them
                already; by default they are counted here from the records.
            details: written beside the scalars and not judged, since one of those tells of them.
            sums: sum and count on this rank, of which the means over all ranks are written; the
                same names on every rank.

        Returns:
            Alarms raised by it, the same on every rank. They are in the log already.
        """
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._tokens += tokens
        alarms = self._alarms.check_run(step, scalars)
        # Something is not finite: look at the layers now, they tell where.
        due = self.due(step) or bool(alarms)
        if operations is not None:
            self._given = (self._given[0] + operations[0], self._given[1] + operations[1])
        if due:
            counted = (0.0, 0.0) if operations is not None else self._flops()
            pairs = [number for pair in (sums or {}).values() for number in pair]
            summaries, added = self._training.reduce(
                [*counted, *pairs], steps=self._steps, device=self._device
            )
            executed, nominal = (a + b for a, b in zip(added[:2], self._given, strict=True))
            alarms += self._alarms.check_routing(step, summaries)
            written = {**scalars, **(details or {}), **self._throughput(executed, nominal)}
            written |= {
                name: total / count
                for name, total, count in zip(sums or {}, added[2::2], added[3::2], strict=True)
                if count
            }
            written |= {f"loss/{name}": value for name, value in self._training.losses.items()}
            written |= _named(summaries, "routing")
            self._start_window()
            self._write(step, written)
        self._log_alarms(alarms)
        return alarms

    def due(self, step: int) -> bool:
        """Whether `end_step` of this step writes."""
        return step % self._every == 0

    def observe_evaluation(self, tape: RoutingTape) -> None:
        """Take what an evaluation batch recorded. Auxiliary losses are those of training only."""
        self._evaluation.add(replace(record, losses={}) for record in tape.records)

    def end_evaluation(self, step: int, scalars: Mapping[str, float]) -> list[Alarm]:
        """An evaluation has ended: write its scalars, and its routing as `validation_routing/…`.

        A model that routes by its predictor is judged here: does it execute what it is meant to?
        """
        summaries, _ = self._evaluation.reduce(device=self._device)
        alarms = self._alarms.check_run(step, scalars)
        alarms += self._alarms.check_routing(step, summaries, of="evaluation")
        self._write(step, {**scalars, **_named(summaries, "validation_routing")})
        self._log_alarms(alarms)
        return alarms

    def histograms(self, step: int, records: Sequence[RoutingRecord]) -> None:
        """Write how router weights are distributed in some records of this rank, and pictures.

        Pictures: each statistic of all layers over the steps so far; the load of experts, of all
        ranks' tokens in the last window; where a block's tokens are patches of images (its
        `grid`), those that were kept.
        """
        if self._log is None:
            return
        self._log.layer_images(step)
        if self._training.loads:
            loads = {name: torch.tensor(load) for name, load in self._training.loads.items()}
            self._log.image(step, "routing/load", load_map(loads))
        for record in records:
            if record.weights is not None:
                self._log.histogram(step, f"routing/{record.name}/weights", record.weights)
            routed = self._model.get_submodule(record.name)
            if not isinstance(routed, RoutedBlock) or routed.grid is None:
                continue
            if record.chosen is not None and len(routed.grid) == 2:
                rows, columns = routed.grid
                kept_BS = record.chosen.unflatten(0, (-1, rows * columns))
                kept = patch_map(kept_BS, (rows, columns))
                self._log.image(step, f"routing/{record.name}/kept", kept)

    def say(self, alarm: Alarm) -> None:
        """Write an alarm that another has raised, the same on every rank."""
        self._log_alarms([alarm])

    def flush(self) -> None:
        """Let what was written so far outlive this process and machine (`MetricLog.flush`)."""
        if self._log is not None:
            self._log.flush()

    def _flops(self) -> tuple[Tensor | float, Tensor | float]:
        """Executed and nominal operations of the window on this rank, forward and backward."""
        if not self._counts_flops or not self._lengths:
            return 0.0, 0.0
        work = Work.of(torch.cat(self._lengths))
        try:
            executed = executed_flops(self._model, self._training.records, work, backward=True)
            counter = FlopCounter(nominal=True)
            counter(self._model, work)
        except ValueError as error:
            self._counts_flops = False
            warnings.warn(f"operations are not counted: {error}", stacklevel=2)
            return 0.0, 0.0
        nominal = counter.total()
        return executed, nominal.forward + nominal.backward

    def _throughput(self, executed: float, nominal: float) -> dict[str, float]:
        seconds = max(self._seconds, 1e-9)
        out = {
            "throughput/tokens_per_second": self._tokens / seconds,
            "throughput/seconds_per_step": seconds / self._steps,
        }
        if nominal > 0:
            out["throughput/executed_flops_per_second"] = executed / seconds
            out["throughput/nominal_flops_per_second"] = nominal / seconds
            out["throughput/executed_share_of_nominal"] = executed / nominal
            if self._peak is not None:
                out["throughput/mfu"] = executed / seconds / self._peak
                out["throughput/peak_flops_per_second"] = self._peak
        return out

    def _start_window(self) -> None:
        self._lengths = []
        self._steps, self._seconds, self._tokens = 0, 0.0, 0.0
        self._given = (0.0, 0.0)

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        self.latest = scalars
        if self._log is not None:
            self._log.scalars(step, scalars)

    def _log_alarms(self, alarms: Sequence[Alarm]) -> None:
        if self._log is not None:
            for alarm in alarms:
                self._log.alarm(
                    alarm.step, layer=alarm.layer, kind=alarm.kind, message=alarm.message
                )


def _named(summaries: Mapping[str, Summary], prefix: str) -> dict[str, float]:
    """`prefix/layer/statistic`, for all layers."""
    return {
        f"{prefix}/{layer}/{name}": value
        for layer, summary in summaries.items()
        for name, value in summary.items()
    }
