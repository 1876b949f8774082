"""Which chunks may move the robot."""

import numpy as np

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ChunkError
from a2c2_ros.core.robot import Robot


class ChunkGate:
    """Decides which chunks may move the robot.

    It follows one planner at a time: a second one is refused until the chunks of the first are used up, so that two
    planners never take turns, and a planner that was started anew takes over by itself.
    """

    def __init__(self, config: ControllerConfig, robot: Robot) -> None:
        self._robot = robot
        self._owner = ""
        self._owner_until_ns = 0
        self.configure(config)

    def configure(self, config: ControllerConfig) -> None:
        """Use other parameters."""
        self._config = config
        limits = self._robot.limits
        margin = config.action_margin * (limits.upper - limits.lower)
        self._lower, self._upper = limits.lower - margin, limits.upper + margin

    def check(self, chunk: ActionChunk, now_ns: int) -> None:
        """Check that a chunk may move the robot.

        Raises:
            ChunkError: If it may not. ``code`` is names, step, implausible, future, expired or owner.
        """
        config, name = self._config, f"chunk {chunk.chunk_id}"
        if chunk.action_names != self._robot.action_names:
            raise ChunkError(
                f"{name}: action_names are {list(chunk.action_names)}, the robot {self._robot.name!r} has "
                f"{list(self._robot.action_names)}",
                "names",
            )
        if chunk.step_ns != config.period_ns:
            raise ChunkError(
                f"{name}: its slots last {chunk.step_ns / 1e9} s, allowed is the control period of "
                f"{config.period_ns / 1e9} s",
                "step",
            )
        beyond = np.maximum(self._lower - chunk.actions, chunk.actions - self._upper).max(axis=0)
        if (beyond > 0.0).any():
            worst = int(beyond.argmax())
            raise ChunkError(
                f"{name}: action {chunk.action_names[worst]!r} is {chunk.actions[:, worst].min():g} to "
                f"{chunk.actions[:, worst].max():g}, allowed is {self._lower[worst]:g} to {self._upper[worst]:g} "
                "(the limits and action_margin)",
                "implausible",
            )
        ahead_ns = chunk.t_obs_ns - now_ns
        if ahead_ns > config.future_tolerance_ns:
            raise ChunkError(
                f"{name}: its observation lies {ahead_ns / 1e9:.3f} s in the future, allowed are "
                f"{config.future_tolerance_s} s; are the clocks of the machines synchronised?",
                "future",
            )
        if self._until_ns(chunk) <= now_ns:
            raise ChunkError(
                f"{name}: it is used up, its observation is {-ahead_ns / 1e9:.3f} s old; is the planner slower than "
                "its chunks last?",
                "expired",
            )
        if chunk.planner_id != self._owner and now_ns < self._owner_until_ns:
            raise ChunkError(
                f"{name}: it is of planner {chunk.planner_id!r}, but {self._owner!r} still has a chunk: are two "
                "planners running?",
                "owner",
            )

    def follow(self, chunk: ActionChunk) -> None:
        """The chunk was taken: its planner is the one to follow."""
        self._owner = chunk.planner_id
        self._owner_until_ns = max(self._owner_until_ns, self._until_ns(chunk))

    def reset(self) -> None:
        """Follow any planner."""
        self._owner, self._owner_until_ns = "", 0

    def _until_ns(self, chunk: ActionChunk) -> int:
        return min(chunk.t_end_ns, chunk.t_obs_ns + self._config.max_chunk_age_ns)
