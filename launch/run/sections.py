"""RunConfig, and the sections of a configuration that every task shares.

Fields are documented under "Attributes:"; `--help` prints those lines.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from launch.run.errors import BadInput
from launch.run.growth_phases import GrowthConfig
from launch.run.validation import validated

_FORBID = {"extra": "forbid"}


# What counts and seeds are kept in: int64, by numpy and torch.
LARGEST_WHOLE = 2**63 - 1
# Rows of one step: what holds them is made in memory.
LARGEST_BATCH = 2**24
# Optimizers compute in float32, into which torch refuses to convert a larger number.
_LARGEST = 1e38


def _within(owner: object, minimum: float, maximum: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None or minimum <= value <= maximum:
            continue
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be a finite number")
        rule = f"at least {minimum}" if value < minimum else f"at most {maximum}"
        raise ValueError(f"{name}={value}: must be {rule}")


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer and its schedule.

    Attributes:
        steps: optimizer steps.
        batch_size: rows (sequences, images) of one step, over all ranks.
        micro_batch_size: rows of one forward on one rank; null: batch_size / data ranks, so that
            nothing is accumulated.
        learning_rate: highest learning rate, reached after the warm-up.
        warmup_steps: steps in which the learning rate rises linearly from 0.
        final_learning_rate: share of learning_rate that the cosine ends at, from 0 to 1.
        weight_decay: decoupled, on matrices only (not on norms, biases or scales).
        beta1, beta2, eps: of AdamW.
        gradient_clip: largest global gradient norm; 0: no clipping.
        seed: of the weights, the order of the data and every random draw; below 2**63.
        evaluate_every: steps between evaluations on held-out data; 0: at the end only.
        log_every: steps between progress lines.
        calibrate_rows: held-out rows on which thresholds of what decides causally (predictors of
            Mixture-of-Depths, gates of segments) are set before every evaluation, so that it
            executes the share of tokens that was trained; 0: a token is executed when that is
            found more likely than not.
        move_within: every parameter must have had a gradient within this many steps, or the run
            stops and names it; 0: not checked.
        hang_seconds: seconds without a sign of progress of any rank (a micro-batch, a part of an
            evaluation or checkpoint) after which the run is ended, and what hangs is named; four
            times as many where compilation or files may take long; 0: never.
        stop_seconds: seconds in which ranks that are asked to end (SIGTERM) save and end before
            they are killed.
        skip_rows: a list of [first, stop]: rows of the data stream that are left out, not `stop`.
            A step takes rows that follow one another, so those before a span that fill no step are
            left out too.
        skip_steps: steps in a row that are left out because their gradient is not finite; one more
            ends the run.
        spike: standard deviations by which a step's loss may be above the mean of the last hundred
            or so; beyond, the run goes back to its newest checkpoint and leaves out the rows since;
            0: any loss is trained on.
        compile: compile layers by torch.compile (docs/profiling.md); needs a C++ compiler on a CPU,
            triton on a GPU.
        growth: a list of {step, tokens, ffn_tokens}: parameter tokens of a TokenFormer from that
            step on; each stage between two growths is a phase with its own warm-up and cosine.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    steps: int = 200
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 0
    log_every: int = 10
    calibrate_rows: int = 0
    move_within: int = 1
    hang_seconds: float = 300.0
    stop_seconds: float = 30.0
    skip_rows: list[list[int]] = field(default_factory=list)
    skip_steps: int = 3
    spike: float = 0.0
    compile: bool = False
    growth: list[GrowthConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        _within(self, 1, LARGEST_WHOLE, "steps", "log_every")
        _within(self, 1, LARGEST_BATCH, "batch_size", "micro_batch_size")
        _within(self, 0, LARGEST_WHOLE, "warmup_steps", "evaluate_every", "move_within", "seed")
        _within(self, 0, LARGEST_WHOLE, "calibrate_rows", "skip_steps")
        _within(self, 0, 1e6, "spike")
        for span in self.skip_rows:
            if len(span) != 2 or not 0 <= span[0] < span[1] <= LARGEST_WHOLE:
                raise ValueError(f"skip_rows={span}: must be [first, stop] with 0 <= first < stop")
        # Adam divides the rate by 1 - beta1 at first, and multiplies it by the decay.
        _within(self, 0, 1e6, "learning_rate", "weight_decay")
        _within(self, 0, _LARGEST, "gradient_clip", "eps")
        _within(self, 0, 1e7, "hang_seconds")
        _within(self, 5, 1e7, "stop_seconds")
        _within(self, 0, 1, "final_learning_rate")
        if not self.eps:
            # Adam divides by the root of a second moment, which is 0 where no gradient has been.
            raise ValueError(f"eps={self.eps}: must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the model; what these axes leave of the world splits the batch.

    Attributes:
        tensor: ranks that split every weight matrix.
        context: ranks that split every sequence.
        expert: ranks that split the experts.
        sequence_parallel: also split the tokens between the tensor ranks.
        context_attention: how attention sees split sequences: "ulysses" (heads are split
            meanwhile, and must divide) or "ring" (queries or keys travel round the ranks).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    context_attention: Literal["ulysses", "ring"] = "ulysses"

    def __post_init__(self) -> None:
        _within(self, 1, LARGEST_WHOLE, "tensor", "context", "expert")


@dataclass(frozen=True)
class SamplesConfig:
    """Texts that a language model goes on with while it trains, shown where texts are shown.

    Attributes:
        prompts: what it goes on from; empty: the beginning of the first held-out text.
        tokens: drawn behind each; 0: nothing is sampled.
        every: evaluations from one to the next; there is one at the end too.
        temperature: divides the logits; 0 takes the likeliest token.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    prompts: list[str] = field(default_factory=list)
    tokens: int = 48
    every: int = 1
    temperature: float = 0.8

    def __post_init__(self) -> None:
        _within(self, 0, 10**6, "tokens")
        _within(self, 1, LARGEST_WHOLE, "every")
        _within(self, 0, 1e6, "temperature")


