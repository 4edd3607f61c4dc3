"""Width choices: scores of experts to an Assignment.

Shape legend: T tokens, E experts, K choices a token, G groups of experts, C tokens an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.routing.assignment import Assignment
from adaptive.routing.hyperspherical import Gate


@dataclass(frozen=True)
class ExpertGroups:
    """Group-limited choice: a token's experts come from its best `chosen` of `total` groups.

    Experts are divided into consecutive groups of equal size (those of one machine, say), so a
    token travels to `chosen` groups at most.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (node-limited routing).
    """

    total: int
    chosen: int

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"groups={self.total}: must be at least 1")
        if not 1 <= self.chosen <= self.total:
            raise ValueError(f"chosen groups={self.chosen}: must be between 1 and {self.total}")

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError where these groups do not fit the experts."""
        if num_experts % self.total:
            raise ValueError(f"groups={self.total}: must divide num_experts={num_experts}")
        reachable = num_experts // self.total * self.chosen
        if top_k > reachable:
            raise ValueError(
                f"top_k={top_k}: must not exceed the {reachable} experts of {self.chosen} groups"
            )

    def limit(self, scores_TE: Tensor, top_k: int) -> Tensor:
        """`scores_TE` with -inf outside each token's best groups.

        A group counts with the sum of its best `top_k / chosen` scores.
        """
        scores_TGe = scores_TE.unflatten(1, (self.total, -1))
        counted = min(max(1, top_k // self.chosen), scores_TGe.shape[-1])
        group_TG = scores_TGe.topk(counted, dim=-1).values.sum(-1)
        best_TK = best_of(group_TG, self.chosen)
        outside_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best_TK, False)
        return scores_TGe.masked_fill(outside_TG[..., None], -torch.inf).flatten(1)


def gate_scores(logits_TE: Tensor, gate: Gate) -> Tensor:
    """Router logits to scores, at least float32: softmax over experts, or sigmoid of each."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    return logits_TE.to(wide).sigmoid() if gate == "sigmoid" else logits_TE.softmax(-1, dtype=wide)


def token_choice(
    scores_TE: Tensor,
    top_k: int,
    *,
    bias_E: Tensor | None = None,
    groups: ExpertGroups | None = None,
    valid_T: Tensor | None = None,
    capacity_factor: float | None = None,
    num_idle: int = 0,
) -> Assignment:
    """Send every token to the `top_k` experts with the highest scores, ties to the lower expert.

    Args:
        scores_TE: float [T, E], after the gate. Only their order is used.
        top_k: K, 1 <= K <= E.
        bias_E: added to the scores for choosing only (loss-free balancing).
        groups: limits which experts a token may choose together.
        valid_T: bool [T], False at padding, which goes nowhere and takes no capacity.
        capacity_factor: None: dropless. Otherwise the most tokens that an expert takes, see
            `capacity_of`.
        num_idle: the last `num_idle` experts do nothing: a token may choose them, no pair of
            theirs is taken, and they have no place in `tokens_per_expert`.

    Returns:
        Assignment without weights.
    """
    tokens, num_experts = scores_TE.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be between 1 and num_experts={num_experts}")
    scores_TE = scores_TE.detach()
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    if groups is not None:
        scores_TE = groups.limit(scores_TE, top_k)
    expert_index_TK = best_of(scores_TE, top_k)
    num_experts -= num_idle
    taken_TK = None
    if num_idle:
        taken_TK = expert_index_TK < num_experts
    if valid_T is not None:
        expert_index_TK = expert_index_TK.masked_fill(~valid_T[:, None], num_experts + num_idle)
        taken_TK = valid_T[:, None] if taken_TK is None else taken_TK & valid_T[:, None]
    capacity = None
    if capacity_factor is not None:
        valid_tokens = tokens if valid_T is None else valid_T.sum()
        capacity = capacity_of(capacity_factor, valid_tokens, num_experts, top_k)
    return Assignment.from_choices(
        expert_index_TK, num_experts, capacity=capacity, taken_TK=taken_TK
    )


def told_choice(
    expert_index_TK: Tensor,
    top_k: int,
    num_experts: int,
    *,
    valid_T: Tensor | None = None,
    num_idle: int = 0,
) -> Assignment:
    """The experts that `forced_choice` gave, from `num_experts` on an idle one or none.

    Raises:
        ValueError: unless there are `top_k` a token.
    """
    if expert_index_TK.shape[1:] != (top_k,):
        shape = list(expert_index_TK.shape)
        raise ValueError(f"forced choices of shape {shape}: must be [tokens, {top_k}]")
    if valid_T is not None:
        expert_index_TK = expert_index_TK.masked_fill(~valid_T[:, None], num_experts + num_idle)
    return Assignment.from_choices(
        expert_index_TK, num_experts, taken_TK=expert_index_TK < num_experts
    )


def capacity_of(
    capacity_factor: float, tokens: int | Tensor, num_experts: int, top_k: int
) -> int | Tensor | None:
    """Most pairs that one expert takes: `top_k * floor(factor * ceil(tokens / num_experts))`.

    A positive factor is that ratio to an even load. 0 takes what is needed, so nothing is dropped.
    A negative factor takes what is needed up to the capacity of its absolute value: nothing is
    padded to a capacity here, so it takes the same pairs as the positive one.

    Args:
        capacity_factor: ratio to an even load, see above.
        tokens: valid tokens of this forward on this rank (a tensor stays on its device).

    Returns:
        The capacity, or None where nothing may be dropped.

    Source: Tutel, arXiv 2206.03382, section 4.1 (dynamic capacity factor).
    """
    if capacity_factor == 0:
        return None
    share = -(-tokens // num_experts)
    if isinstance(share, int):
        return top_k * int(abs(capacity_factor) * share)
    return top_k * (share.double() * abs(capacity_factor)).long()


def check_expert_choice(
    capacity_factor: float | None, groups: ExpertGroups | None, bias_rate: float
) -> None:
    """Raise ValueError unless a block's options go with `experts_choose`."""
    if capacity_factor is None or capacity_factor <= 0:
        raise ValueError(f"capacity_factor={capacity_factor}: choice=expert needs a positive one")
    if groups is not None or bias_rate:
        raise ValueError("choice=expert: its load is even, so groups and bias_rate do not apply")


def experts_choose(
    scores_TE: Tensor, capacity_factor: float, *, top_k: int = 1, valid_T: Tensor | None = None
) -> Assignment:
    """Let every expert take the tokens that score highest for it. **Not causal.**

    Every expert takes C = round(factor * top_k * tokens / experts) tokens, ties to the earlier
    one: the load is even by construction. Whether a token is taken depends on the tokens after
    it, so a language model trained this way cannot be sampled token by token.

    Args:
        scores_TE: float [T, E]. Only the order within an expert is used.
        capacity_factor: ratio of C to `top_k` experts a token; must be positive.
        top_k: mean number of experts a token when the factor is 1.
        valid_T: bool [T], False at padding, which is never taken. Synchronises with the host.

    Returns:
        Assignment whose K is E: column e says whether expert e took the token.

    Source: Expert Choice, arXiv 2202.09368, section 3.2.
    """
    tokens, num_experts = scores_TE.shape
    if capacity_factor <= 0:
        raise ValueError(f"capacity_factor={capacity_factor}: expert choice needs a positive one")
    scores_TE = scores_TE.detach()
    valid_tokens = tokens if valid_T is None else int(valid_T.sum())
    if valid_T is not None:
        scores_TE = scores_TE.masked_fill(~valid_T[:, None], -torch.inf)
    capacity = math.floor(capacity_factor * top_k * valid_tokens / num_experts + 0.5)
    capacity = min(max(capacity, 1), valid_tokens)
    order_ET = scores_TE.t().sort(dim=1, descending=True, stable=True).indices
    taken_EC = order_ET[:, :capacity].sort(dim=1).values
    expert_E = torch.arange(num_experts, device=scores_TE.device)
    pairs = (taken_EC * num_experts + expert_E[:, None]).flatten()
    expert_index_TE = torch.full_like(scores_TE, num_experts, dtype=torch.long)
    expert_index_TE.view(-1)[pairs] = expert_E.repeat_interleave(capacity)
    load_E = torch.full_like(expert_E, capacity)
    return Assignment(expert_index_TE, None, pairs, load_E, load_E)


def best_of(scores_TE: Tensor, count: int) -> Tensor:
    """int64 [T, count]: the columns of the highest scores, falling, ties to the lower column.

    `topk` leaves the order of ties open, and with it whether two devices agree.
    """
    if count > 4:
        return scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = [scores_TE.argmax(dim=1)]
    for _ in range(count - 1):
        scores_TE = scores_TE.scatter(1, chosen[-1][:, None], -torch.inf)
        chosen.append(scores_TE.argmax(dim=1))
    return torch.stack(chosen, dim=1)
