"""What a failed episode looks like: how far the bowl came."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from a2c2_ros.sim import conventions

LIFTED_M = 0.03
"""A bowl this far above where it stood was lifted."""
HELD_M = 0.09
"""Between the gripper's centre and the origin of a bowl that it holds by the rim: about 0.06 m."""
NEAR_M = 0.12
"""Between the axes of bowl and plate when they touch or nearly do."""

FAILURES = {
    "never lifted": "the bowl stayed where it was, or was only pushed",
    "lost": "it was lifted and let go or lost away from the plate",
    "held": "it was still in the gripper at the step limit",
    "beside": "it was let go at the plate, but does not stand on it",
}


class Watched:
    """A ``LiberoEnv`` that is told apart from one by nothing but :attr:`failure`.

    Args:
        env: The environment.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self.instruction = env.instruction
        self._rest_z = self._highest_z = 0.0
        self._gripper = np.zeros(3)

    def reset(self, initial_state: int | None, seed: int) -> Mapping[str, np.ndarray]:
        """As ``LiberoEnv.reset``."""
        observation = self._env.reset(initial_state, seed)
        self._rest_z = self._highest_z = float(self._env.object_pose(conventions.TARGET_BOWL)[2])
        return observation

    def step(self, action: np.ndarray, look: bool = True) -> tuple[Mapping[str, np.ndarray], bool]:
        """As ``LiberoEnv.step``."""
        observation, success = self._env.step(action, look)
        self._gripper = observation["ee_pose"][:3]
        self._highest_z = max(self._highest_z, float(self._env.object_pose(conventions.TARGET_BOWL)[2]))
        return observation, success

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    @property
    def failure(self) -> str:
        """The key of ``FAILURES`` that the present state is, if the task is not solved."""
        bowl, plate = (self._env.object_pose(name)[:3] for name in (conventions.TARGET_BOWL, conventions.PLATE))
        if self._highest_z < self._rest_z + LIFTED_M:
            return "never lifted"
        if np.linalg.norm(bowl - self._gripper) < HELD_M:
            return "held"
        return "beside" if np.linalg.norm(bowl[:2] - plate[:2]) < NEAR_M else "lost"
