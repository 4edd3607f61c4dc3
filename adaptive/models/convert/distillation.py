"""Dense layers to Pattention by distillation: each layer learns what it replaces, on real inputs.

A Pattention with parameter tokens in pairs, keys ±a and values ±b, is linear in the direction of
its input, because gelu(z) - gelu(-z) = z. Behind a norm, which gives all inputs the same length,
2 x in_features tokens so reproduce a linear layer exactly; fewer keep the directions that matter
most to its output. From there gradients go on.

Shape legend: T tokens, I input width, O output width, N parameter tokens, P = N // 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.pattention import Pattention


@dataclass(frozen=True)
class DistillationConfig:
    """How long and on what each layer learns.

    Attributes:
        max_tokens: tokens kept for each layer; a fifth of them is held out and measures the error.
        steps: optimizer steps of each layer; 0: closed form only.
        batch_tokens: of one step.
        learning_rate: of Adam, falling along a cosine.
        layers_at_once: layers whose inputs and outputs are held in memory together.
        seed: of the random directions and of the batches.
    """

    max_tokens: int = 8192
    steps: int = 300
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    layers_at_once: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "layers_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: must be 0 or more")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: its path in the model.
        kind: the class that was replaced.
        tokens: parameter tokens of its successor.
        parameters_before, parameters_after: of the layer.
        initial_error, error: ‖student - teacher‖ / ‖teacher‖ over held-out tokens, in closed form
            and after training.
    """

    name: str
    kind: str
    tokens: int
    parameters_before: int
    parameters_after: int
    initial_error: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.name:32s} {self.kind:10s} {self.parameters_before:>10,} -> "
            f"{self.parameters_after:>10,} parameters, {self.tokens:5d} tokens, "
            f"error {self.initial_error:.4f} -> {self.error:.4f}"
        )


def distill(
    model: nn.Module,
    forwards: Iterable[Callable[[], Any]],
    students: Mapping[str, Pattention],
    *,
    config: DistillationConfig | None = None,
) -> Iterator[LayerReport]:
    """Replace layers of `model` by Pattention that has learnt to do the same.

    Every layer learns from the original model's own inputs and outputs; all are replaced once the
    last has been learnt, when the iterator is exhausted.

    Args:
        model: the dense model, in evaluation mode. Its layers must map tokens one by one.
        forwards: calls that run the model on real data; they may be repeated for later layers.
        students: for the path of each layer to replace, its successor.
        config: how they learn.

    Yields:
        A report a layer.

    Raises:
        ValueError: if a path names no layer, or sizes do not fit.
    """
    config = DistillationConfig() if config is None else config
    modules = dict(model.named_modules())
    for name in students:
        # The model itself is no layer that could be replaced inside it.
        if name not in modules or not name:
            raise ValueError(f"{name or 'the model itself'}: is no layer of the model")
    forwards = list(forwards)
    names = list(students)
    for first in range(0, len(names), config.layers_at_once):
        group = names[first : first + config.layers_at_once]
        seen = _record({name: modules[name] for name in group}, forwards, config.max_tokens)
        for name in group:
            x_TI, y_TO = seen.pop(name)
            student = students[name]
            expected = (student.in_features, student.out_features)
            if (x_TI.shape[1], y_TO.shape[1]) != expected:
                raise ValueError(
                    f"{name}: maps {x_TI.shape[1]} to {y_TO.shape[1]} features, "
                    f"its successor {expected[0]} to {expected[1]}"
                )
            initial_error, error = fit(student, x_TI, y_TO, config=config)
            yield LayerReport(
                name=name,
                kind=type(modules[name]).__name__,
                tokens=student.num_tokens,
                parameters_before=sum(p.numel() for p in modules[name].parameters()),
                parameters_after=sum(p.numel() for p in student.parameters()),
                initial_error=initial_error,
                error=error,
            )
    for name, student in students.items():
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, student)


