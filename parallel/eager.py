"""Where an autograd Function of our own may stand in for torch's operators."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def plain_eager() -> bool:
    """Whether nothing but autograd looks at the operators that run.

    False under compilation, autocast, transforms of torch.func and forward-mode differentiation,
    all of which know torch's operators and not a Function.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
