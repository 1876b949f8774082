"""A reaching task for any arm: bring the gripper's centre to the corner that the instruction names, and stay there.

Positions are relative to the origin of the robot's profile, so that the task is the same on every arm that reaches
them. Whoever looks for the corner sees the state alone: pushes are what the newest observation is needed for.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from a2c2_ros.sim.arms import Arm

TARGETS = {
    f"reach the {height} {side} corner": (0.03, y, z)
    for height, z in (("upper", 0.04), ("lower", -0.04))
    for side, y in (("left", 0.06), ("right", -0.06))
}
"""Instruction to position relative to the origin [m]; x forward, y left, z up."""
INSTRUCTIONS = tuple(TARGETS)
TOLERANCE_M = 0.02
HOLD_STEPS = 20
"""Control steps in a row within the tolerance that make a success: to pass by is not enough."""
MAX_STEPS = 100

POSITION_GAIN = 12.0
"""Action per metre: full motion until 8 cm before the target."""
ROTATION_GAIN = 1.5
ROTATION_LIMIT = 0.5
"""An arm with five joints keeps a rotation error that it cannot help; it must not take the motion over."""
GRIPPER_OPEN = -1.0

PUSH_S = 0.3
FIRST_PUSH_STEPS = (0, 20)
"""On the way, when the first chunk has begun."""
PAUSE_STEPS = (30, 60)
"""Between two pushes."""


class ReachTask:
    """Whether the gripper is where it should be, and has been for long enough."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, number: int) -> str:
        """Take the targets in turn; returns the instruction."""
        self.instruction = INSTRUCTIONS[number % len(INSTRUCTIONS)]
        self.target = np.array(TARGETS[self.instruction])
        self._held = 0
        return self.instruction

    def update(self, position: np.ndarray) -> bool:
        """Take the position (3,) of one control step, relative to the origin [m]; returns whether the task is done."""
        near = np.linalg.norm(position - self.target) <= TOLERANCE_M
        self._held = self._held + 1 if near else 0
        return self._held >= HOLD_STEPS


def expert_action(state: np.ndarray, target: Sequence[float]) -> np.ndarray:
    """Action (7,) of the expert for a state (8,) of ``ee_pose_gripper``: straight to the target, gripper down, open."""
    position = np.clip(POSITION_GAIN * (np.array(target) - state[:3]), -1.0, 1.0)
    rotation = np.clip(-ROTATION_GAIN * state[3:6], -ROTATION_LIMIT, ROTATION_LIMIT)
    return np.concatenate([position, rotation, [GRIPPER_OPEN]])


class Pushes:
    """When and how somebody pushes the arm aside.

    Args:
        rng: Draws directions and pauses.
        speed_m_s: Of the gripper during a push, of ``PUSH_S``; 0: nobody pushes.
    """

    def __init__(self, rng: np.random.Generator, speed_m_s: float) -> None:
        self._rng = rng
        self._speed = speed_m_s
        self._pause = int(rng.integers(*FIRST_PUSH_STEPS, endpoint=True))

    def step(self, arm: Arm) -> None:
        """One control step of the arm begins."""
        self._pause -= 1
        if self._speed and self._pause < 0:
            direction = self._rng.standard_normal(3)
            arm.push(self._speed * direction / np.linalg.norm(direction), PUSH_S)
            self._pause = int(self._rng.integers(*PAUSE_STEPS, endpoint=True))


class ReachEnv:
    """The task on a simulated arm, without ROS: an ``Environment`` of ``evaluation.rollout``.

    Observations are those of the robot's driver: streams of joint positions [rad, m], and ``ee_pose`` (7,) in the base.

    Args:
        make_arm: A new arm from a seed.
        joint_names: Stream to its joints.
        state_of: State (8,) of an observation, relative to the origin of the robot's profile.
        drive: Hands an action (7,) to the arm as the robot's sink and driver would.
        step_ns: Control step [ns].
        push_speed_m_s: See :class:`Pushes`.
    """

    def __init__(
        self,
        make_arm: Callable[[int], Arm],
        joint_names: Mapping[str, Sequence[str]],
        state_of: Callable[[Mapping[str, np.ndarray]], np.ndarray],
        drive: Callable[[Arm, np.ndarray], None],
        step_ns: int,
        push_speed_m_s: float = 0.0,
    ) -> None:
        self._make_arm = make_arm
        self._names = joint_names
        self._state_of = state_of
        self._drive = drive
        self._step_ns = step_ns
        self._speed = push_speed_m_s
        self._task = ReachTask()

    @property
    def instruction(self) -> str:
        """Of this episode."""
        return self._task.instruction

    def reset(self, initial_state: int | None, seed: int) -> Mapping[str, np.ndarray]:
        """Start an episode with the arm at home.

        Args:
            initial_state: Number of the target, None for one drawn from the seed.
            seed: Of the noise and the pushes.

        Returns:
            The first observation.
        """
        rng = np.random.default_rng(seed)
        self._task.start(int(rng.integers(len(INSTRUCTIONS))) if initial_state is None else initial_state)
        self.arm = self._make_arm(seed)
        self._pushes = Pushes(rng, self._speed)
        return self._observation(*self.arm.measure())

    def step(self, action: np.ndarray, look: bool = True) -> tuple[Mapping[str, np.ndarray], bool]:
        """Apply an action (7,) for one control step; returns the observation and whether the task is done."""
        self._pushes.step(self.arm)
        self._drive(self.arm, action)
        self.arm.advance(self.arm.time_ns + self._step_ns)
        truth = self._state_of(self._observation(self.arm.position, self.arm.centre))
        return self._observation(*self.arm.measure()), self._task.update(truth[:3])

    def _observation(self, positions: np.ndarray, pose: np.ndarray) -> dict[str, np.ndarray]:
        return self.arm.by_stream(positions, self._names) | {"ee_pose": pose}
