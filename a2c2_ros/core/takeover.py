"""A person's commands in place of the policy's."""

import numpy as np

from a2c2_ros.core.errors import ObservationError


class Takeover:
    """Keeps a person's newest command; it counts for a short time only, so that letting go hands back.

    Args:
        size: Channels of the action, A.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.clear()

    def clear(self) -> None:
        """Forget the command."""
        self._command = np.zeros(self._size, np.float32)
        self._stamp_ns: int | None = None
        self._is_over = False  # the newest command does not count any more, whatever the timeout becomes

    def put(self, command: np.ndarray, stamp_ns: int, latest_ns: int) -> None:
        """Take a command; one that is older than the newest is dropped.

        Args:
            command: (A,), action units.
            stamp_ns: When the person gave it [ns].
            latest_ns: Largest stamp that is taken [ns]. A command from the future would count for too long.

        Raises:
            ObservationError: If it has another shape, a value is not finite, or its stamp is missing or in the future.
        """
        if command.shape != (self._size,) or not np.isfinite(command).all():
            raise ObservationError(f"takeover command is {command.tolist()}, allowed are {self._size} finite values")
        if not 0 < stamp_ns <= latest_ns:
            raise ObservationError(
                f"takeover command has stamp {stamp_ns} ns, allowed is a time after 0 and up to {latest_ns} ns; are "
                "the clocks of the machines synchronised?"
            )
        if self._stamp_ns is None or stamp_ns > self._stamp_ns:
            self._command, self._stamp_ns, self._is_over = command.astype(np.float32), stamp_ns, False

    def end(self) -> None:
        """What was commanded so far does not count any more."""
        self._is_over = True

    def command(self, t_tick_ns: int, timeout_ns: int) -> np.ndarray | None:
        """The command that counts at this tick, (A,) float32, or None; one that has timed out never counts again."""
        age_ns = self.age_ns(t_tick_ns)
        if age_ns is None:
            return None
        self._is_over |= age_ns > timeout_ns
        return None if self._is_over else self._command

    def age_ns(self, t_tick_ns: int) -> int | None:
        """Age of the newest command [ns], None if there is none."""
        return None if self._stamp_ns is None else t_tick_ns - self._stamp_ns
