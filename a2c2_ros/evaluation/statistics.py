"""Intervals of success rates, and what two methods differ by on the same initial states."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964
SIGNIFICANCE = 0.05
"""Two-sided p-value below which a difference is called significant; not adjusted for the number of comparisons."""

Outcomes = Mapping[tuple[int, int], bool]
"""(task, initial state) to success, of the episodes that ended without an exception."""


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927).

    Args:
        successes: Number of successes.
        trials: Number of trials.
        z: Quantile of the normal distribution; the default gives 95%.

    Returns:
        (low, high) in [0, 1]; (0, 1) without a trial.

    Raises:
        ValueError: If not ``0 <= successes <= trials``.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes is {successes}, allowed is 0 to {trials}")
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    margin = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: a fair coin for every pair that differs (McNemar, 1947).

    Args:
        only_first: Pairs in which only the first succeeded.
        only_second: Pairs in which only the second succeeded.

    Returns:
        p in (0, 1]; 1 if no pair differs.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm, 1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """Success of a method minus that of another on the initial states that both have."""

    pairs: int
    points: float  # percentage points
    only_first: int
    only_second: int
    p: float  # of :func:`mcnemar_p`

    @property
    def significant(self) -> bool:
        """``p`` is below ``SIGNIFICANCE``."""
        return self.p < SIGNIFICANCE


def difference(first: Outcomes, second: Outcomes) -> Difference | None:
    """Compare two methods in pairs; None if they have no initial state in common."""
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    only_first = sum(first[key] and not second[key] for key in common)
    only_second = sum(second[key] and not first[key] for key in common)
    points = 100.0 * (only_first - only_second) / len(common)
    return Difference(len(common), points, only_first, only_second, mcnemar_p(only_first, only_second))


@dataclass(frozen=True)
class Recovery:
    """Share of the lost success that a method gives back, ``(corrected - delayed) / (undelayed - delayed)``."""

    value: float
    interval: tuple[float, float] | None  # 95%; None if the loss is too uncertain to divide by
    states: int  # initial states that all three have


def recovery(
    corrected: Outcomes, delayed: Outcomes, undelayed: Outcomes, *, resamples: int = 10_000, seed: int = 0
) -> Recovery | None:
    """Recovery with a percentile bootstrap interval over the initial states, drawn within each task (Efron, 1979).

    A resample without a loss has no recovery; the interval is of the others, and absent if those are under 97.5%.

    Args:
        corrected: Of the method with delay.
        delayed: Of the base policy with delay.
        undelayed: Of the base policy without.
        resamples: Number of resamples.
        seed: Of the resampling.

    Returns:
        None if no initial state is in all three, or if nothing was lost.
    """
    common = sorted(corrected.keys() & delayed.keys() & undelayed.keys())
    if not common:
        return None
    success = np.array([[corrected[key], delayed[key], undelayed[key]] for key in common], float)  # (states, 3)
    gain, loss = (float(success[:, i].sum() - success[:, 1].sum()) for i in (0, 2))
    if loss <= 0:
        return None
    rng = np.random.default_rng(seed)
    tasks = np.array([task for task, _ in common])
    sums = np.zeros((resamples, 3))
    for task in np.unique(tasks):
        of_task = success[tasks == task]
        sums += of_task[rng.integers(0, len(of_task), (resamples, len(of_task)))].sum(axis=1)
    gains, losses = sums[:, 0] - sums[:, 1], sums[:, 2] - sums[:, 1]
    usable = losses > 0
    interval = None
    if usable.mean() >= 0.975:
        low, high = np.quantile(gains[usable] / losses[usable], (0.025, 0.975))
        interval = (float(low), float(high))
    return Recovery(gain / loss, interval, len(common))
