"""The grid of scheduled ticks and statistics of what was measured."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.schedule import admissible_execution_horizons, first_slot

DELAY_WINDOW_CHUNKS = 100
DELAY_PERCENTILE = 95.0


NO_E_FITS = "no e fits: make the policy faster or its chunks longer"


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


@dataclass(frozen=True)
class ChunkTiming:
    """How long a chunk took, and what the newest chunks together say about e."""

    horizon: int  # H
    execution_horizon: int  # e in use
    delay_ns: int  # stamp of the observation to publication [ns]
    delay_steps: int  # the same, the first slot that can be executed
    effective_delay_steps: int  # d of the newest chunks; -1 before the first that counts
    window_chunks: int  # how many those are

    @property
    def admissible(self) -> range:
        """Every e that fits H and the effective d, in rising order; empty if there is none."""
        d = self.effective_delay_steps
        return admissible_execution_horizons(self.horizon, d) if d >= 0 else range(0)

    @property
    def proposed(self) -> int:
        """The admissible e nearest to the one in use; 0 if there is none."""
        allowed = self.admissible
        return min(max(self.execution_horizon, allowed[0]), allowed[-1]) if allowed else 0

    @property
    def problem(self) -> str | None:
        """What is wrong with the e in use and what to do, None if it is admissible or nothing was measured."""
        if self.effective_delay_steps < 0 or self.execution_horizon in self.admissible:
            return None
        advice = NO_E_FITS
        if self.admissible:
            advice = f"set execution_horizon to {self.proposed} (allowed {self.admissible[0]} to {self.admissible[-1]})"
        return (
            f"chunks come d={self.effective_delay_steps} steps after their observation; with H={self.horizon} and "
            f"e={self.execution_horizon} this breaks d <= e and e + d <= H: {advice}"
        )


class DelayMonitor:
    """Effective inference delay d, measured: a high percentile over the newest chunks.

    The first chunk after a cold start does not count: nothing is executed while it is awaited, and it may include what
    happens once.
    """

    def __init__(self) -> None:
        self._steps = Window(DELAY_WINDOW_CHUNKS)

    def add(self, delay_ns: int, step_ns: int, *, cold: bool, horizon: int, execution_horizon: int) -> ChunkTiming:
        """Take the delay of one chunk.

        Args:
            delay_ns: Stamp of its observation to its publication [ns].
            step_ns: Duration of a control step [ns].
            cold: Whether it is the first after a cold start.
            horizon: H.
            execution_horizon: e in use.
        """
        steps = first_slot(delay_ns, step_ns)
        if not cold:
            self._steps.add(steps)
        percentile = self._steps.percentile(DELAY_PERCENTILE)
        effective = -1 if percentile is None else math.ceil(percentile)
        return ChunkTiming(horizon, execution_horizon, delay_ns, steps, effective, len(self._steps))