@dataclass(frozen=True)
class MonitorConfig:
    """What is written while training.

    Attributes:
        tensorboard: write TensorBoard events to OUTPUT/tensorboard.
        sinks: what else is written: csv (OUTPUT/metrics.csv), wandb, mlflow, deepspeed (those that
            section deepspeed enables of tensorboard and csv_monitor, in OUTPUT/deepspeed).
        project: of wandb, and the experiment of mlflow.
        peak_tflops: operations that one rank's device could do, in 10^12 a second, for
            throughput/mfu; "measured" takes what large products reach here, on all ranks at once;
            null: not written.
        every: steps between records of the routing (they are also lines of OUTPUT/metrics.jsonl).
        images_every: steps between histograms and routing images; 0: at evaluations only.
        samples: of texts: prompts, tokens, every, temperature.
        on_alarm: "warn" prints an alarm and goes on, "stop" ends the run.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    tensorboard: bool = True
    sinks: list[Literal["csv", "wandb", "mlflow", "deepspeed"]] = field(default_factory=list)
    project: str = "adaptive"
    peak_tflops: float | Literal["measured"] | None = None
    every: int = 10
    images_every: int = 0
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    on_alarm: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        _within(self, 1, LARGEST_WHOLE, "every")
        _within(self, 0, LARGEST_WHOLE, "images_every")
        if self.peak_tflops != "measured":
            _within(self, 1e-6, 1e9, "peak_tflops")
        if not self.project.strip():
            raise ValueError(f"project={self.project!r}: must be a name")
        if len(set(self.sinks)) < len(self.sinks):
            raise ValueError(f"sinks={self.sinks}: must name each once")

    @property
    def shows_texts(self) -> bool:
        """Whether what is sampled can be seen anywhere."""
        return self.tensorboard or not {"wandb", "mlflow"}.isdisjoint(self.sinks)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and what it starts from.

    Attributes:
        every: steps between checkpoints; 0: at the end (and on SIGTERM) only.
        keep: checkpoints that are kept: the one written last and the nearest below it.
        resume: "auto" continues from the newest intact checkpoint of OUTPUT, "never" starts anew,
            a path starts from that checkpoint, or continues the run that the same configuration
            started from it.
        weights: a checkpoint whose weights alone begin a run that has none to continue: step 0, a
            new optimizer, the first row; null: weights are drawn.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    every: int = 0
    keep: int = 2
    resume: str = "auto"
    weights: str | None = None

    def __post_init__(self) -> None:
        _within(self, 0, LARGEST_WHOLE, "every")
        _within(self, 1, LARGEST_WHOLE, "keep")
        if not self.resume.strip():
            raise ValueError(f"resume={self.resume!r}: must be auto, never or a path")
        if self.weights is not None and not self.weights.strip():
            raise ValueError(f"weights={self.weights!r}: must be a path, or null")


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a run of several, which continues from the phase before.

    Warm-up, cosine and step count start anew in every phase; a checkpoint ends it. What a phase
    does not name is as in the run's own sections.

    Attributes:
        name: of the phase.
        train, model, data, average, sampling: keys of those sections that differ in this phase.
        optimizer: "keep" the moments of the phase before, or "restart" from zero.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    optimizer: Literal["keep", "restart"] = "keep"


OF_SOME_TASKS = ("average", "sampling")
"""Sections that only tasks have which name them (`Task.sections`)."""


@dataclass(frozen=True)
class RunConfig:
    """All of a run.

    Attributes:
        task: what is learnt: language_model, diffusion, or your own as `module:Class`.
        output: folder of checkpoints, logs and the resolved configuration.
        average: section of tasks that average their weights; else None.
        sampling: section of tasks that draw samples; else None.
        phases: a list of phases, see docs/configuration.md; empty: one phase.
        plugins: modules imported first, which add methods: see docs/new_method.md.
    """

    task: str
    output: str
    model: Any
    data: Any
    train: TrainConfig
    parallel: ParallelConfig
    monitor: MonitorConfig
    checkpoint: CheckpointConfig
    deepspeed: dict[str, Any]
    average: Any = None
    sampling: Any = None
    phases: list[PhaseConfig] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data: `from_mapping` gives the same RunConfig."""
        plain = dataclasses.asdict(self)
        return {k: v for k, v in plain.items() if v is not None or k not in OF_SOME_TASKS}

    def phase_configs(self) -> list[RunConfig]:
        """The configuration of each phase; the run itself when it has none.

        Raises:
            BadInput: when a phase names an unknown key or a wrong value.
        """
        if not self.phases:
            return [self]
        configs, config = [], self
        for phase in self.phases:
            try:
                # Keys carry over from phase to phase: a model that grew stays grown.
                for section in ("train", "model", "data", *OF_SOME_TASKS):
                    if not getattr(phase, section):
                        continue
                    changed = getattr(config, section)
                    if changed is None:
                        raise BadInput(f"{section}: unknown key, task={self.task} has no such")
                    keys = _merged(dataclasses.asdict(changed), getattr(phase, section))
                    section_of_phase = validated(type(changed), keys, section)
                    config = dataclasses.replace(config, **{section: section_of_phase}, phases=[])
            except BadInput as error:
                raise BadInput(f"phase {phase.name}: {error}") from None
            configs.append(config)
        return configs


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    out = dict(old)
    for key, value in new.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if nested else value
    return out
