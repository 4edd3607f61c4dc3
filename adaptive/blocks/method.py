"""METHODS: every method there is, in order of application, and those that a user adds.

A method is found here, never enumerated: models, planner, conversions, checks and tests walk the
list. What is asked of one is said in `adaptive.blocks.protocol`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.delete_gate import DeleteGateConfig
from adaptive.blocks.learned_budget import LearnedBudgetConfig
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.protocol import LayerContext, Linears, Method, Place, RoutedBlock
from adaptive.blocks.segments import SegmentsConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.blocks.sprint import SparseDenseFusionConfig
from adaptive.blocks.token_merging import TokenMergingConfig

__all__ = [
    "METHODS",
    "LayerContext",
    "Linears",
    "Method",
    "MethodHost",
    "RoutedBlock",
    "configured",
    "methods",
    "register_method",
    "takes_methods",
]

METHODS: tuple[type[Method], ...] = (
    PattentionConfig,
    MixtureOfExpertsConfig,
    SizedFeedForwardConfig,
    AdaptiveComputationConfig,
    MixtureOfDepthsConfig,
    SkipLayerConfig,
    SegmentsConfig,
    DeleteGateConfig,
    TokenMergingConfig,
    LearnedBudgetConfig,
    SparseDenseFusionConfig,
)
"""Registered methods follow those of the library, so they stand outermost at their place.
Registering binds a new tuple: ask `methods()` where that may happen later."""

M = TypeVar("M", bound=type[Method])
C = TypeVar("C", bound=type["MethodHost"])
H = TypeVar("H", bound="MethodHost")

_HOSTS: list[tuple[type[MethodHost], tuple[Place, ...]]] = []


def methods(*places: Place) -> tuple[type[Method], ...]:
    """The methods of these places, of all without any, in order of application."""
    return tuple(method for method in METHODS if not places or method.place in places)


def register_method(method: M) -> M:
    """Make a method from outside the library a key of the section `model` of every recipe.

    Also a decorator. It is then built, planned, counted, recorded and checked like the library's
    own. A recipe imports the module that does so by `plugins: [my_package.my_method]`.

    Args:
        method: a frozen dataclass derived from Method. Registering it twice changes nothing.

    Raises:
        ValueError: if it is no such dataclass, or its name or place cannot be.
    """
    global METHODS
    if not (isinstance(method, type) and issubclass(method, Method) and is_dataclass(method)):
        raise ValueError(f"{method!r}: must be a dataclass derived from adaptive.Method")
    if method in METHODS:
        return method
    name, place = getattr(method, "name", None), getattr(method, "place", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{method.__name__}.name={name!r}: must be a word")
    if place not in get_args(Place):
        raise ValueError(
            f"{method.__name__}.place={place!r}: must be one of {', '.join(get_args(Place))}"
        )
    taken = {other.name for other in METHODS}.union(*(dir(host) for host, _ in _HOSTS))
    if name in taken:
        raise ValueError(f"{method.__name__}.name={name!r}: is taken; give it another")
    METHODS = (*METHODS, method)
    for host, places in _HOSTS:
        if place in places:
            _add_field(host, method)
    return method


def configured(kind: type[Method], options: dict[str, Any]) -> Method:
    """The method's configuration; nested ones may come as dictionaries, as files have them.

    Raises:
        ValueError: it has no such option, or one is out of range.
    """
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name}: {kind.name} has no such option; has {', '.join(known)}")
        kinds = [k for k in (hints[name], *get_args(hints[name])) if is_dataclass(k)]
        if isinstance(value, dict) and kinds:
            options = options | {name: kinds[0](**value)}  # type: ignore[operator]
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{kind.name}: {error}") from None


class MethodHost:
    """Base of a model's configuration that has a field, None or a Method, for each method.

    Derive a frozen dataclass, decorated with `takes_methods`.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that this model has, in order of application."""
        given = (getattr(self, method.name, None) for method in METHODS)
        return tuple(method for method in given if method is not None)

    def with_method(self: H, method: Method) -> H:
        """The same model with this method, in place of its own of that name."""
        changes: dict[str, Any] = {method.name: method}
        return replace(self, **changes)  # type: ignore[type-var]

    def check_methods(self, num_layers: int) -> None:
        """Raise ValueError if a method cannot stand in so many layers, or beside another."""
        for method in self.methods:
            try:
                method.routed_layers(num_layers)
            except ValueError as error:
                raise ValueError(f"{method.name}.{error}") from None
            for other in self.methods:
                if other is not method and method.clashes(other):
                    raise ValueError(f"{method.name} and {other.name}: give one of them")


def takes_methods(*places: Place) -> Callable[[C], C]:
    """Give a model's configuration a field for every method of these places, later ones too."""

    def decorate(host: C) -> C:
        _HOSTS.append((host, places))
        for method in methods(*places):
            _add_field(host, method)
        return host

    return decorate


def _add_field(host: type[MethodHost], method: type[Method]) -> None:
    """`host` itself becomes what a dataclass derived from it with one more field would be."""
    kind: Any = method | None
    made = make_dataclass(
        host.__name__, [(method.name, kind, field(default=None))], bases=(host,), frozen=True
    )
    for part in ("__dataclass_fields__", "__init__", "__repr__", "__eq__", "__hash__"):
        setattr(host, part, made.__dict__[part])
    host.__annotations__[method.name] = kind
    setattr(host, method.name, None)
    said = (method.__doc__ or method.__name__).partition("\n")[0].rstrip(".")
    host.__doc__ = f"{(host.__doc__ or '').rstrip()}\n        {method.name}: {said}, or None.\n    "
