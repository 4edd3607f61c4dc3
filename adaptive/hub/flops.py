"""Operations of models of transformers: rules for their modules, by what these hold.

`count_rules(model)` makes `adaptive.flops` count a model as it counts ours: `executed_flops`,
`planned_flops`, `nominal_flops`. Checked against torch's counter.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive.hub.attention import attentions
from adaptive.ops.flop_counter import FlopCounter, Work, register_flops


def count_rules(model: PreTrainedModel) -> None:
    """Let a model's operations be counted, as far as its modules are of a known form."""
    config = model.config.get_text_config()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if own and all(p.dim() == 3 for p in own) and hasattr(config, "num_experts_per_tok"):
            register_flops(type(module))(_Experts(config.num_experts_per_tok))
        elif _is_router(module, config):
            register_flops(type(module))(_router)
    for layer in _layers(model):
        for attention in attentions(layer):
            register_flops(type(attention))(_attention)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        register_flops(type(model))(_of_pictures)


def count_model(
    model: PreTrainedModel, count: FlopCounter, work: Work, *, logits: Work | None = None
) -> None:
    """Count a model with a head for words, whose logits were computed for `logits` (None: work)."""
    head = model.get_output_embeddings()
    for child in model.children():
        count(child, logits if child is head and logits is not None else work)


def unknown_operations(model: PreTrainedModel) -> str | None:
    """Why a model's operations cannot be counted; None: they can."""
    try:
        count_rules(model)
        for layer in _layers(model):
            if len(attentions(layer)) != 1:
                return f"{type(layer).__name__}: what its attention computes is not known"
        count_model(model, FlopCounter(), Work.dense(1, 1))
    except ValueError as error:
        return str(error)
    return None


def _of_pictures(module: nn.Module, count: FlopCounter, work: Work) -> None:
    """An encoder of pictures: patches by a convolution, its layers, and heads on one row each."""
    assert isinstance(module, PreTrainedModel)
    size = module.config.get_text_config().image_size
    height, width = (size, size) if isinstance(size, int) else size
    layers = _layers(module)

    def walk(part: nn.Module) -> None:
        parts = list(part.modules())
        if isinstance(part, nn.Conv2d):
            rows, columns = part.stride
            pictures = work.of_samples.times((height // int(rows)) * (width // int(columns)))
            count.linear(part.weight[0].numel(), part.out_channels, pictures, input_grad=False)
        elif any(part is layer for layer in layers):
            count(part, work)
        elif any(isinstance(m, nn.Conv2d) or any(m is layer for layer in layers) for m in parts):
            for child in part.children():  # positions and tokens of its own are added
                walk(child)
        else:
            count(part, work.of_samples)

    walk(module)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(stacks[0]) if stacks else []


@register_flops(Conv1D)
def _conv1d(module: nn.Module, count: FlopCounter, work: Work) -> None:
    assert isinstance(module, Conv1D)
    count.linear(module.nx, module.nf, work, weight_grad=module.weight.requires_grad)


def _attention(module: nn.Module, count: FlopCounter, work: Work) -> None:
    """Projections of queries, keys and values for all that give keys, the last one for queries.

    A token that gives keys alone has its query made, too (`LayerCall.keys_of`).
    """
    held: Any = module
    config = held.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(held, "head_dim", None) or config.hidden_size // heads
    products = [m for m in module.modules() if m is not module and _multiplies(m)]
    # Projections of queries may be of the same size, and are made before it.
    output = [m for m in products if _sizes(m) == (heads * width, config.hidden_size)][-1:]
    for part in products:
        count(part, work if part in output else work.of_source)
    count.attention(heads, width, work)


def _multiplies(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters(recurse=False))


def _sizes(module: Any) -> tuple[Any, Any]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


class _Experts:
    """Stacked matrices, of which a token is multiplied with those of `top_k` experts."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def __call__(self, module: nn.Module, count: FlopCounter, work: Work) -> None:
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3:
                count.linear(weight.shape[1], weight.shape[2], work.times(self.top_k))


def _is_router(module: nn.Module, config: Any) -> bool:
    own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    experts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts")} - {
        None
    }
    plain = type(module).__module__.startswith("transformers.") and not isinstance(module, Conv1D)
    return plain and len(own) == 1 and len(experts) == 1 and own[0].shape[:1] == (*experts,)


def _router(module: nn.Module, count: FlopCounter, work: Work) -> None:
    (weight,) = (p for p in module.parameters(recurse=False) if p.dim() > 1)
    count.linear(weight.shape[1], weight.shape[0], work)
