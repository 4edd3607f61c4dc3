"""Section `deepspeed`, checked by DeepSpeed's own configuration classes before any rank starts."""

from __future__ import annotations

import copy
import logging
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from launch.run.errors import BadInput
from launch.run.validation import suggestion
from launch.run.zero import check_zero

_READ_HERE = ("zero_optimization", "bf16", "fp16", "optimizer")
# launch.run.engine fills them in, and says what they must be.
_FROM_OTHER_SECTIONS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
# `deepspeed.initialize` reads them, not its DeepSpeedConfig.
_READ_BY_INITIALIZE = ("data_parallel_size", "sequence_parallel_size")


def check_deepspeed(section: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would refuse in every rank, and the keys that it would ignore.

    Where DeepSpeed is not installed, only the shape of what this project reads is checked.

    Raises:
        BadInput: one line that names the key and the rule.
    """
    for key in _READ_HERE:
        if key in section and not isinstance(section[key], dict):
            raise _no_mapping(f"deepspeed.{key}", section[key])
    check_zero(section.get("zero_optimization", {}).get("stage", 0))
    if find_spec("deepspeed") is None:
        return
    with _without_logging():
        known = _known_keys()
        for key in section:
            if key not in known:
                raise BadInput(f"deepspeed.{key}: unknown key{suggestion(key, sorted(known))}")
        if "optimizer" in section:
            _check_optimizer(section["optimizer"])
        _check_values({k: v for k, v in section.items() if k not in _FROM_OTHER_SECTIONS})
        _check_served(section)


def _check_served(section: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed takes and a run of this project would not get."""
    from deepspeed.accelerator import get_accelerator

    for key in ("tensor_parallel", "expert_parallel", "sequence_parallel_size"):
        if section.get(key) not in (None, {}, 1):
            axis = _AXES[key]
            raise BadInput(f"deepspeed.{key}: must be left out, set parallel.{axis} instead")
    for key in _MONITORS:
        if _enabled(section, key):
            raise BadInput(
                f"deepspeed.{key}.enabled=True: must be false, DeepSpeed would show the learning "
                "rate alone; section monitor writes OUTPUT/metrics.jsonl and TensorBoard, and "
                "monitor.sinks=[deepspeed] its tensorboard and csv_monitor"
            )
    # Some processors multiply in fp16; which of them, a recipe does not tell.
    device = get_accelerator().device_name()
    refused = device == "cpu" or not get_accelerator().is_fp16_supported()
    if refused and _enabled(section, "fp16"):
        raise BadInput(
            f"deepspeed.fp16.enabled=True: needs another device than this {device}; take bf16"
        )


_AXES = {
    "tensor_parallel": "tensor",
    "expert_parallel": "expert",
    "sequence_parallel_size": "context",
}
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


def _enabled(section: Mapping[str, Any], key: str) -> bool:
    values = section.get(key)
    return isinstance(values, dict) and bool(values.get("enabled"))


class _Recording(dict[str, Any]):
    """A dictionary that remembers which keys it was asked for, its copies included."""

    def __init__(self, values: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __copy__(self) -> _Recording:
        return _Recording(self, self.asked)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        # DeepSpeed asks `key in settings.keys()` as well.
        return self


def _known_keys() -> set[str]:
    """Every key that DeepSpeed reads of a configuration, learnt by letting it read one.

    Its constants do not tell them from the keys of its sections.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(_Recording({"train_micro_batch_size_per_gpu": 1}, asked))
    return asked | set(_READ_BY_INITIALIZE)


def _check_values(settings: dict[str, Any]) -> None:
    refused = _refusal(settings)
    if refused is None:
        return
    # The error seldom says which section it is about: the one that is refused so by itself.
    for key, value in settings.items():
        alone = _refusal({key: value})
        if alone is None or str(alone) != str(refused):
            continue
        if isinstance(alone, TypeError | AttributeError) and not isinstance(value, dict):
            raise _no_mapping(f"deepspeed.{key}", value) from None
        raise BadInput(_problem_line(alone, key)) from None
    raise BadInput(_problem_line(refused)) from None


def _refusal(settings: dict[str, Any]) -> Exception | None:
    """What DeepSpeed says of a configuration; None: nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        # It writes into what it is given.
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **copy.deepcopy(settings)})
    except Exception as error:  # each of its readers raises another kind
        return error
    return None


def _problem_line(error: Exception, *section: str) -> str:
    """One line of what DeepSpeed raised, about a section of the section where that is known."""
    path = ".".join(("deepspeed", *section))
    if not isinstance(error, ValidationError):
        return f"{path}: DeepSpeed refuses it: {str(error) or type(error).__name__}"
    problem = error.errors()[0]
    if problem["loc"][:1] == section:
        # One model reads all sections of that sort (tensorboard, wandb, …).
        path = "deepspeed"
    kind = _model_named(error.title)
    for part in problem["loc"]:
        fields = {} if kind is None else _fields(kind)
        path = f"{path}[{part}]" if isinstance(part, int) else f"{path}.{part}"
        if problem["type"] == "extra_forbidden" and part not in fields and fields:
            return f"{path}: unknown key{suggestion(str(part), fields)}"
        kind = fields.get(str(part))
    return f"{path}={problem['input']!r}: {problem['msg']}"


def _model_named(name: str) -> type[BaseModel] | None:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    found: list[type[BaseModel]] = [DeepSpeedConfigModel]
    for kind in found:
        if kind.__name__ == name:
            return kind
        found += kind.__subclasses__()
    return None


def _fields(kind: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """key -> the model of its value, where it has one."""
    fields = {}
    for name, field in kind.model_fields.items():
        options = typing.get_args(field.annotation) or (field.annotation,)
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        fields[field.alias or name] = models[0] if models else None
    return fields


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    keys = [constants.TYPE, constants.OPTIMIZER_PARAMS, constants.LEGACY_FUSION]
    for key in optimizer:
        if key not in keys:
            raise BadInput(f"deepspeed.optimizer.{key}: unknown key{suggestion(key, keys)}")
    given, params = optimizer.get(constants.TYPE), optimizer.get(constants.OPTIMIZER_PARAMS, {})
    # Its own in any case of letters, torch's exactly as written.
    own = isinstance(given, str) and given.lower() in DEEPSPEED_OPTIMIZERS
    of_torch = [n for n, k in vars(torch.optim).items() if isinstance(k, type) and n != "Optimizer"]
    if not own and given not in of_torch:
        known = [*DEEPSPEED_OPTIMIZERS, *of_torch]
        rule = "must be one of DeepSpeed's or torch.optim's optimizers"
        raise BadInput(f"deepspeed.optimizer.type={given!r}: {rule}{suggestion(str(given), known)}")
    if str(given).lower() == "muon":
        raise BadInput(
            f"deepspeed.optimizer.type={given!r}: must be another, the moments of Muon's matrices "
            "cannot be checked, saved or resumed here"
        )
    if not isinstance(params, dict):
        raise _no_mapping("deepspeed.optimizer.params", params)


def _no_mapping(path: str, value: object) -> BadInput:
    return BadInput(f"{path}={'null' if value is None else repr(value)}: must be a mapping of keys")


@contextmanager
def _without_logging() -> Iterator[None]:
    """Keep to itself what DeepSpeed logs: every rank will say it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
