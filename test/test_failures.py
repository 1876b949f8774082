"""What a failed episode is called."""

import numpy as np
import pytest

pytest.importorskip("mujoco")

from a2c2_ros.evaluation.failures import Watched
from a2c2_ros.sim import conventions

AWAY = (0.5, 0.5, 1.2)


class Table:
    """A bowl that is where the script says, step by step, and a plate at the origin."""

    instruction, task = "put it there", 3

    def __init__(self, *bowl: tuple[float, float, float], gripper=AWAY) -> None:
        self._bowl, self._gripper, self._step = bowl, gripper, 0

    def reset(self, initial_state, seed):
        self._step = 0
        return {"seed": seed}

    def step(self, action, look=True):
        self._step += 1
        return {"ee_pose": np.r_[self._gripper, 0, 0, 0, 1], "look": look}, False

    def object_pose(self, name):
        place = self._bowl[self._step] if name == conventions.TARGET_BOWL else (0.0, 0.0, 0.9)
        return np.r_[place, 0, 0, 0, 1.0]


@pytest.mark.parametrize(
    ("bowl", "gripper", "failure"),
    [
        ([(0.3, 0, 0.9), (0.3, 0, 0.91), (0.25, 0, 0.9)], AWAY, "never lifted"),
        ([(0.3, 0, 0.9), (0.3, 0, 1.0), (0.2, 0, 0.9)], AWAY, "lost"),
        ([(0.3, 0, 0.9), (0.3, 0, 1.0), (0.1, 0, 1.0)], (0.1, 0.05, 1.03), "held"),
        ([(0.3, 0, 0.9), (0.3, 0, 1.0), (0.09, 0, 0.91)], AWAY, "beside"),
        ([(0.01, 0, 1.1), (0.01, 0, 1.1), (0.01, 0, 1.1)], (0.01, 0, 1.1), "never lifted"),  # stood on something
    ],
)
def test_how_far_the_bowl_came(bowl, gripper, failure):
    env = Watched(Table(*bowl, gripper=gripper))
    assert env.reset(0, 7) == {"seed": 7} and env.task == 3
    for _ in bowl[1:]:
        observation, success = env.step(np.zeros(7), look=False)
    assert not observation["look"] and not success
    assert env.failure == failure


def test_an_episode_does_not_inherit_from_the_last():
    table = Table((0.3, 0, 0.9), (0.3, 0, 1.0))
    env = Watched(table)
    env.reset(0, 0)
    env.step(np.zeros(7))
    assert env.failure == "lost"
    env.reset(0, 0)
    assert env.failure == "never lifted"
