"""When the planner asks for the next chunk, what it goes on from, and when and how a chunk is published."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.schedule import slot_index

NOTHING = np.zeros((0, 0), np.float32)
RETRY_AFTER_NS = 200_000_000
"""How long after a failed inference the next one starts [ns]."""


@dataclass(frozen=True, eq=False)
class ChunkRequest:
    """One inference."""

    t_obs_ns: int  # stamp of the observation that it starts from [ns]
    t_due_ns: int  # the chunk is published at this time or, if the inference is slower, when it is done [ns]
    sequence: int  # 0 for the first chunk after a cold start
    seed: int  # seed of the policy's noise
    chunking: str  # the planner's parameter when the inference started
    known: np.ndarray  # (n, A) float32, what real-time chunking goes on from; row k is slot k of the new chunk
    delay_steps: int  # d without jitter: that many of ``known`` are expected to be executed before the chunk is there


class PlannerSchedule:
    """Decides by time alone; the same object serves the node and the evaluation in one process.

    One inference at a time. The next starts from the first observation at or after ``t_obs + e·step`` of the last one.
    Its chunk is due ``d`` steps after its observation; the first chunk (cold start: no chunk with slots left) is due at
    once, because the robot waits for it. Not thread safe: the owner serialises the calls.

    With synchronous chunking the next inference starts when the slots of the last chunk are used up. The robot holds
    until the chunk is published, so what was observed before still holds then, and slot 0 starts at that time: the
    published chunk says so by its ``t_obs``, and has e slots only.

    What was observed before a person's takeover or a stop ends is not executed: see :meth:`replan`.
    """

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._measured_delay_steps = 0
        self.reset()

    @property
    def in_flight(self) -> ChunkRequest | None:
        """The inference whose chunk was not published yet."""
        return self._in_flight

    def configure(self, config: PlannerConfig) -> None:
        """Use other parameters from the next decision on."""
        self._config = config

    def replan(self, until_ns: int) -> None:
        """A person commands, or has enabled the robot: no chunk of an observation before ``until_ns`` is executed.

        What is in flight ends as usual. From then on an inference starts as soon as none is in flight.

        Args:
            until_ns: When the command ceases to count, or the robot began to wait for a chunk [ns].
        """
        self._void_until_ns = max(self._void_until_ns, until_ns)

    def expect_delay(self, delay_steps: int) -> None:
        """Tell the delay that was measured of late [steps], for real-time chunking.

        It goes on from so many slots of the last chunk, or from as many as the injected delay says if those are more.
        """
        self._measured_delay_steps = delay_steps

    def invalidate(self) -> None:
        """The instruction changed: drop the inference in flight and ask again.

        That is with the next, newer observation, but not before the robot stands still with synchronous chunking.
        """
        self._in_flight = None
        self._wanted_now = self._instruction_changed = True

    def reset(self) -> None:
        """Start cold: the clock jumped back or the planner was deactivated."""
        self._in_flight: ChunkRequest | None = None
        self._asked_ns: int | None = None  # observation of the last inference
        self._started_ns = 0  # slot 0 of its chunk
        self._previous: ActionChunk | None = None  # as it was published last
        self._wanted_now = self._instruction_changed = False
        self._void_until_ns = 0  # a chunk of an older observation is not executed
        self._retry_ns = 0  # no inference starts from an older observation: the last one failed
        self._sequence = 0

    def wants(self, t_obs_ns: int) -> bool:
        """Whether an inference starts from an observation with this stamp, if what is due by then is published by then.

        Changes nothing.
        """
        if t_obs_ns < self._retry_ns:
            return False
        flying = self._in_flight
        if flying is not None and t_obs_ns - flying.t_obs_ns < self._lifetime_ns:
            if flying.chunking == "synchronous":
                return False  # once it is published, it is executed
            if t_obs_ns < flying.t_due_ns:
                return False
        if self._cold(t_obs_ns) or self._asked_ns < self._void_until_ns <= t_obs_ns:
            return True
        if self._config.chunking == "synchronous":
            return self._previous is None or t_obs_ns >= self._previous.t_end_ns
        if self._wanted_now and t_obs_ns > self._asked_ns:  # of two chunks of one stamp only the first is executed
            return True
        return t_obs_ns - self._started_ns >= self._config.execution_horizon * self._config.step_ns

    def next_request(self, t_obs_ns: int) -> ChunkRequest | None:
        """Start an inference from the observation with this stamp, if one is wanted now.

        Returns:
            The request, now in flight, or None.
        """
        if self._in_flight is not None:
            if t_obs_ns - self._in_flight.t_obs_ns < self._lifetime_ns:
                return None
            self._in_flight = None
        if not self.wants(t_obs_ns):
            return None
        config, cold = self._config, self._cold(t_obs_ns)
        self._sequence = 0 if cold else self._sequence + 1
        self._wanted_now = False
        self._asked_ns = self._started_ns = t_obs_ns
        delay = 0 if cold else self._sample_delay_steps()
        self._in_flight = ChunkRequest(
            t_obs_ns,
            t_obs_ns + delay * config.step_ns,
            self._sequence,
            seed=config.seed * 1_000_003 + self._sequence,
            chunking=config.chunking,
            known=self._known(t_obs_ns),
            delay_steps=self._expected_delay_steps,
        )
        return self._in_flight

    def release(self, chunk: ActionChunk, now_ns: int) -> ActionChunk:
        """End the inference in flight with its chunk, at the time at which it is published.

        Args:
            chunk: All that the policy computed.
            now_ns: Stamp of the present observation in lockstep, else the clock [ns].

        Returns:
            The chunk to publish.
        """
        request = self._in_flight
        if request.chunking == "synchronous":
            # An observation is good for the time of one chunk, here too. The gate refuses what is older. What a person
            # moved since does not stand as it was observed.
            if request.t_obs_ns >= self._void_until_ns and now_ns - request.t_obs_ns < self._lifetime_ns:
                self._started_ns = now_ns
            actions = chunk.actions[: self._config.execution_horizon]
            chunk = dataclasses.replace(chunk, t_obs_ns=self._started_ns, actions=actions)
        self._previous = chunk
        self._instruction_changed = False
        self._in_flight = None
        return chunk

    def failed(self, now_ns: int) -> None:
        """End the inference in flight without a chunk; the next one starts soon, since the last chunk runs out.

        Args:
            now_ns: As of :meth:`release`.
        """
        if self._in_flight.sequence == 0:
            self._asked_ns = None  # the robot still waits
        self._in_flight = None
        self._wanted_now, self._retry_ns = True, now_ns + RETRY_AFTER_NS

    @property
    def _expected_delay_steps(self) -> int:
        return max(self._config.inference_delay, self._measured_delay_steps)

    @property
    def _lifetime_ns(self) -> int:
        return self._config.horizon * self._config.step_ns

    def _cold(self, t_obs_ns: int) -> bool:
        if self._asked_ns is None or t_obs_ns < self._asked_ns:
            return True
        # Between two synchronous chunks the robot has no slots left and yet does not start.
        return t_obs_ns - self._started_ns >= self._lifetime_ns and self._config.chunking != "synchronous"

    def _known(self, t_obs_ns: int) -> np.ndarray:
        if self._config.chunking not in ("rtc", "tt_rtc"):
            return NOTHING
        if self._previous is not None and self._previous.t_obs_ns < self._void_until_ns:
            return NOTHING  # the robot does not go on with it
        known = leftover(self._previous, t_obs_ns)
        # What follows another instruction is executed until the new chunk comes, but says nothing about it.
        return known[: self._expected_delay_steps] if self._instruction_changed else known

    def _sample_delay_steps(self) -> int:
        delay, jitter = self._config.inference_delay, self._config.inference_delay_jitter
        if jitter == 0:
            return delay
        rng = np.random.default_rng((self._config.seed, self._sequence))
        return int(rng.integers(delay - jitter, delay + jitter + 1))


def leftover(previous: ActionChunk | None, t_obs_ns: int) -> np.ndarray:
    """What a chunk does from an observation on: what real-time chunking goes on from.

    Args:
        previous: The chunk as the policy computed it, without corrections; None if there is none.
        t_obs_ns: Stamp of the observation that the next chunk starts from [ns].

    Returns:
        (n, A) float32, the actions from the slot that owns ``t_obs_ns`` to the last; n is 0 if no slot owns it.
    """
    if previous is None:
        return NOTHING
    slot = slot_index(t_obs_ns, previous.t_obs_ns, previous.step_ns)
    return previous.actions[slot:] if slot >= 0 else previous.actions[:0]
