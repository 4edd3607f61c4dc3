"""calibrate: thresholds at which predictors execute the share of tokens that was trained.

A predictor trained on a share of 12.5% seldom says "more likely than not", so that the paper's
threshold (a probability of one half) executes fewer tokens than training did. The quantile of its
logits over some text executes as many.

Shape legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.blocks.protocol import RoutedBlock
from adaptive.routing.tape import RoutingTape
from parallel.mesh import Mesh
from parallel.rows import all_gather_rows


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[Any], object] | None = None
) -> dict[str, float]:
    """Set the `threshold` of routed blocks to the (1 - capacity) quantile of their causal logits.

    Layers are calibrated from the first to the last, each on hidden states that the thresholds of
    those before it gave: what sampling will see. That is one pass over the batches for each routed
    layer.

    Args:
        model: whose blocks with something that `decides` are calibrated (MixtureOfDepths that
            choose causally). It is evaluated, and its mode restored.
        batches: representative inputs, gone through several times: a list, not a generator. Every
            rank must be given the same ones, or thresholds would differ.
        forward: what to do with a batch; by default `model(batch)`.

    Returns:
        The threshold of each calibrated layer, by name, in the order of the model's modules.

    Raises:
        ValueError: if there are no batches, or they do not reach a layer.

    Source: Mixture-of-Depths, arXiv 2404.02258, section 3.5, decides by a probability of one half.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches=[]: must have at least one")
    forward = model if forward is None else forward
    routed: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedBlock) and module.decides is not None
    }
    training = model.training
    model.eval()
    try:
        for name, module in routed.items():
            logits = torch.cat([_causal_logits(module, forward, batch) for batch in batches])
            logits = _of_all_shards(logits, module.mesh)
            if not logits.numel():
                raise ValueError(f"{name}: no batch reaches it")
            module.threshold.fill_(_upper_quantile(logits, module.capacity))
    finally:
        model.train(training)
    return {name: float(module.threshold) for name, module in routed.items()}


def _causal_logits(module: Any, forward: Callable[[Any], object], batch: Any) -> Tensor:
    """What decides for each valid token of a batch, float [T]."""
    logits: list[Tensor] = []
    masks: list[Tensor | None] = []
    with ExitStack() as hooks:
        hooks.callback(
            module.register_forward_pre_hook(
                lambda _, __, kwargs: masks.append(kwargs.get("token_mask")), with_kwargs=True
            ).remove
        )
        hooks.callback(
            module.decides.register_forward_hook(
                lambda _, __, out: logits.append(out.flatten())
            ).remove
        )
        hooks.enter_context(RoutingTape())
        forward(batch)
    kept = [
        found if mask is None else found[mask.flatten().bool()]
        for found, mask in zip(logits, masks, strict=True)
    ]
    return torch.cat(kept) if kept else module.threshold.new_zeros(0)


def _of_all_shards(logits_T: Tensor, mesh: Mesh) -> Tensor:
    """The logits of whole sequences, where several ranks hold parts of each."""
    groups = [mesh.tensor_group] if mesh.sequence_parallel else []
    for group in [*groups, mesh.context_group]:
        if group is not None:
            ranks = dist.get_world_size(group)
            count = logits_T.new_full((1,), logits_T.shape[0], dtype=torch.int64)
            sizes = tuple(all_gather_rows(count, group, (1,) * ranks).tolist())
            logits_T = all_gather_rows(logits_T, group, sizes)
    return logits_T


def _upper_quantile(logits_T: Tensor, share: float) -> Tensor:
    """A threshold that `share` of the logits exceed: halfway between two of them."""
    falling_T = logits_T.sort(descending=True).values
    above = min(max(round(share * len(falling_T)), 0), len(falling_T))
    if above == 0:
        return falling_T[0]
    if above == len(falling_T):
        return falling_T[-1] - 1
    return (falling_T[above - 1] + falling_T[above]) / 2
