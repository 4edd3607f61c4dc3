"""DeepSpeed's pickled shards, read without running what is in them.

A pickle may call anything. Torch's restricted unpickler builds tensors and plain data, and of
everything else only the classes listed here: what DeepSpeed itself puts into its shards.
"""

from __future__ import annotations

import importlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from launch.run.errors import BadInput

_ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Torch's own switches: the first rules over `weights_only=False`, which DeepSpeed passes.
_ONLY_DATA, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def problem_with_shard(path: Path) -> str | None:
    """Why a shard is not one that DeepSpeed wrote, from its table and pickle alone; None: it is.

    Reads no tensor and runs nothing. What it may miss, `only_data` refuses.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                return "is compressed, which torch.save never does"
        foreign = set(get_unsafe_globals_in_checkpoint(path)) - set(_ALLOWED)
    except Exception as error:  # a disassembler meets anything in a damaged file
        return f"cannot be read ({type(error).__name__})"
    return f"holds {min(foreign)}, which is not data" if foreign else None


@contextmanager
def only_data(source: Path) -> Iterator[None]:
    """Whatever reads a pickle by `torch.load` inside gets data or raises, DeepSpeed too.

    Args:
        source: what is read, for the message.

    Raises:
        BadInput: a pickle there holds something else.
    """
    before = {name: os.environ.pop(name, None) for name in (_ONLY_DATA, _ANYTHING)}
    os.environ[_ONLY_DATA] = "1"
    try:
        with safe_globals([_class(name) for name in _ALLOWED]):
            yield
    except pickle.UnpicklingError as error:
        said = str(error).strip() or "a pickle"
        raise BadInput(f"{source}: holds more than data, nothing of it was run: {said}") from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
