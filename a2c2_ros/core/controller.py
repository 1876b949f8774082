"""The correction loop: what one control tick does. The node, the evaluation and the bag replay all call this class."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.buffer import ChunkBuffer
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ChunkError, ManifestError, ObservationError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import CorrectionHead, HeadInput
from a2c2_ros.core.limits import LimitFlag
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import Reason, State, stale_stream


@dataclass(frozen=True, eq=False)
class ControlStep:
    """Everything that one tick decided; the training record."""

    tick: int  # number of the tick, from 0
    t_tick_ns: int  # scheduled time [ns]
    state: State
    reason: Reason
    detail: str  # for people: the stream, the mismatch; empty if there is nothing to say
    chunk_id: int  # chunk that owns the slot, 0 if none
    t_obs_ns: int  # stamp of that chunk's observation, 0 if none
    slot: int  # k, -1 if none
    horizon: int  # H of that chunk, 0 if none
    chunk_delay_steps: int  # effective d of that chunk: the first of its slots that was executed; -1 if none
    base_action: np.ndarray  # (A,) float32, zeros if there is no chunk
    residual: np.ndarray  # (A,) float32, what the head returned; zeros if it did not run
    command: np.ndarray | None  # (A,) float32, what is to be executed; None: nothing is sent
    limits: LimitFlag
    ages_ns: dict[str, int]  # age of each stream's newest sample
    head_ns: int  # duration of the head [ns], 0 if it did not run


class CorrectionLoop:
    """``a_exec = a_base[k] + head(o_latest, a_base[k], τ_k, z, l)`` at every control step (paper equations 4 and 5).

    Pure and not thread safe: the owner serialises the calls. Nothing in :meth:`tick` waits or raises on bad data: it
    holds, with a reason.
    """

    def __init__(
        self,
        config: ControllerConfig,
        robot: Robot,
        head: CorrectionHead | None = None,
        monotonic_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._config = config
        self._robot = robot
        self._head = head
        self._monotonic_ns = monotonic_ns
        self._buffer = ChunkBuffer()
        self._previous: np.ndarray | None = None
        self._hold: np.ndarray | None = None
        self._started = False
        self._checked: tuple[ActionChunk, str] | None = None
        self._first_slot: tuple[ActionChunk | None, int] = (None, -1)
        self._max_ages_ns = {name: spec.max_age_ns for name, spec in robot.streams.items()}
        self.ticks = 0
        self.counts: Counter[State] = Counter()

    @property
    def config(self) -> ControllerConfig:
        """The parameters in use."""
        return self._config

    @property
    def head(self) -> CorrectionHead | None:
        """The head in use."""
        return self._head

    def configure(self, config: ControllerConfig, head: CorrectionHead | None) -> None:
        """Use other parameters and another head from the next tick on."""
        self._config = config
        if head is not self._head:
            self._head = head
            self._checked = None

    def install(self, chunk: ActionChunk, now_ns: int) -> bool:
        """Take a chunk that has arrived.

        Returns:
            False if it is a duplicate or older than all that are kept.

        Raises:
            ChunkError: If it does not fit the robot or its observation is from the future. Nothing changes then.
        """
        if chunk.action_names != self._robot.action_names:
            raise ChunkError(
                f"chunk {chunk.chunk_id}: action_names are {list(chunk.action_names)}, the robot "
                f"{self._robot.name!r} has {list(self._robot.action_names)}"
            )
        if chunk.t_obs_ns - now_ns > self._config.future_tolerance_ns:
            raise ChunkError(
                f"chunk {chunk.chunk_id}: its observation lies {(chunk.t_obs_ns - now_ns) / 1e9:.3f} s in "
                f"the future, allowed are {self._config.future_tolerance_s} s; are the clocks of the "
                "machines synchronised?"
            )
        installed = self._buffer.install(chunk)
        self._started |= installed
        return installed

    def reset(self) -> None:
        """Forget chunks and the last command: the clock jumped back, or a new start."""
        self._buffer.clear()
        self._previous = self._hold = None
        self._started = False

    def stop(self) -> np.ndarray | None:
        """Forget everything and return the safe command to leave behind, (A,) float32; None if none was sent yet."""
        hold = None if self._previous is None else self._robot.hold.command(self._previous, None)
        self.reset()
        return hold

    def tick(self, t_tick_ns: int, observation: Observation) -> ControlStep:
        """Run one control step.

        Args:
            t_tick_ns: Scheduled time of the tick [ns].
            observation: Newest sample of every stream.

        Returns:
            The step with the command to send.
        """
        ages = observation.ages_ns(t_tick_ns)
        size = len(self._robot.action_names)
        step = _Decision(base_action=np.zeros(size, np.float32), residual=np.zeros(size, np.float32))
        self._decide(step, t_tick_ns, observation, ages)
        limit_flags = LimitFlag.NONE
        command = step.action
        if step.state not in (State.RUNNING, State.BASE_ONLY):
            command = None
            if step.state != State.WAITING:
                if self._hold is None:  # where holding began: a hold that followed the measurement would sag
                    measured = self._robot.measured_of(observation.values)
                    self._hold = self._robot.hold.command(self._previous, measured)
                command = self._hold
        else:
            self._hold = None
        if command is not None:
            command, limit_flags = self._robot.limits.apply(command, self._previous)
            self._previous = command
        result = ControlStep(
            tick=self.ticks,
            t_tick_ns=t_tick_ns,
            state=step.state,
            reason=step.reason,
            detail=step.detail,
            chunk_id=step.chunk.chunk_id if step.chunk else 0,
            t_obs_ns=step.chunk.t_obs_ns if step.chunk else 0,
            slot=step.slot,
            horizon=step.chunk.horizon if step.chunk else 0,
            chunk_delay_steps=self._first_slot[1] if step.chunk else -1,
            base_action=step.base_action,
            residual=step.residual,
            command=command,
            limits=limit_flags,
            ages_ns=ages,
            head_ns=step.head_ns,
        )
        self.ticks += 1
        self.counts[step.state] += 1
        return result

    def _decide(self, step: "_Decision", t_tick_ns: int, observation: Observation, ages: dict[str, int]) -> None:
        if not self._started:
            return step.set(State.WAITING, Reason.NO_CHUNK)
        stale = stale_stream(ages, self._max_ages_ns, self._config.future_tolerance_ns)
        if stale is not None:
            return step.set(State.HOLDING, *stale)
        selected = self._buffer.select(t_tick_ns)
        if selected is None:
            return step.set(State.HOLDING, Reason.CHUNK_EXPIRED)
        step.chunk, step.slot = selected
        if self._first_slot[0] is not step.chunk:
            self._first_slot = selected
        step.base_action = step.action = step.chunk.actions[step.slot]
        if not self._config.correction__enabled:
            return step.set(State.BASE_ONLY, Reason.CORRECTION_DISABLED)
        if self._head is None:
            return step.set(State.BASE_ONLY, Reason.NO_HEAD)
        mismatch = self._mismatch(step.chunk)
        if mismatch:
            return step.set(State.HOLDING, Reason.HEAD_MISMATCH, mismatch)
        return self._correct(step, observation)

    def _correct(self, step: "_Decision", observation: Observation) -> None:
        started_ns = self._monotonic_ns()
        try:
            residual = self._head.correct(
                HeadInput(
                    images=self._robot.images(observation.values),
                    state=self._robot.state_of(observation.values),
                    base_action=step.base_action,
                    time_feature=time_feature(step.slot, step.chunk.horizon),
                    latent=step.chunk.latent,
                    language=step.chunk.language,
                )
            )
        except (ManifestError, ObservationError) as error:
            return step.set(State.BASE_ONLY, Reason.HEAD_FAILED, str(error))
        step.head_ns = self._monotonic_ns() - started_ns
        if residual.shape != step.base_action.shape or not np.isfinite(residual).all():
            return step.set(State.BASE_ONLY, Reason.HEAD_NOT_FINITE, f"residual {residual.tolist()}")
        step.residual = residual.astype(np.float32)
        if np.abs(residual).max() > self._config.residual_limit:
            return step.set(State.BASE_ONLY, Reason.RESIDUAL_TOO_LARGE, f"residual {residual.tolist()}")
        step.action = step.base_action + step.residual
        return step.set(State.RUNNING, Reason.NONE)

    def _mismatch(self, chunk: ActionChunk) -> str:
        """Why the head may not correct this chunk; checked once per chunk."""
        if self._checked is None or self._checked[0] is not chunk:
            manifest = getattr(self._head, "manifest", None)
            text = ""
            if manifest is not None:
                try:
                    manifest.check_chunk(chunk)
                except ManifestError as error:
                    text = str(error)
            self._checked = (chunk, text)
        return self._checked[1]


@dataclass(eq=False)
class _Decision:
    base_action: np.ndarray
    residual: np.ndarray
    action: np.ndarray | None = None
    state: State = State.WAITING
    reason: Reason = Reason.NO_CHUNK
    detail: str = ""
    chunk: ActionChunk | None = None
    slot: int = -1
    head_ns: int = 0

    def set(self, state: State, reason: Reason, detail: str = "") -> None:
        self.state, self.reason, self.detail = state, reason, detail
