"""Matrix products of generation: few rows, the same weights a thousand times.

Shape legend: T tokens, I in, O out of all weights together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FUSED = 2**20
"""Elements up to which calls cost more than reading the weights: they are copied side by side."""
_PACKED_ROWS = 4
"""Rows from which oneDNN's order of the weights is read once where MKL reads them often."""

_packet: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_onednn: Any = None if _packet is None else _packet.default
_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class Product:
    """`x @ cat(weights).T + bias` for rows like those of a decode step.

    Small weights are copied, side by side and transposed. Large ones are the model's own for a
    row or two, and for more of them, in float32 on a CPU, a copy in oneDNN's order: at a width of
    1,024 and 4 to 16 rows it takes 0.5 to 0.65 of MKL's time (2 threads of a Xeon).

    Args:
        weights: [O_i, I] each.
        bias: [O] or None.
        rows: most rows of a usual step.
    """

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None = None, *, rows: int = 1):
        self._weights = [weight.detach() for weight in weights]
        self._bias = None if bias is None else bias.detach()
        self._columns: Tensor | None = None
        self._packed: Tensor | None = None
        first = self._weights[0]
        if sum(weight.numel() for weight in self._weights) <= _FUSED:
            self._columns = torch.cat(self._weights).t().contiguous()
        elif (
            rows >= _PACKED_ROWS
            and first.device.type == "cpu"
            and first.dtype == torch.float32
            and _reorder is not None
            and torch.backends.mkldnn.enabled
            and torch.backends.mkldnn.is_available()
        ):
            self._packed = _reorder(torch.cat(self._weights), rows)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, O]."""
        if self._columns is not None:
            if self._bias is None:
                return torch.mm(x_TI, self._columns)
            return torch.addmm(self._bias, x_TI, self._columns)
        if self._packed is not None and x_TI.shape[0] >= _PACKED_ROWS:
            out_TO: Tensor = _onednn(x_TI, self._packed, self._bias, "none", [], "")
            return out_TO
        parts = [F.linear(x_TI, weight) for weight in self._weights]
        out_TO = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return out_TO if self._bias is None else out_TO + self._bias

    def added(self, residual_TO: Tensor, x_TI: Tensor) -> Tensor:
        """`residual + x @ W.T`, [T, O]."""
        if self._columns is not None and self._bias is None:
            return torch.addmm(residual_TO, x_TI, self._columns)
        return residual_TO + self(x_TI)

    def part(self, x_TI: Tensor, *places: int) -> Tensor:
        """The same of some of the weights only, in their order."""
        sizes = [weight.shape[0] for weight in self._weights]
        starts = [sum(sizes[:place]) for place in places]
        parts = [F.linear(x_TI, self._weights[place]) for place in places]
        if self._bias is not None:
            parts = [
                part + self._bias[start : start + sizes[place]]
                for part, start, place in zip(parts, starts, places, strict=True)
            ]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
