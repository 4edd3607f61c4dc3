"""How much to draft. Every controller may choose to draft nothing.

A controller may look at a draft's distribution before a token is drawn from it, never at the token:
tokens that are drawn and then left out for being unlikely make the others likelier than drawn.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Protocol


class Controller(Protocol):
    @property
    def limit(self) -> int:
        """The most that `most` ever says."""
        ...

    def most(self) -> int:
        """Tokens to draft at most in the next round of a sequence; 0: none."""
        ...

    def go_on(self, confidence: float) -> bool:
        """Whether to draw a token from a draft whose likeliest has this probability."""
        ...

    def learn(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        *,
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Tokens of each sequence in a round, and how long each part took for all together."""
        ...


class Fixed:
    """Always so many tokens."""

    def __init__(self, count: int = 4) -> None:
        if count < 0:
            raise ValueError(f"count={count}: must be 0 or more")
        self.count = count

    @property
    def limit(self) -> int:
        return self.count

    def most(self) -> int:
        return self.count

    def go_on(self, confidence: float) -> bool:
        return True

    def learn(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        *,
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        return


class Confidence(Fixed):
    """While the draft's likeliest token has some probability, at temperature 1.

    Args:
        threshold: the least; 0 drafts `count` tokens always.
        count: most tokens of a round.

    Source: Kangaroo, arXiv 2404.18911, section 3.2.
    """

    def __init__(self, threshold: float = 0.6, count: int = 6) -> None:
        super().__init__(count)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: must be in [0, 1]")
        self.threshold = threshold

    def go_on(self, confidence: float) -> bool:
        return confidence >= self.threshold


class Thompson:
    """As many as pay, by a guess at the share of drafts that is taken and by measured times.

    The share has a Beta distribution, which counts drafts taken and rejected and forgets; a guess
    is drawn from it for each round. A further draft behind g others pays while the token that it
    brings costs less than those so far, `a^(g+1) (V + g D) > D (1 + a + ... + a^g)`, with V the
    time of a round that drafts nothing and D what a draft adds to a round, its own time and that
    of its verification. Rounds without drafts, then with one, measure V and D first, but not the
    first of either, which holds the prompt, nor a draft's first round behind plain ones, in which
    it reads what it has missed.

    What drafting has lost against plain rounds stays below a share of the time: a try is made
    only where its worst fits, so the less drafts are worth, the rarer they are tried.

    Args:
        count: most tokens of a round.
        forget: factor on what is known, every round: what has not paid is tried again.
        loss: share of the time that tries may lose.
        seed: of the guesses.

    Source: the posterior of EESD, arXiv 2406.03853 (its "Beta-TS"); the rule is ours.
    """

    def __init__(
        self, count: int = 8, *, forget: float = 0.995, loss: float = 0.01, seed: int = 0
    ) -> None:
        if count < 0:
            raise ValueError(f"count={count}: must be 0 or more")
        if not 0 < forget <= 1:
            raise ValueError(f"forget={forget}: must be in (0, 1]")
        if not 0 < loss < 1:
            raise ValueError(f"loss={loss}: must be in (0, 1)")
        self.count, self.forget, self.loss = count, forget, loss
        self._random = random.Random(seed)
        self._taken = self._rejected = 0.0
        self._rounds = 0
        self._drafting = False
        self._seconds = self._lost = 0.0
        self._plain = _Middle()
        self._draft = _Middle()

    @property
    def limit(self) -> int:
        return self.count

    def most(self) -> int:
        # The first round holds the prompt: its time says nothing.
        if self._rounds < 2 or self.count == 0:
            return 0
        plain, draft = self._plain.value, self._draft.value
        if plain is None or draft is None:
            return 1
        share = self._random.betavariate(1 + self._taken, 1 + self._rejected)
        count = worthwhile(share, draft / plain, self.count)
        # All of them rejected loses their time; a try is of two rounds.
        room = self.loss * self._seconds - self._lost
        while count and not self._drafting and 2 * count * draft > room:
            count -= 1
        return count

    def go_on(self, confidence: float) -> bool:
        return True

    def learn(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        *,
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        self._rounds += 1
        if self._rounds == 1:
            return
        self._taken, self._rejected = self._taken * self.forget, self._rejected * self.forget
        # Those behind the first rejection were never tested.
        self._taken += sum(accepted)
        self._rejected += sum(taken < count for count, taken in zip(drafted, accepted, strict=True))
        seconds = draft_seconds + verify_seconds
        plain = self._plain.value
        drafts = max(drafted, default=0)
        if not drafts:
            self._plain.add(seconds)
        elif self._drafting and plain is not None:
            self._draft.add(max(seconds - plain, 0.0) / drafts)
        if drafts and plain is not None:
            made = 1 + sum(accepted) / len(accepted)
            self._lost += seconds - plain * made
        self._seconds = self._seconds * self.forget + seconds
        self._lost *= self.forget
        self._drafting = drafts > 0


def worthwhile(share: float, cost: float, most: int) -> int:
    """Drafts that make a round's tokens cheapest.

    Args:
        share: probability that a draft is taken where those before it were.
        cost: what a draft adds to a round, as a share of a round without.
        most: an upper limit.
    """
    tokens, power = 1.0, share
    for drafted in range(most):
        if power * (1 + drafted * cost) <= tokens * cost:
            return drafted
        tokens, power = tokens + power, power * share
    return most


class _Middle:
    """Median of the last times: a machine is now slower, now faster, and at times interrupted."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=15)

    @property
    def value(self) -> float | None:
        return median(self._times) if self._times else None

    def add(self, new: float) -> None:
        self._times.append(new)
