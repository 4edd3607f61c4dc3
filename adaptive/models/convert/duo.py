"""From a trained decoder to one with feed-forwards of two sizes.

The big unit of every layer is the trained feed-forward, so the function does not change while every
token takes it; the small one starts from the hidden units that matter most on the data given.
Training then begins with the random stage of `SizedFeedForward`.

Source: Duo-LLM, arXiv 2410.10846, section 2.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from adaptive.blocks.feed_forward import SwiGLU
from adaptive.blocks.sized_feed_forward import SizedFeedForward, SizedFeedForwardConfig
from adaptive.models.convert.acm import unit_orders
from adaptive.models.decoder.model import Decoder


def convert(teacher: Decoder, config: SizedFeedForwardConfig, batches: Iterable[Tensor]) -> Decoder:
    """A decoder that computes what `teacher` does while every token takes the big unit.

    Args:
        teacher: a dense decoder on one rank, in evaluation mode.
        config: of the sized feed-forwards.
        batches: token ids int64 [B, S], to judge hidden units on.

    Returns:
        A new decoder; its routers are as drawn.

    Raises:
        ValueError: if the teacher routes tokens or has other feed-forwards where sized ones are to
            be, or there is no batch.
    """
    order = unit_orders(teacher, batches)
    student = Decoder(teacher.config.with_method(config))
    student = student.to(teacher.embedding.weight)
    weights = teacher.state_dict()
    for name, module in sized_modules(student).items():
        replaced = teacher.get_submodule(name)
        if not isinstance(replaced, SwiGLU):
            raise ValueError(f"{name}: is a {type(replaced).__name__}, must be a SwiGLU")
        gate, up, down = (weights.pop(f"{name}.{part}.weight") for part in ("gate", "up", "down"))
        state = module.state_dict()
        units = order[name][: state["small.gate.weight"].shape[0]]
        state |= {"big.gate.weight": gate, "big.up.weight": up, "big.down.weight": down}
        state |= {
            "small.gate.weight": gate[units],
            "small.up.weight": up[units],
            "small.down.weight": down[:, units],
        }
        weights |= {f"{name}.{key}": value for key, value in state.items()}
    student.load_state_dict(weights)
    return student.eval()


def sized_modules(model: nn.Module) -> dict[str, SizedFeedForward]:
    """The sized feed-forwards of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SizedFeedForward)}
