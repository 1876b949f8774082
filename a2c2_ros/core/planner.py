"""When the planner asks for the next chunk, and when a chunk may be published."""

from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.config import PlannerConfig


@dataclass(frozen=True)
class ChunkRequest:
    """One inference."""

    t_obs_ns: int  # stamp of the observation that it starts from [ns]
    t_due_ns: int  # the chunk is published at this time or, if the inference is slower, when it is done [ns]
    sequence: int  # 0 for the first chunk after a cold start
    seed: int  # seed of the policy's noise


class PlannerSchedule:
    """Decides by time alone; the same object serves the node and the evaluation in one process.

    One inference at a time. The next starts from the first observation at or after ``t_obs + e·step`` of the last one.
    Its chunk is due ``d`` steps after its observation; the first chunk (cold start: no chunk with slots left) is due at
    once, because the robot waits for it. Not thread safe: the owner serialises the calls.
    """

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._in_flight: ChunkRequest | None = None
        self._last: ChunkRequest | None = None
        self._wanted_now = False
        self._sequence = 0

    @property
    def in_flight(self) -> ChunkRequest | None:
        """The inference whose chunk was not published yet."""
        return self._in_flight

    def configure(self, config: PlannerConfig) -> None:
        """Use other parameters from the next decision on."""
        self._config = config

    def invalidate(self) -> None:
        """The instruction changed: drop the inference in flight and ask again with the next observation."""
        self._in_flight = None
        self._wanted_now = True

    def reset(self) -> None:
        """Start cold: the clock jumped back or the planner was deactivated."""
        self._in_flight = self._last = None
        self._wanted_now = False

    def next_request(self, t_obs_ns: int) -> ChunkRequest | None:
        """Start an inference from the observation with this stamp, if one is wanted now.

        Returns:
            The request, now in flight, or None.
        """
        config, step = self._config, self._config.step_ns
        lifetime = config.horizon * step
        if self._in_flight is not None:
            if t_obs_ns - self._in_flight.t_obs_ns < lifetime:
                return None
            self._in_flight = None
        cold = self._last is None or not 0 <= t_obs_ns - self._last.t_obs_ns < lifetime
        if not (cold or self._wanted_now or t_obs_ns - self._last.t_obs_ns >= config.execution_horizon * step):
            return None
        self._sequence = 0 if cold else self._sequence + 1
        self._wanted_now = False
        delay = 0 if cold else self._sample_delay_steps()
        self._in_flight = ChunkRequest(
            t_obs_ns, t_obs_ns + delay * step, self._sequence, seed=config.seed * 1_000_003 + self._sequence
        )
        self._last = self._in_flight
        return self._in_flight

    def published(self) -> None:
        """The chunk of the inference in flight was published."""
        self._in_flight = None

    def _sample_delay_steps(self) -> int:
        delay, jitter = self._config.inference_delay, self._config.inference_delay_jitter
        if jitter == 0:
            return delay
        rng = np.random.default_rng((self._config.seed, self._sequence))
        return int(rng.integers(delay - jitter, delay + jitter + 1))
