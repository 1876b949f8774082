"""Intervals of success rates."""

import math

Z_95 = 1.959964


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
