"""The last hand on every command: it starts from where the robot is, moves within the limits, and comes to a hold."""

import numpy as np

from a2c2_ros.core.limits import LimitFlag
from a2c2_ros.core.robot import Robot

TRACKING_LAG_S = 0.3
"""How far an arm that follows may be behind its command: the way at its limits in this time [s]. Drivers lag 0.1 to
0.2 s, servos and measurements a little more."""


class Governor:
    """Knows the last command that was sent, so that the next differs from it by no more than the limits allow.

    Args:
        robot: Limits and safe command.
        period_ns: Control period [ns].
        halt_steps: Safe commands sent by :meth:`halt` after the hold was reached.
    """

    def __init__(self, robot: Robot, period_ns: int, halt_steps: int) -> None:
        self._hold = robot.hold
        self._limits = robot.limits.at(period_ns)
        self._names = robot.action_names
        step = self._limits.largest_step
        self._lag = np.full(len(self._names), np.inf)  # (A,) farther behind, an arm does not follow
        if step is not None:
            self._lag = np.where(step > 0.0, step * max(1.0, TRACKING_LAG_S * 1e9 / period_ns), np.inf)
        self.halt_steps = halt_steps
        self.reset()

    @property
    def silent(self) -> bool:
        """True if the robot is under no command of this loop."""
        return self._previous is None

    @property
    def starting(self) -> bool:
        """True if the next motion is the first after silence or a hold."""
        return self._previous is None or self._holding

    @property
    def arrived(self) -> bool:
        """True if the last command is the target, or as near to it as the limits let it come."""
        return bool(np.array_equal(self._limits.apply(self._target, self._previous)[0], self._previous))

    def reset(self) -> None:
        """As new: nothing was ever sent."""
        self._kept: np.ndarray | None = None  # the last command before the robot was released
        self._previous: np.ndarray | None = None
        self.release()

    def release(self) -> None:
        """What was sent no longer holds; what a gripper was told is remembered, since it stays there."""
        if self._previous is not None:
            self._kept = self._previous
        self._previous = None
        self._target: np.ndarray | None = None
        self._holding = False  # the last command was on the way to the target
        self._approaching = False  # the target is where the robot was measured when its data came back
        self._halted_steps = 0

    def adopt(self, command: np.ndarray | None) -> None:
        """Take (A,) as the last command, which another loop has sent; None: nothing was sent."""
        self.release()
        self._previous = command

    def outside(self, measured: np.ndarray | None) -> str:
        """Which channels are measured outside the limits by more than a step; empty if none, or for pose deltas."""
        if measured is None or self._hold.kind != "position":
            return ""
        return ", ".join(f"{self._names[i]} is at {measured[i]:g}" for i in np.flatnonzero(self._is_outside(measured)))

    def _is_outside(self, measured: np.ndarray) -> np.ndarray:
        step = self._limits.largest_step
        margin = np.zeros(len(self._names)) if step is None else np.where(np.isfinite(step), step, 0.0)
        # False for NaN: not measured.
        return (measured < self._limits.lower - margin) | (measured > self._limits.upper + margin)

    def not_following(self, measured: np.ndarray | None) -> str:
        """Which channels are measured farther from the last command than allowed; empty if none, or for pose deltas."""
        if measured is None or self._previous is None or self._hold.kind != "position":
            return ""
        largest, away = self._limits.following, self._away(measured)
        return ", ".join(
            f"{self._names[i]} is commanded to {self._previous[i]:g} and measured at {measured[i]:g}, "
            f"allowed are {largest[i]:g} between them"
            for i in np.flatnonzero(away > largest)
        )

    def _away(self, measured: np.ndarray) -> np.ndarray:
        """(A,) distance from the last command to where the arm is, 0 where that is not known or not believed."""
        away = np.abs(np.asarray(measured, np.float64) - self._previous)
        return np.where(np.isnan(measured) | self._is_outside(measured), 0.0, away)

    def _set_target(self, measured: np.ndarray | None) -> None:
        if measured is not None:  # what cannot be true is not measured: the arm must not be driven to its limit by it
            measured = np.where(self._is_outside(measured), np.nan, measured)
        self._target = self._limits.clip(self._hold.target(self._previous, measured))

    def approach(self, measured: np.ndarray | None) -> tuple[np.ndarray | None, LimitFlag] | None:
        """Prepare the first motion after a hold or after silence.

        A robot that nobody commanded starts from its measured state. An arm that was held goes first, once, to where it
        is measured: it may not be where it was told to hold.

        Args:
            measured: (A,) measured position, NaN in channels without one; None if it is not known.

        Returns:
            None when :meth:`move` may be called, else the command on the way there, as of :meth:`hold`.
        """
        if self._previous is None:
            seed = self._hold.seed(measured, self._kept)
            if seed is None:
                return None, LimitFlag.NONE
            self._previous = self._limits.clip(seed)
            return None
        if self._hold.kind == "delta" or not self._holding:
            return None
        if not self._approaching:
            self._approaching = True
            self._set_target(measured)
        return None if self.arrived else self._towards_target()

    def move(self, action: np.ndarray) -> tuple[np.ndarray, LimitFlag]:
        """The command for an action after :meth:`approach`: (A,) float32 within the limits, and which changed it."""
        self._holding = self._approaching = False
        self._halted_steps = 0
        self._previous, flags = self._limits.apply(action, self._previous)
        return self._previous, flags

    def foresee(self, actions: np.ndarray) -> np.ndarray:
        """The commands that :meth:`move` would give for these actions after the last one; nothing changes.

        Args:
            actions: (n, A) float32, one per control step.

        Returns:
            (n, A) float32 within the limits.
        """
        commands = np.empty((len(actions), len(self._names)), np.float32)
        previous = self._previous
        for command, action in zip(commands, actions):
            command[:] = previous = self._limits.apply(action, previous)[0]
        return commands

    def hold(self, measured: np.ndarray | None) -> tuple[np.ndarray | None, LimitFlag]:
        """The next command on the way to the safe one, or None if no command was ever sent.

        Where holding began is kept: a hold that followed the measurement would sag. An arm that is farther behind its
        command than it lags is slow, blocked or stopped by itself: on a ramp from that command it would go on towards
        it, so there the hold starts where the arm is.
        """
        if self._previous is None:
            return None, LimitFlag.NONE
        if not self._holding:
            self._holding = True
            self._set_target(measured)
            if measured is not None and self._hold.kind == "position":
                self._previous = np.where(self._away(measured) > self._lag, self._target, self._previous)
        self._approaching = False
        return self._towards_target()

    def halt(self, measured: np.ndarray | None) -> tuple[np.ndarray | None, LimitFlag]:
        """As :meth:`hold`; after ``halt_steps`` commands in place the robot is released and nothing is sent."""
        if self._holding and self.arrived:
            self._halted_steps += 1
            if self._halted_steps > self.halt_steps:
                self.release()
        return self.hold(measured)

    def _towards_target(self) -> tuple[np.ndarray, LimitFlag]:
        self._previous, flags = self._limits.apply(self._target, self._previous)
        return self._previous, flags
