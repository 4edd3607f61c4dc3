"""ranking: the highest scores of every row, and entries grouped by unit, without asking the host.

Shape legend: B rows (sequences), S columns (places), K kept a row, N entries, U units (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.ops.backend import choose, refuses_triton, register


def highest_columns(scores_BS: Tensor, count: int) -> Tensor:
    """The columns of the `count` highest scores of every row, in ascending order.

    Exactly `count`, ties broken by the lower column. NaN ranks above every number, as in
    `torch.sort`, and -0 equals 0. Shapes depend on `count` alone; the host is not synchronised.

    Args:
        scores_BS: float [B, S].
        count: 1 <= count <= S.

    Returns:
        int64 [B, count].
    """
    return choose("highest_columns", scores_BS).function(scores_BS, count)


def order_by_unit(units_N: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """Group entries by their unit, in their order within it, and count them.

    Args:
        units_N: int64 [N], values 0 … num_units - 1.
        num_units: U.

    Returns:
        order int64 [N] (`units[order]` ascends) and counts int64 [U]. The host is not
        synchronised, as `torch.bincount` would.
    """
    return choose("order_by_unit", units_N).function(units_N, num_units)


def count_by_unit(units: Tensor, num_units: int) -> Tensor:
    """int64 [U]: how many entries have each unit, without asking the host.

    `torch.bincount` reads the largest entry back on a GPU.
    """
    counts_U = torch.zeros(num_units, dtype=torch.int64, device=units.device)
    return counts_U.scatter_add_(0, units.flatten(), torch.ones_like(units).flatten())


def _highest_by_sort(scores_BS: Tensor, count: int) -> Tensor:
    best_first_BS = scores_BS.sort(dim=1, descending=True, stable=True).indices
    return best_first_BS[:, :count].sort(dim=1).values


def _order_by_sort(units_N: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    return units_N.argsort(stable=True), count_by_unit(units_N, num_units)


def _highest_kernel(scores_BS: Tensor, count: int) -> Tensor:
    # A row is one program's work, in passes that wait for each other: of few long rows a sort by
    # the whole device is expected to be faster (not measured).
    if scores_BS.shape[0] < 32 and scores_BS.shape[1] > 16384:
        return _highest_by_sort(scores_BS, count)
    from adaptive.ops.kernels.routing import highest_columns as kernel

    return kernel(scores_BS, count)


def _order_kernel(units_N: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    from adaptive.ops.kernels.routing import MOST_UNITS
    from adaptive.ops.kernels.routing import order_by_unit as kernel

    if num_units > MOST_UNITS:
        return _order_by_sort(units_N, num_units)
    return kernel(units_N, num_units)


def _refuses_order(units_N: Tensor) -> str | None:
    # The kernels' usual question is about floats of the same device.
    return refuses_triton(torch.empty(0, device=units_N.device))


register("highest_columns", "reference", _highest_by_sort)
register("highest_columns", "triton", _highest_kernel, refuses_triton)
register("order_by_unit", "reference", _order_by_sort)
register("order_by_unit", "triton", _order_kernel, _refuses_order)
