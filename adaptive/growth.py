"""Growth of a TokenFormer: more parameter tokens, the same function, the same optimizer state.

    grow(model, tokens=1024, ffn_tokens=4096, optimizer=optimizer)

New keys are zero and every layer keeps the scale it was born with, so the outputs do not change;
Adam's moments of old tokens are kept and those of new ones start at zero. Checkpoints of sharded
runs are grown by `launch/grow.py`.

Source: TokenFormer, arXiv 2410.23168, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.blocks.pattention import Pattention, PattentionFeedForward, check_growable
from parallel.tensor import check_divides


@dataclass(frozen=True)
class Growth:
    """What `grow` did.

    Attributes:
        layers: by module name, the parameter tokens before and after.
        parameters_before, parameters_after: of the whole model, on this rank.
        old_rows: by parameter name, the rows that were there before; the rest are new.
    """

    layers: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int
    old_rows: dict[str, int]


def grow(
    model: nn.Module,
    *,
    tokens: int | None = None,
    ffn_tokens: int | None = None,
    output_tokens: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Growth:
    """Append parameter tokens to every Pattention of a model; its outputs stay the same.

    Nothing is changed unless everything can be. The parameters that grow are replaced, in the
    model and in `optimizer`. `model.config`, where it is a DecoderConfig, follows.

    Args:
        model: any module with Pattention inside.
        tokens: parameter tokens that projections and single layers shall have; None: as now.
        ffn_tokens: those that feed-forwards (`PattentionFeedForward`) shall have; None: as now.
        output_tokens: those of output projections; None: `tokens`.
        optimizer: a torch optimizer of the model, on one rank or with whole parameters on each.

    Returns:
        What grew.

    Raises:
        ValueError: if a size would shrink, nothing would grow, a tensor degree does not divide
            what is added, a layer's activation cannot grow, or the optimizer is a sharded one.
    """
    wanted = {"tokens": tokens, "ffn_tokens": ffn_tokens, "output_tokens": output_tokens or tokens}
    before = sum(p.numel() for p in model.parameters())
    plan = list(_plan(model, wanted))
    if not plan:
        given = ", ".join(f"{name}={size}" for name, size in wanted.items() if size is not None)
        raise ValueError(f"{given or 'sizes'}: must add parameter tokens to some layer")
    if optimizer is not None:
        _check_optimizer(optimizer, plan)
    layers, old_rows = {}, {}
    for name, layer, size in plan:
        layers[name] = (layer.num_tokens, size)
        old = dict(layer.named_parameters(recurse=False))
        layer.grow(size - layer.num_tokens)
        for part, parameter in layer.named_parameters(recurse=False):
            old_rows[f"{name}.{part}" if name else part] = old[part].shape[0]
            if optimizer is not None:
                _replace(optimizer, old[part], parameter)
    _follow(model, wanted)
    after = sum(p.numel() for p in model.parameters())
    return Growth(layers, before, after, old_rows)


def grown_moments(
    moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Whole moments of a model before its growth, as those of the model after it.

    Args:
        moments: by parameter name, before.
        parameters: by name, after; only their shapes are read.

    Returns:
        Old rows as they were, new rows zero; others unchanged.

    Raises:
        ValueError: for a parameter that growth cannot have changed like that.
    """
    return {name: padded(moment, parameters[name].shape, name) for name, moment in moments.items()}


def padded(old: Tensor, shape: torch.Size | tuple[int, ...], name: str) -> Tensor:
    """`old` with rows of zeros appended until it has `shape`."""
    if old.shape[1:] != tuple(shape[1:]) or (old.dim() and old.shape[0] > shape[0]):
        raise ValueError(f"{name} of shape {list(old.shape)}: cannot grow into {list(shape)}")
    if old.shape == shape:
        return old
    return torch.cat([old, old.new_zeros(shape[0] - old.shape[0], *old.shape[1:])])


def _plan(
    model: nn.Module, wanted: Mapping[str, int | None]
) -> Iterator[tuple[str, Pattention, int]]:
    """(name, layer, tokens it shall have) of every layer that grows."""
    found = False
    for name, layer in model.named_modules():
        if not isinstance(layer, Pattention):
            continue
        found = True
        kind = "tokens"
        if isinstance(layer, PattentionFeedForward):
            kind = "ffn_tokens"
        elif layer.role == "output":
            kind = "output_tokens"
        size = wanted[kind]
        if size is None or size == layer.num_tokens:
            continue
        if size < layer.num_tokens:
            raise ValueError(
                f"{kind}={size}: must be at least {layer.num_tokens}, "
                f"what {name or 'the layer'} has; layers only grow"
            )
        check_growable(layer.activation)
        if layer.split == "tokens":
            check_divides(kind, size, layer.mesh)
        yield name, layer, size
    if not found:
        raise ValueError(f"{type(model).__name__}: has no Pattention that could grow")


def _follow(model: nn.Module, wanted: Mapping[str, int | None]) -> None:
    """Write the new sizes into the model's configuration, where it has one that names them."""
    config: Any = getattr(model, "config", None)
    pattention = getattr(config, "pattention", None)
    if not is_dataclass(config) or isinstance(config, type) or pattention is None:
        return
    model.config = replace(config, pattention=grown_config(pattention, **wanted))  # type: ignore[assignment]


def grown_config(
    pattention: Any,
    *,
    tokens: int | None = None,
    ffn_tokens: int | None = None,
    output_tokens: int | None = None,
) -> Any:
    """A PattentionConfig after growth. Sizes as in `grow`."""
    new_tokens = pattention.tokens if tokens is None else tokens
    outputs = output_tokens or tokens or pattention.output_tokens or pattention.tokens
    return replace(
        pattention,
        tokens=new_tokens,
        ffn_tokens=pattention.ffn_tokens if ffn_tokens is None else ffn_tokens,
        output_tokens=None if outputs == new_tokens else outputs,
    )


def _check_optimizer(
    optimizer: torch.optim.Optimizer, plan: list[tuple[str, Pattention, int]]
) -> None:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer, _ in plan:
        for part, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in known:
                raise ValueError(
                    f"optimizer: does not hold {name}.{part} itself (a sharded optimizer?); "
                    "grow its checkpoint with launch/grow.py"
                )
            for key, value in optimizer.state.get(parameter, {}).items():
                whole = isinstance(value, Tensor) and value.numel() > 1
                if whole and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer: {type(optimizer).__name__} keeps {key} {list(value.shape)} "
                        f"for {name}.{part} {list(parameter.shape)}: must keep a number an "
                        "element, as Adam and SGD do"
                    )


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` where `old` was; per-element state gets zeros for the new rows."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    optimizer.state[new] = {
        key: padded(value, new.shape, key)
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }
