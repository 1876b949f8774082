"""Pushes that lead the arm off its way."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from a2c2_ros.core.errors import SimulationError
from a2c2_ros.sim import conventions as c

PUSH_NOISE = np.array([0.4] * 3 + [0.15] * 3)
"""Standard deviation of a push of strength 1 [action units]; the gripper is left alone."""
PUSH_STEPS = (3, 12)
PAUSE_STEPS = (25, 60)
"""Between two pushes; the first pause may be shorter."""


class Pushes:
    """Draws pushes: some steps in one direction, then none for a while.

    Args:
        rng: Draws.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._push = np.zeros(6)
        self._push_left, self._pause_left = 0, int(rng.integers(0, PAUSE_STEPS[1]))

    def next(self) -> np.ndarray:
        """What the push of this step adds to the six motion channels, (6,) action units."""
        if self._pause_left:
            self._pause_left -= 1
            return np.zeros(6)
        if not self._push_left:
            self._push = PUSH_NOISE * self._rng.standard_normal(6)
            self._push_left = int(self._rng.integers(*PUSH_STEPS, endpoint=True))
        self._push_left -= 1
        if not self._push_left:
            self._pause_left = int(self._rng.integers(*PAUSE_STEPS, endpoint=True))
        return self._push


class Disturbed:
    """A ``LiberoEnv`` in which the arm is pushed: what is executed is the action and a push, within the limits.

    Args:
        env: The environment.
        strength: 0 to 1, factor of the pushes.

    Raises:
        SimulationError: If the strength is out of range.
    """

    def __init__(self, env: Any, strength: float) -> None:
        if not 0.0 <= strength <= 1.0:
            raise SimulationError(f"disturbance is {strength}, allowed is 0 to 1")
        self._env = env
        self._strength = strength

    def reset(self, initial_state: int | None, seed: int) -> dict[str, np.ndarray]:
        """As ``LiberoEnv.reset``; the pushes of the episode follow from the seed."""
        self._pushes = Pushes(np.random.default_rng((seed, 1)))  # not the numbers that placed the objects
        return self._env.reset(initial_state, seed)

    def step(self, action: np.ndarray, look: bool = True) -> tuple[Mapping[str, np.ndarray], bool]:
        """As ``LiberoEnv.step``."""
        pushed = np.array(action, dtype=np.float64)
        pushed[:6] += self._strength * self._pushes.next()
        return self._env.step(np.clip(pushed, c.ACTION_LOW, c.ACTION_HIGH), look)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)
