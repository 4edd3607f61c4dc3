"""Skip layers whose executing tokens a test chooses, and the dense formula for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive import SkipLayer, TokenLayout
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.routing.gumbel import GumbelSchedule

D = 16
TEMPERATURE = 0.7


class CausalMean(nn.Module):
    """A user's own [B, S, D] block."""

    def __init__(self, dim: int = D) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        count = torch.arange(1, x_BSD.shape[1] + 1, dtype=x_BSD.dtype)[:, None]
        return x_BSD + torch.tanh(self.out(x_BSD.cumsum(1) / count))


def decoder_layer() -> DecoderLayer:
    make = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
    attention = Attention(D, 2, num_kv_heads=1, make_input=make, make_output=make)
    ffn = SwiGLU(D, 24, make_input=make, make_output=make)
    return DecoderLayer(RMSNorm(D), attention, RMSNorm(D), ffn)


def skipping(block: nn.Module | None = None, **options: Any) -> SkipLayer:
    """A layer whose router reads channel 0 of the normed input, so that tests choose who skips."""
    torch.manual_seed(0)
    options = {"schedule": GumbelSchedule(temperature=TEMPERATURE), **options}
    layer = SkipLayer(decoder_layer() if block is None else block, D, **options)
    with torch.no_grad():
        layer.router.weight.mul_(0.1)
        layer.router.weight[1, 0] = 4.0
    return layer.double()


def hidden_for(executes_BS: Tensor) -> Tensor:
    """Hidden states of which a quiet router executes exactly those tokens."""
    hidden = torch.randn(*executes_BS.shape, D, dtype=torch.float64)
    hidden[..., 0] = torch.where(executes_BS, 3.0, -3.0)
    return hidden.requires_grad_()


def dense_formula(
    layer: SkipLayer, hidden_BSD: Tensor, executes_BS: Tensor, *, exact: bool
) -> Tensor:
    """(1-g) h + g · block(h), the block computed for every token; rows one by one.

    g = hard + soft - soft.detach(), as Gumbel-softmax is usually written. Without `exact`, block(h)
    is zero where it is not executed.
    """
    rows = []
    for h_SD, hard_S in zip(hidden_BSD, executes_BS, strict=True):
        block_SD = layer.block(h_SD, layout=TokenLayout.dense(1, h_SD.shape[0]))
        if not exact:
            block_SD = block_SD * hard_S[:, None]
        logits = F.layer_norm(h_SD, (D,)) @ layer.router.weight.T + layer.router.bias
        soft_S = (logits / TEMPERATURE).softmax(-1)[:, 1]
        gate_S1 = (hard_S.double() + soft_S - soft_S.detach())[:, None]
        rows.append((1 - gate_S1) * h_SD + gate_S1 * block_SD)
    return torch.stack(rows)
