"""From a trained decoder to one whose feed-forwards are rows of learners.

1. `convert` cuts every feed-forward into learners. A SwiGLU is a sum over its hidden units, so the
   whole row computes what the feed-forward did, exactly; units that matter most on the data given
   come first.
2. `distil` trains the learners to imitate the feed-forward with the first 1, 2, … of them.
3. `train_gates` teaches every gate the least count of learners that is good enough, by labels made
   from the learners' errors.

Then the whole model trains on its task with the budget and diversity losses of
`AdaptiveComputationModule`. (The paper starts learners at random; stages are otherwise its own.)

Source: Adaptive Computation Modules, arXiv 2312.10193, section 3.2.

Shape legend: T tokens, D width, F feed-forward width, N learners, K = N + 1 counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.adaptive_computation import (
    AdaptiveComputationConfig,
    AdaptiveComputationModule,
)
from adaptive.blocks.feed_forward import SwiGLU
from adaptive.models.decoder.model import Decoder
from adaptive.routing.layout import TokenLayout


class _Seen(NamedTuple):
    """What one feed-forward of the teacher got and gave, detached."""

    name: str
    x: Tensor
    layout: TokenLayout
    update: Tensor


def convert(
    teacher: Decoder, config: AdaptiveComputationConfig, batches: Iterable[Tensor]
) -> Decoder:
    """A decoder that computes what `teacher` does while every token runs all learners.

    Hidden units are ordered by how much they add to the update on the batches (`unit_orders`).

    Args:
        teacher: a dense decoder on one rank, in evaluation mode.
        config: of the rows of learners.
        batches: token ids int64 [B, S].

    Returns:
        A new decoder; its gates are as drawn, its weights otherwise the teacher's.

    Raises:
        ValueError: if the teacher routes tokens or has other feed-forwards where rows are to be, or
            there is no batch.
    """
    order = unit_orders(teacher, batches)
    student = Decoder(teacher.config.with_method(config))
    student = student.to(teacher.embedding.weight)
    weights = teacher.state_dict()
    for name, module in rows_of_learners(student).items():
        replaced = teacher.get_submodule(name)
        if not isinstance(replaced, SwiGLU):
            raise ValueError(f"{name}: is a {type(replaced).__name__}, must be a SwiGLU")
        _cut(weights, name, order[name], len(module.learners))
        for key, value in module.state_dict().items():
            if not key.startswith("learners."):
                weights[f"{name}.{key}"] = value
    student.load_state_dict(weights)
    return student.eval()


def rows_of_learners(model: nn.Module) -> dict[str, AdaptiveComputationModule]:
    """The rows of learners of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptiveComputationModule)}