def students_of_linear(
    model: nn.Module,
    *,
    tokens: int | None = None,
    choose: Callable[[str], bool] = lambda _: True,
) -> dict[str, Pattention]:
    """A successor for every nn.Linear of a model.

    Args:
        model: where to look.
        tokens: parameter tokens of each; None: twice the input width, enough for a linear map.
        choose: by path, whether a layer is replaced.
    """
    return {
        name: Pattention(layer.in_features, layer.out_features, tokens or 2 * layer.in_features).to(
            layer.weight
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and choose(name)
    }


def fit(
    student: Pattention, x_TI: Tensor, y_TO: Tensor, *, config: DistillationConfig
) -> tuple[float, float]:
    """Teach a layer the map from `x` to `y`; its held-out error in closed form and afterwards.

    What training did not improve is undone.

    Raises:
        ValueError: if there are too few tokens to hold any out.
    """
    held = x_TI.shape[0] // 5
    if held == 0:
        raise ValueError(f"{x_TI.shape[0]} tokens: must be at least 5, a fifth is held out")
    x_TI, y_TO = x_TI.float(), y_TO.float()
    train, test = (x_TI[held:], y_TO[held:]), (x_TI[:held], y_TO[:held])
    generator = torch.Generator(x_TI.device).manual_seed(config.seed)
    with torch.no_grad():
        student.key_tokens.copy_(paired_keys(*train, student.num_tokens, generator))
        _solve_values(student, *train)
    initial = {name: p.detach().clone() for name, p in student.named_parameters()}
    initial_error = relative_error(student, *test)
    if not config.steps:
        return initial_error, initial_error
    _train(student, *train, config, generator)
    with torch.no_grad():
        _solve_values(student, *train)
    error = relative_error(student, *test)
    if not error < initial_error:
        student.load_state_dict(initial, strict=False)
        error = initial_error
    return initial_error, error


@torch.no_grad()
def relative_error(student: nn.Module, x_TI: Tensor, y_TO: Tensor) -> float:
    """‖student(x) - y‖ / ‖y‖."""
    return float((student(x_TI) - y_TO).norm() / y_TO.norm().clamp(min=1e-12))


def paired_keys(x_TI: Tensor, y_TO: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Keys ±a along orthogonal directions, those first that matter most to a linear map to `y`.

    Orthogonal once inputs are weighed so that they have nearly the same length (the inverse of
    a norm's weights, where a norm came before). Beyond as many pairs as inputs, directions are
    random. Whitening instead would be as exact on the data and blow up whatever they lack.

    Returns:
        [num_tokens, I]; an odd last key has no partner.
    """
    width, pairs = x_TI.shape[1], num_tokens // 2
    x, y = x_TI.double(), y_TO.double()
    weight_I = _equal_lengths(x).sqrt()
    weighed_TI = x * weight_I
    covariance_II = weighed_TI.T @ weighed_TI / x.shape[0]
    ridge = 1e-4 * float(covariance_II.diagonal().mean()) + 1e-12
    damped_II = covariance_II + ridge * torch.eye(width, dtype=x.dtype, device=x.device)
    map_IO = torch.linalg.solve(damped_II, weighed_TI.T @ y / x.shape[0])
    spread_II = torch.linalg.cholesky(damped_II)
    # What each direction carries to the output of inputs as they come.
    order_II = torch.linalg.svd(spread_II @ (spread_II.T @ map_IO), full_matrices=True).U
    directions = [order_II[:, :pairs]]
    missing = num_tokens - 2 * min(pairs, width)
    if missing > 0:
        count = -(-missing // 2)
        random = torch.randn(width, count, generator=generator, device=x.device).double()
        directions.append(random / math.sqrt(width))
    keys_PI = torch.cat(directions, 1).T * weight_I
    return torch.cat([keys_PI, -keys_PI])[_paired_order(keys_PI.shape[0])][:num_tokens].to(x_TI)


def _equal_lengths(x_TI: Tensor) -> Tensor:
    """Weights [I] of the squares of the inputs that make their sums as equal as can be."""
    squares_TI = x_TI.square()
    mean_I = squares_TI.mean(0)
    uniform = 1 / float(mean_I.sum())
    gram_II = squares_TI.T @ squares_TI / x_TI.shape[0]
    ridge = 1e-4 * float(gram_II.diagonal().mean())
    gram_II.diagonal().add_(ridge)
    weights_I = torch.linalg.solve(gram_II, mean_I + ridge * uniform)
    # None vanishes: what the data lack may come later.
    return weights_I.clamp(min=0.05 * uniform, max=20 * uniform)


def _paired_order(pairs: int) -> Tensor:
    """Rows of [a; -a] as a, -a, a, -a, …, so that cutting the end leaves pairs."""
    return torch.arange(2 * pairs).view(2, pairs).T.flatten()


def _solve_values(student: Pattention, x_TI: Tensor, y_TO: Tensor) -> None:
    """Values that are best for the present keys: ridge regression on the weights Θ."""
    count = student.num_tokens
    gram_NN = x_TI.new_zeros(count, count, dtype=torch.float64)
    target_NO = x_TI.new_zeros(count, y_TO.shape[1], dtype=torch.float64)
    identity = Pattention(
        student.in_features,
        count,
        count,
        activation=student.activation,
        scale=float(student.scale),
    ).to(x_TI.device)
    identity.key_tokens.copy_(student.key_tokens)
    identity.value_tokens.copy_(torch.eye(count))
    for x_RI, y_RO in zip(x_TI.split(1024), y_TO.split(1024), strict=True):
        weights_RN = identity(x_RI).double()
        gram_NN.addmm_(weights_RN.T, weights_RN)
        target_NO.addmm_(weights_RN.T, y_RO.double())
    ridge = 1e-6 * float(gram_NN.diagonal().mean()) + 1e-12
    gram_NN.diagonal().add_(ridge)
    student.value_tokens.copy_(torch.linalg.solve(gram_NN, target_NO))


def _train(
    student: Pattention,
    x_TI: Tensor,
    y_TO: Tensor,
    config: DistillationConfig,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.99))
    size = float(y_TO.square().mean().clamp(min=1e-12))
    # Keys work by their direction only: steps are relative to their size.
    rates = {id(p): float(p.detach().square().mean().sqrt()) for p in student.parameters()}
    optimizer.param_groups.clear()
    for parameter in student.parameters():
        optimizer.add_param_group({"params": [parameter]})
    for step in range(config.steps):
        share = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share * rates[id(group["params"][0])]
        rows = torch.randint(
            x_TI.shape[0], (config.batch_tokens,), generator=generator, device=x_TI.device
        )
        optimizer.zero_grad()
        (F.mse_loss(student(x_TI[rows]), y_TO[rows]) / size).backward()
        optimizer.step()


@torch.no_grad()
def _record(
    layers: Mapping[str, nn.Module], forwards: list[Callable[[], Any]], max_tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of layers, [T, …], the first `max_tokens` tokens of each."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    counts = dict.fromkeys(layers, 0)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            room = max_tokens - counts[name]
            if room > 0:
                x_TI = args[0].detach().flatten(0, -2)[:room]
                pairs[name].append((x_TI, output.detach().flatten(0, -2)[:room]))
                counts[name] += x_TI.shape[0]

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        for forward in forwards:
            if min(counts.values()) >= max_tokens:
                break
            forward()
    finally:
        for handle in hooks:
            handle.remove()
    unused = [name for name, count in counts.items() if count == 0]
    if unused:
        raise ValueError(f"{unused[0]}: saw no token in the forwards given")
    joined = {}
    for name, parts in pairs.items():
        inputs, outputs = zip(*parts, strict=True)
        joined[name] = (torch.cat(inputs), torch.cat(outputs))
    return joined
