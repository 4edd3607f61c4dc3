"""Choices made elsewhere: by a search over paths, by a test, or while text was sampled.

    with force_choices({module: choice_T for module in …}):
        logits = model(input_ids)

Router replay: what chose while a text was sampled chooses again while it is trained on, so that the
policy that is improved is the one that spoke. Weights and gradients come from the routers as they
are now.

    with RoutingTape(model) as tape, torch.no_grad():
        model(input_ids)
    save_file(choices_of(tape.records), "choices.safetensors")
    …
    with replay(model, load_file("choices.safetensors")):
        logits = model(input_ids)

Source: Rollout Routing Replay, arXiv 2510.11370 (experts); depth is taken alike here.

Shape legend: T tokens, K choices a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adaptive.routing.tape import RoutingRecord


@contextmanager
def force_choices(choices: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, the given modules choose as told; other modules choose for themselves.

    Args:
        choices: of each module, int64 [T] (experts: [T, K]), what this rank's tokens choose, in
            order: one for each valid token, or one for each token of the call, padding included.
    """
    before = {module: getattr(module, "told", None) for module in choices}
    try:
        for module, choice in choices.items():
            module.told = choice
        yield
    finally:
        for module, choice_before in before.items():
            module.told = choice_before  # type: ignore[assignment]


def forced_choice(module: nn.Module, tokens: int, valid_T: Tensor | None = None) -> Tensor | None:
    """What `module` was told to choose, int64 [tokens] or [tokens, K]; None when nobody did.

    Args:
        module: that asks.
        tokens: that it chooses for.
        valid_T: bool, of the tokens of the call, where padding among them is not chosen for.

    Raises:
        ValueError: if the choices are not one a token.
    """
    choice_T = getattr(module, "told", None)
    if choice_T is None:
        return None
    assert isinstance(choice_T, Tensor)
    if valid_T is not None and choice_T.shape[0] == valid_T.shape[0]:
        choice_T = choice_T[valid_T]
    if choice_T.shape[0] != tokens:
        raise ValueError(f"forced choices of shape {list(choice_T.shape)}: must be [{tokens}]")
    return choice_T


def choices_of(records: Sequence[RoutingRecord]) -> dict[str, Tensor]:
    """What each module of one forward chose, as `replay` takes it; its names and tensors can be
    saved as safetensors.

    Args:
        records: of a `RoutingTape(model)`.

    Returns:
        module name -> int64 [T], 1 where a token took part; or [T, K], its experts, the number of
        all for none; or [T, 1], its path.

    Raises:
        ValueError: a module that ran twice, or whose record does not say what was chosen.
    """
    found: dict[str, Tensor] = {}
    for record in records:
        if record.name in found:
            raise ValueError(f"{record.name}: ran twice; replay takes the choices of one forward")
        if record.chosen is None:
            raise ValueError(f"{record.name}: its records do not say what was chosen")
        found[record.name] = record.chosen.long().clamp(min=0)  # -1: padding
    return found


@contextmanager
def replay(model: nn.Module, choices: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the routers of `model` choose as they, or another program, did before.

    Args:
        model: whose module names those of `choices` are.
        choices: see `choices_of`; modules that are not named choose for themselves.

    Raises:
        ValueError: a name that the model does not have, a module that cannot be told, or a choice
            that it does not have.
    """
    forced: dict[nn.Module, Tensor] = {}
    modules = dict(model.named_modules())
    for name, choice in choices.items():
        module = modules.get(name)
        count = getattr(module, "replayed_choices", 0)
        if module is None or not count:
            routed = ", ".join(n for n, m in modules.items() if getattr(m, "replayed_choices", 0))
            raise ValueError(f"{name}: takes no replayed choices; must be one of {routed}")
        if choice.dtype.is_floating_point or choice.is_complex():
            raise ValueError(f"{name}: choices of {choice.dtype}: must be integers")
        if choice.numel() and not 0 <= int(choice.min()) <= int(choice.max()) < count:
            raise ValueError(
                f"{name}: choices from {int(choice.min())} to {int(choice.max())}: "
                f"must be from 0 to {count - 1}"
            )
        parameter = next(iter(model.parameters()), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        forced[module] = choice.long().to(device)
    with force_choices(forced):
        yield
