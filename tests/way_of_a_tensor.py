"""The way of a tensor: through which files of this repository a forward goes, call by call.

    python -m tests.way_of_a_tensor        # of one routed decoder layer on one rank

A *change* is a call that enters another file than the call before it: where a reader who follows
the tensor turns a page. Functions of torch and of Python count nowhere.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from adaptive import RoutingTape, TokenLayout
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig

ROOT = Path(__file__).parent.parent


class Way(NamedTuple):
    """The calls of a computation, in order: (file, function)."""

    calls: list[tuple[str, str]]

    @property
    def files(self) -> list[str]:
        return sorted({file for file, _ in self.calls})

    @property
    def changes(self) -> int:
        """How often a call enters another file than the call before it."""
        return sum(a != b for (a, _), (b, _) in itertools.pairwise([("", ""), *self.calls]))


def way_of(function: Callable[[], Any]) -> Way:
    """Follow `function()` through the files under adaptive/ and parallel/."""
    calls: list[tuple[str, str]] = []
    homes = tuple(f"{ROOT}/{package}/" for package in ("adaptive", "parallel"))

    def watch(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(homes):
            calls.append((file.removeprefix(f"{ROOT}/"), frame.f_code.co_name))

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return Way(calls)


def routed_layer() -> Callable[[], Any]:
    """The forward of a decoder's layer under Mixture-of-Depths, on a pack and on a tape."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32, num_layers=2, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.5)
    )
    layer = Decoder(config).layers[1]
    layout = TokenLayout.from_lengths([256, 256])
    hidden_TD = torch.randn(layout.tokens, config.dim, requires_grad=True)

    def forward() -> torch.Tensor:
        with RoutingTape(layer):
            return layer(hidden_TD, layout=layout)

    return forward


if __name__ == "__main__":
    forward = routed_layer()
    forward()
    way = way_of(forward)
    print(f"{len(way.files)} files, {way.changes} changes, {len(way.calls)} calls")
    for file, names in itertools.groupby(way.calls, lambda call: call[0]):
        print(f"{file:40} {' '.join(name for _, name in names)}")
