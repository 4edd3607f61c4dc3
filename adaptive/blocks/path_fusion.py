"""PathFusion: one linear layer that joins SPRINT's two paths, restored and concatenated in thought.

Shape legend: T tokens, R kept tokens, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops.pack import combine
from parallel.linear import linear
from parallel.mesh import Mesh
from parallel.tensor import replicated

MaskToken = Literal["fixed", "learnt"]


class PathFusion(nn.Module):
    """`Linear(2D -> D)(concat[g restored ; f])` without restoring or concatenating anything.

    The linear layer is split by its two inputs. Every dropped place has the same g row, [MASK],
    whose product is computed once and joins the bias; kept places add
    `(g - [MASK]) · Wg`, so that half costs as many tokens as the middle had.

    Parameters: weight [D, 2D] (g first), bias [D], mask_token [D] (a buffer when fixed).

    Source: SPRINT, arXiv 2510.21986, section 3.
    """

    mask_token: Tensor

    def __init__(
        self, dim: int, *, mask_token: MaskToken = "fixed", mesh: Mesh | None = None
    ) -> None:
        super().__init__()
        self.mesh = Mesh.single() if mesh is None else mesh
        if mask_token not in get_args(MaskToken):
            raise ValueError(
                f"mask_token={mask_token!r}: must be one of {', '.join(get_args(MaskToken))}"
            )
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(dim, 2 * dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight)
        mask_D = torch.randn(dim) * 0.02
        if mask_token == "learnt":
            self.mask_token = nn.Parameter(mask_D)
        else:
            self.register_buffer("mask_token", mask_D)

    def forward(
        self,
        dense_TD: Tensor | None,
        sparse_RD: Tensor | None,
        *,
        indices_R: Tensor | None = None,
        kept_R: Tensor | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """Fuse the two paths.

        Args:
            dense_TD: f's output; None: [MASK] everywhere (then `tokens` says T).
            sparse_RD: g's output at the kept tokens; None: [MASK] everywhere.
            indices_R: int64 [R], where the kept tokens belong; None: R is T.
            kept_R: bool [R], False where path drop replaces g's output; None: nowhere.
            tokens: T.

        Returns:
            [T, D].
        """
        # Under sequence parallelism each rank has its own rows, and gradients are summed.
        weight, bias, mask_D = (
            replicated(tensor, self.mesh) for tensor in (self.weight, self.bias, self.mask_token)
        )
        from_sparse_DD, from_dense_DD = weight.split(self.dim, dim=1)
        masked_D = F.linear(mask_D, from_sparse_DD, bias)
        if dense_TD is None:
            both_D = F.linear(mask_D, from_dense_DD, masked_D)
            base_TD = both_D.expand(tokens or 0, -1).contiguous()
        else:
            base_TD = linear(dense_TD, from_dense_DD, masked_D)
        if sparse_RD is None:
            return base_TD
        update_RD = linear(sparse_RD - mask_D, from_sparse_DD)
        weights_R = None if kept_R is None else kept_R.to(update_RD.dtype)
        if indices_R is not None:
            return combine(base_TD, update_RD, indices_R, weights_R)
        return base_TD + (update_RD if weights_R is None else update_RD * weights_R[:, None])
