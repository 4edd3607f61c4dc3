"""Which source a row of the stream is from, and which of that source's rows it is.

Every source's count of rows is within one of its weight's share at every row: the assignment of
Tijdeman's. A run that goes on with other weights or sources keeps what each source has given.

Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), 323-330.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm
from threading import Lock

import torch
from torch import Tensor

_CHUNK = 4096


class Mixture:
    """Sources by name, with weights.

    Args:
        weights: of the sources, above 0.
        base: the row from which on these weights hold.
        given: rows that each source had given by then.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        base: int = 0,
        given: Mapping[str, int] | None = None,
    ) -> None:
        self.weights, self.base = dict(weights), base
        self.given = dict(given or {})
        self.names = list(weights)
        exact = [Fraction(str(weight)) for weight in weights.values()]
        whole = lcm(*(part.denominator for part in exact))
        self._whole = [int(part * whole) for part in exact]
        # Rows at which the counts of the sources are known, ascending.
        self._rows, self._counts = [base], [[0] * len(exact)]
        self._lock = Lock()
        self._chunk = lru_cache(8)(self._assign)

    def locate(self, row: int) -> tuple[int, int]:
        """(number of the source, number of its row) of a row of the stream.

        Raises:
            ValueError: the row lies before these weights.
        """
        if len(self.names) == 1:
            return 0, row - self.base + self.given.get(self.names[0], 0)
        if row < self.base:
            raise ValueError(f"row {row}: lies before row {self.base}, where these weights begin")
        with self._lock:
            place = self._place(row)
            source, index = self._chunk(place)[row - self._rows[place]]
        return source, index + self.given.get(self.names[source], 0)

    def counts(self, row: int) -> dict[str, int]:
        """Rows that each source has given before a row, those of earlier weights too."""
        if len(self.names) == 1:
            return {**self.given, self.names[0]: self.locate(row)[1]}
        if row > self.base:
            self.locate(row - 1)
        with self._lock:
            place = max(bisect_right(self._rows, row) - 1, 0)
            counts = list(self._counts[place])
            if row > self._rows[place]:
                for source, _ in self._chunk(place)[: row - self._rows[place]]:
                    counts[source] += 1
        own = {
            name: self.given.get(name, 0) + n for name, n in zip(self.names, counts, strict=True)
        }
        return {**self.given, **own}

    def _place(self, row: int) -> int:
        """The known place to begin from, made now where the rows between are not."""
        while self._rows[-1] + _CHUNK <= row:
            counts = list(self._counts[-1])
            for source, _ in self._assign(len(self._rows) - 1):
                counts[source] += 1
            self._rows.append(self._rows[-1] + _CHUNK)
            self._counts.append(counts)
        return bisect_right(self._rows, row) - 1

    def _assign(self, place: int) -> list[tuple[int, int]]:
        """(source, index since `base`) of the rows from a known place to the next."""
        total, sources = sum(self._whole), range(len(self._whole))
        counts, begin = list(self._counts[place]), self._rows[place] - self.base
        twice = max(2 * len(self._whole) - 2, 1)
        found = []
        for row in range(begin + 1, begin + 1 + _CHUNK):
            # Of those that have fallen behind far enough, the one that may wait least.
            behind = [
                n for n in sources if twice * (row * self._whole[n] - counts[n] * total) >= total
            ]
            chosen = min(
                behind, key=lambda n: ((twice - 1 + twice * counts[n]) / self._whole[n], n)
            )
            found.append((chosen, counts[chosen]))
            counts[chosen] += 1
        return found

    def state(self, row: int) -> dict[str, Tensor]:
        """What a checkpoint at a row keeps: weights, and rows given then and at the row."""
        counts = self.counts(row)
        state = {"mixture": torch.tensor([self.base, row])}
        for name in counts:
            state[f"mixture/{name}"] = torch.tensor([self.given.get(name, 0), counts[name]])
        for name, weight in self.weights.items():
            state[f"mixture weight/{name}"] = torch.tensor(weight, dtype=torch.float64)
        return state

    def resumed(self, state: Mapping[str, Tensor]) -> tuple[Mixture, str | None]:
        """This mixture going on from a checkpoint's state, and what changed, in words."""
        base, row = state["mixture"].tolist()
        then = {
            name.removeprefix("mixture weight/"): float(weight)
            for name, weight in state.items()
            if name.startswith("mixture weight/")
        }
        rows = {
            name.removeprefix("mixture/"): counts.tolist()
            for name, counts in state.items()
            if name.startswith("mixture/")
        }
        if then == self.weights:
            return self._continued(base, row, rows), None
        given = {name: counts[1] for name, counts in rows.items()}
        said = [
            f"{name} {then.get(name, 0):g} -> {self.weights.get(name, 0):g}"
            for name in {**then, **self.weights}
            if then.get(name) != self.weights.get(name)
        ]
        return Mixture(self.weights, base=row, given=given), (
            f"from row {row} on the sources' weights are others: {', '.join(sorted(said))}"
        )

    def _continued(self, base: int, row: int, rows: Mapping[str, list[int]]) -> Mixture:
        given = {name: counts[0] for name, counts in rows.items()}
        made = Mixture(self.weights, base=base, given=given)
        if row > base:
            # Known, so that nothing before it is computed again.
            made._rows.append(row)
            made._counts.append([rows[name][1] - rows[name][0] for name in self.names])
        return made
