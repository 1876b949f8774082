"""The grid of scheduled ticks and statistics of what was measured."""

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tick:
    """One tick of the control loop."""

    t_tick_ns: int  # scheduled time [ns]
    lateness_ns: int  # how late it runs [ns]
    missed: int  # ticks skipped since the last one
    jump_ns: int  # how far the clock jumped since the last one, 0 if it did not; negative: backwards


@dataclass(frozen=True)
class StepTiming:
    """How one tick ran, on the ROS clock."""

    period_error_ns: int  # time since the last tick ran minus the control period(s) [ns]
    lateness_ns: int  # scheduled time to start [ns]
    command_latency_ns: int  # scheduled time to publication of the command [ns], 0 if nothing was sent
    missed: int  # ticks skipped since the last one


class TickGrid:
    """Maps the time at which a timer fired to the scheduled tick.

    Ticks lie on ``origin + n·period``. A tick that fires early or late belongs to the nearest point of the grid that
    was not used yet; a missed tick is skipped and counted, never bunched. A step of the clock backwards, or forwards by
    more than ``jump_ns``, is a jump: the next tick starts afresh. With a steady clock beside it, time in which the
    process did not run is told from a jump.
    """

    def __init__(self, period_ns: int, jump_ns: int = 1_000_000_000) -> None:
        self.period_ns = period_ns
        self._jump_ns = jump_ns
        self._last_ns: int | None = None
        self._last_steady_ns: int | None = None

    @property
    def next_ns(self) -> int | None:
        """Scheduled time of the next tick [ns], None before the first."""
        return None if self._last_ns is None else self._last_ns + self.period_ns

    def tick(self, now_ns: int, steady_ns: int | None = None) -> Tick | None:
        """The tick that is due now, or None if its point of the grid was used already.

        Args:
            now_ns: Time on the ROS clock [ns].
            steady_ns: Time on a clock that never jumps [ns]; None if time is simulated.
        """
        if self._last_ns is None:
            self._last_ns, self._last_steady_ns = now_ns, steady_ns
            return Tick(now_ns, 0, 0, jump_ns=0)
        since_last = now_ns - self._last_ns
        passed_ns = 0 if None in (steady_ns, self._last_steady_ns) else steady_ns - self._last_steady_ns
        if since_last <= -self.period_ns or since_last - passed_ns > self._jump_ns:
            self._last_ns, self._last_steady_ns = now_ns, steady_ns
            return Tick(now_ns, 0, 0, jump_ns=since_last)
        steps = (since_last + self.period_ns // 2) // self.period_ns
        if steps <= 0:
            return None
        self._last_ns += steps * self.period_ns
        self._last_steady_ns = steady_ns
        return Tick(self._last_ns, now_ns - self._last_ns, steps - 1, jump_ns=0)


class Window:
    """The newest measurements of one quantity; percentiles on demand."""

    def __init__(self, capacity: int = 100_000) -> None:
        self._values: deque[float] = deque(maxlen=capacity)

    def add(self, value: float) -> None:
        """Take one measurement."""
        self._values.append(value)

    def percentile(self, q: float) -> float | None:
        """The q-th percentile, or None without a measurement."""
        return float(np.percentile(self._values, q)) if self._values else None

    def __len__(self) -> int:
        return len(self._values)