def distil(
    teacher: Decoder,
    student: Decoder,
    batches: Iterable[Tensor],
    *,
    learning_rate: float = 1e-3,
) -> Iterator[float]:
    """Train learners to imitate the teacher's feed-forwards, all layers at once and on their own.

    The loss is the mean over layers and over counts 1…N of the squared error of the first learners'
    sum, relative to the mean square of the teacher's update. Nothing but learners changes. One
    AdamW step a batch; yields its loss.
    """
    modules = rows_of_learners(student)
    parameters = [p for m in modules.values() for p in m.learners.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for ids_BS in batches:
        losses = []
        for seen in _observe(teacher, list(modules), ids_BS):
            prefixes_NTD = modules[seen.name].prefix_updates(seen.x, seen.layout)
            scale = seen.update.square().mean().clamp(min=1e-12)
            losses.append((prefixes_NTD - seen.update).square().mean() / scale)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def train_gates(
    teacher: Decoder,
    student: Decoder,
    batches: Iterable[Tensor],
    *,
    threshold: float = 0.9,
    learning_rate: float = 1e-3,
) -> Iterator[tuple[float, float]]:
    """Teach gates the counts that `gate_labels` finds. Nothing but gates changes.

    One AdamW step a batch; yields the cross-entropy and the mean cost of the labels.
    """
    modules = rows_of_learners(student)
    parameters = [p for m in modules.values() for p in m.gate.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for ids_BS in batches:
        losses, costs = [], []
        for seen in _observe(teacher, list(modules), ids_BS):
            module = modules[seen.name]
            with torch.no_grad():
                prefixes_NTD = module.prefix_updates(seen.x, seen.layout)
                labels_T = gate_labels(prefixes_NTD, seen.update, threshold=threshold)
            losses.append(F.cross_entropy(module.gate(seen.x), labels_T))
            costs.append(labels_T.float().mean() / len(module.learners))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), torch.stack(costs).mean().item()


def gate_labels(prefixes_NTD: Tensor, target_TD: Tensor, *, threshold: float) -> Tensor:
    """int64 [T]: the least count of learners behind which one more is not worth it.

    With d_k the error of the first k learners (d_0: of none, the length of the target), count k is
    enough when `d_{k+1} / d_k >= threshold`: the next learner takes away less than its share. Where
    every next learner is worth it, all N run.

    Args:
        prefixes_NTD: updates by the first 1…N learners.
        target_TD: the update to imitate.
        threshold: in (0, 1]; lower thresholds give fewer learners.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: must be in (0, 1]")
    errors_KT = torch.cat([target_TD[None], prefixes_NTD - target_TD]).norm(dim=-1)
    # Without an error left, nothing more is worth it.
    ratios_NT = errors_KT[1:] / errors_KT[:-1].clamp(min=torch.finfo(errors_KT.dtype).tiny)
    enough_NT = (ratios_NT >= threshold) | (errors_KT[:-1] == 0)
    last_1T = torch.ones_like(enough_NT[:1])
    return torch.cat([enough_NT, last_1T]).int().argmax(0)


@torch.no_grad()
def unit_orders(teacher: Decoder, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """For every SwiGLU of the teacher, its hidden units from the most to the least important.

    The mean size of a unit's activation on the batches, times the length of its column of the
    output projection: how much it adds to the update.

    Raises:
        ValueError: if layers of the teacher do not see every token, or there is no batch.
    """
    for method in teacher.config.methods:
        if not method.sees_every_token:
            raise ValueError(
                f"{method.name}: must be null, a layer is judged by what every token gets"
            )
    units = {n: m for n, m in teacher.named_modules() if isinstance(m, SwiGLU)}
    importance = {name: torch.zeros(()) for name in units}
    for ids_BS in batches:
        for seen in _observe(teacher, list(units), ids_BS):
            unit = units[seen.name]
            hidden_TF = F.silu(unit.gate(seen.x)) * unit.up(seen.x)
            columns_F = unit.down.weight.norm(dim=0)  # type: ignore[operator]
            importance[seen.name] = importance[seen.name] + hidden_TF.abs().mean(0) * columns_F
    if any(values.dim() == 0 for values in importance.values()):
        raise ValueError("batches: must be at least one, to judge hidden units on")
    return {
        name: values.argsort(descending=True, stable=True) for name, values in importance.items()
    }


def _cut(weights: dict[str, Tensor], name: str, order_F: Tensor, learners: int) -> None:
    """Replace the weights of one SwiGLU by those of its learners."""
    gate, up, down = (weights.pop(f"{name}.{part}.weight") for part in ("gate", "up", "down"))
    for index, units in enumerate(order_F.chunk(learners)):
        weights[f"{name}.learners.{index}.gate.weight"] = gate[units].clone()
        weights[f"{name}.learners.{index}.up.weight"] = up[units].clone()
        weights[f"{name}.learners.{index}.down.weight"] = down[:, units].clone()


def _observe(teacher: Decoder, names: list[str], ids_BS: Tensor) -> list[_Seen]:
    """Run the teacher, and catch what these feed-forwards got and gave."""
    seen: list[_Seen] = []

    def catch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, update_TD: Tensor) -> None:
            seen.append(_Seen(name, args[0].detach(), kwargs["layout"], update_TD.detach()))

        return hook

    handles = [
        teacher.get_submodule(name).register_forward_hook(catch(name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            teacher.hidden_states(ids_BS)
    finally:
        for handle in handles:
            handle.remove()
    return seen
