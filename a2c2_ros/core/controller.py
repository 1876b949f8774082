"""The correction loop: what one control tick does. The node, the evaluation and the bag replay all call this class."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.buffer import ChunkBuffer
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ChunkError, HeadError, ManifestError, ObservationError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.gate import ChunkGate
from a2c2_ros.core.governor import Governor
from a2c2_ros.core.head import CorrectionHead, HeadInput
from a2c2_ros.core.limits import LimitFlag
from a2c2_ros.core.observation import CLOCK_JUMP_NS, Observation
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import EXECUTING, MOVING, Latch, Reason, State, Verdict, stale_stream
from a2c2_ros.core.takeover import Takeover


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
    takeover_age_ns: int | None  # age of a person's newest command, None if there is none
    head_ns: int  # duration of the head [ns], 0 if it did not run


class CorrectionLoop:
    """``a_exec = a_base[k] + head(o_latest, a_base[k], τ_k, z, l)`` at every control step (paper equations 4 and 5).

    Pure and not thread safe: the owner serialises the calls. Nothing in :meth:`tick` waits or raises on bad data: it
    holds, with a reason.

    Args:
        config: The parameters.
        robot: What is controlled.
        head: Corrects the base action; None: base actions alone.
        monotonic_ns: A clock that only goes forward [ns]; it times the head.
        latch: Of the loop that this one replaces: what was switched off stays off. ``start_state`` can only add to it.
    """

    def __init__(
        self,
        config: ControllerConfig,
        robot: Robot,
        head: CorrectionHead | None = None,
        monotonic_ns: Callable[[], int] = time.perf_counter_ns,
        latch: Latch | None = None,
    ) -> None:
        self._robot = robot
        self._monotonic_ns = monotonic_ns
        self._buffer = ChunkBuffer()
        self._gate = ChunkGate(config, robot)
        self._governor = Governor(robot, config.period_ns, config.halt_steps)
        enabled = config.start_state == "enabled" or (config.start_state == "auto" and robot.simulated)
        self.latch = latch or Latch(enabled, round(config.emergency_stop_timeout_s * 1e9), not robot.reports_ready)
        if not enabled:
            self.latch.disable()
        self._takeover = Takeover(len(robot.action_names))
        # A chunk of an older observation does not count; None: what is older than the next tick. And the reason, while
        # there is no other chunk.
        self._observed_from_ns: int | None = 0
        self._lacks = Reason.NO_CHUNK
        self._oldest_ns: int | None = None  # a chunk of an older observation was too old at the last tick
        self._checked: tuple[ActionChunk, str] | None = None
        self._first_slot: tuple[ActionChunk | None, int] = (None, -1)
        self._bad_ns: int | None = None  # last tick at which an observation or the clock was bad
        self._head_rests_until_ns = 0
        self._max_ages_ns = {name: spec.max_age_ns for name, spec in robot.streams.items()}
        self._measured_ages_ns = {name: self._max_ages_ns[name] for name in robot.measured_streams}
        self.ticks = 0
        self.counts: Counter[State] = Counter()
        self.reasons: Counter[Reason] = Counter()
        self.chunks: Counter[str] = Counter()  # chunks by what became of them: accepted, duplicate, ChunkError.code
        self.configure(config, head)

    @property
    def config(self) -> ControllerConfig:
        """The parameters in use."""
        return self._config

    @property
    def head(self) -> CorrectionHead | None:
        """The head in use."""
        return self._head

    @property
    def latched(self) -> bool:
        """True if only :meth:`enable` lets the robot move."""
        return self.latch.verdict is not None

    @property
    def silent(self) -> bool:
        """True if the robot is under no command of this loop."""
        return self._governor.silent

    def configure(self, config: ControllerConfig, head: CorrectionHead | None) -> None:
        """Use other parameters and another head from the next tick on.

        A chunk that was too old at the last tick stays so.
        """
        if self._oldest_ns is not None and self._oldest_ns > self._observed_from_ns:
            if self._buffer.observed_since(self._observed_from_ns):
                self._lacks = Reason.CHUNK_EXPIRED
            self._observed_from_ns = self._oldest_ns
        self._config = config
        self._gate.configure(config)
        self._governor.halt_steps = config.halt_steps
        self._head = head
        self._residual_limit = np.full(len(self._robot.action_names), config.residual_limit)
        if trained := getattr(getattr(head, "manifest", None), "residual_range", ()):
            np.minimum(self._residual_limit, config.residual_margin * np.array(trained), out=self._residual_limit)
        self._checked = None
        self._head_rests_until_ns = 0

    def install(self, chunk: ActionChunk, now_ns: int) -> bool:
        """Take a chunk that has arrived.

        Returns:
            False if it is a duplicate or older than all that are kept.

        Raises:
            ChunkError: If it may not move the robot, see :class:`ChunkGate`. Nothing changes then.
        """
        try:
            self._gate.check(chunk, now_ns)
            installed = self._buffer.install(chunk)
        except ChunkError as error:
            self.refused(error)
            raise
        if installed:
            self._gate.follow(chunk)
        self.chunks["accepted" if installed else "duplicate"] += 1
        return installed

    def refused(self, error: ChunkError) -> None:
        """Count a chunk that was refused before it came here."""
        self.chunks[error.code] += 1

    def enable(self) -> None:
        """A person lets the robot move; ends STOPPED and FAULT.

        Raises:
            StateError: If the emergency stop is pressed, or the robot executes no commands.
        """
        self.latch.enable()

    def disable(self) -> None:
        """Stop on purpose: the safe command, then silence, until :meth:`enable`."""
        self.latch.disable()

    def emergency_stop(self, pressed: bool, now_ns: int) -> None:
        """Signal of the emergency stop; a release does not enable."""
        self.latch.emergency_stop(pressed, now_ns)

    def take_over(self, command: np.ndarray, stamp_ns: int, now_ns: int) -> None:
        """A person's command; it replaces the policy's for ``takeover_timeout_s``, within the limits.

        Args:
            command: (A,) action units.
            stamp_ns: When it was given [ns].
            now_ns: The clock [ns].

        Raises:
            ObservationError: If it is not a command, or from the future. Nothing changes then.
        """
        self._takeover.put(command, stamp_ns, now_ns + self._config.future_tolerance_ns)

    def fault(self, detail: str) -> None:
        """The owner of the loop failed: as :meth:`disable`, but in state FAULT."""
        self.latch.fault(Reason.INTERNAL_ERROR, detail)

    def adopt(self, command: np.ndarray | None) -> None:
        """Take (A,) as the last command; for a replay that lacks what a step was decided on."""
        self._governor.adopt(command)

    def forget(self) -> None:
        """Forget every chunk, because the clock went back or a time begins in which this loop controls the robot.

        A chunk that is still on its way does not count if it was observed before the next tick. What was commanded is
        still known.
        """
        self._buffer.clear()
        self._gate.reset()
        self._takeover.clear()
        self._observed_from_ns, self._lacks, self._oldest_ns = None, Reason.NO_CHUNK, None
        self._bad_ns = None
        self._head_rests_until_ns = 0

    def reset(self) -> None:
        """As a new loop: no chunk, and the robot under no command. Latches stay."""
        self.forget()
        self._observed_from_ns = 0
        self._governor.reset()

    def stop(self, t_tick_ns: int, observation: Observation) -> Iterator[np.ndarray]:
        """Come to the hold, forget everything.

        Yields:
            The safe commands to leave behind, (A,) float32, one per control step; none if none was sent yet.
        """
        measured = self._measured(observation, observation.ages_ns(t_tick_ns))
        command, _ = self._governor.hold(measured)
        while command is not None:
            yield command
            if self._governor.arrived:
                break
            command, _ = self._governor.hold(measured)
        self.forget()
        self._governor.release()

    def tick(self, t_tick_ns: int, observation: Observation, problem: Verdict | None = None) -> ControlStep:
        """Run one control step.

        Args:
            t_tick_ns: Scheduled time of the tick [ns].
            observation: Newest sample of every stream.
            problem: Why the robot has to hold, if the owner knows a reason (its clock).

        Returns:
            The step with the command to send.
        """
        ages = observation.ages_ns(t_tick_ns)
        size = len(self._robot.action_names)
        step = _Decision(base_action=np.zeros(size, np.float32), residual=np.zeros(size, np.float32))
        command, flags = self._decide(step, t_tick_ns, observation, ages, problem)
        verdict = step.verdict
        result = ControlStep(
            tick=self.ticks,
            t_tick_ns=t_tick_ns,
            state=verdict.state,
            reason=verdict.reason,
            detail=verdict.detail,
            chunk_id=step.chunk.chunk_id if step.chunk else 0,
            t_obs_ns=step.chunk.t_obs_ns if step.chunk else 0,
            slot=step.slot,
            horizon=step.chunk.horizon if step.chunk else 0,
            chunk_delay_steps=self._first_slot[1] if step.chunk else -1,
            base_action=step.base_action,
            residual=step.residual,
            command=command,
            limits=flags,
            ages_ns=ages,
            takeover_age_ns=self._takeover.age_ns(t_tick_ns),
            head_ns=step.head_ns,
        )
        self.ticks += 1
        self.counts[verdict.state] += 1
        self.reasons[verdict.reason] += 1
        return result

    def rest_of_chunk(self, step: ControlStep) -> np.ndarray:
        """What the chunk wants after the step that was just decided, for robots that take trajectories.

        Returns:
            (n, A) float32, the base actions of the slots that follow, within the limits from the step's command on; n
            is 0 unless the step executed a slot.
        """
        if step.state not in EXECUTING:
            return np.zeros((0, len(self._robot.action_names)), np.float32)
        chunk, _ = self._first_slot
        return self._governor.foresee(chunk.actions[step.slot + 1 :])

    def _decide(
        self,
        step: "_Decision",
        t_tick_ns: int,
        observation: Observation,
        ages: dict[str, int],
        problem: Verdict | None,
    ) -> tuple[np.ndarray | None, LimitFlag]:
        self.latch.watch(t_tick_ns)
        if self._knows_the_future(t_tick_ns):
            self.forget()
        if self._observed_from_ns is None:
            self._observed_from_ns = t_tick_ns
        self._oldest_ns = t_tick_ns - self._config.max_chunk_age_ns
        if self.latch.verdict is not None:
            return self._stopped(step, t_tick_ns, self._measured(observation, ages))
        person = self._takeover.command(t_tick_ns, self._config.takeover_timeout_ns)
        if person is None and self._governor.silent and not self._buffer:
            step.verdict = Verdict(State.WAITING, Reason.NO_CHUNK)
            return None, LimitFlag.NONE
        held = self._observed(t_tick_ns, ages, problem)  # in every tick: it remembers when data was bad
        if person is not None:
            held = self._driven(step, t_tick_ns, ages, problem)
        elif held is None:
            held = self._select(step, t_tick_ns, self._observed_from_ns)
        measured = self._measured(observation, ages)
        if held is None and self._governor.starting:
            outside = self._governor.outside(measured)
            if outside:
                held = Verdict(State.HOLDING, Reason.OUTSIDE_LIMITS, outside)
        if held is None:
            if person is not None:
                step.action, step.verdict = person, Verdict(State.TAKEOVER)
            else:
                # The head is asked before the approach: a head that fails must find the arm holding, not underway.
                step.verdict = self._correct(step, t_tick_ns, observation)
                step.verdict = self._aged_meanwhile(step, t_tick_ns, ages) or step.verdict
            if step.verdict.state in MOVING:
                if person is None and not self._governor.starting:
                    # A person who drives sees the arm, and may press it against something.
                    away = self._governor.not_following(measured)
                    if away:
                        self.latch.not_following(away)
                        return self._stopped(step, t_tick_ns, measured)
                approach = self._governor.approach(measured)
                if approach is None:
                    return self._governor.move(step.action)
                step.verdict = Verdict(State.HOLDING, Reason.REARMING)
                return approach
            held = step.verdict
        step.verdict = held
        return self._governor.hold(measured)

    def _knows_the_future(self, t_tick_ns: int) -> bool:
        """True if the clock was ahead between two ticks: what came then would count when its time comes."""
        age_ns = self._takeover.age_ns(t_tick_ns)
        if age_ns is not None and age_ns < -CLOCK_JUMP_NS:
            return True
        return self._buffer.observed_since(t_tick_ns + CLOCK_JUMP_NS)

    def _stopped(
        self, step: "_Decision", t_tick_ns: int, measured: np.ndarray | None
    ) -> tuple[np.ndarray | None, LimitFlag]:
        """The latched state: what was observed or commanded until now does not move the robot when it is enabled."""
        step.verdict = self.latch.verdict
        self._observed_from_ns, self._lacks = t_tick_ns, Reason.NO_CHUNK
        self._takeover.end()
        return self._governor.halt(measured)

    def _observed(self, t_tick_ns: int, ages: dict[str, int], problem: Verdict | None) -> Verdict | None:
        """Why the observations do not let the robot move, or None."""
        if problem is None:
            stale = stale_stream(ages, self._max_ages_ns, self._config.future_tolerance_ns)
            problem = None if stale is None else Verdict(State.HOLDING, *stale)
        if problem is not None:
            self._bad_ns = t_tick_ns
            return problem
        if self._bad_ns is not None:
            if t_tick_ns - self._bad_ns < self._config.rearm_after_ns:
                return Verdict(State.HOLDING, Reason.REARMING)
            self._bad_ns = None
        return None

    def _driven(
        self, step: "_Decision", t_tick_ns: int, ages: dict[str, int], problem: Verdict | None
    ) -> Verdict | None:
        """A person commands: pick the slot for the record alone; why the person's command may not move, or None.

        A person sees the robot, so a camera may be stale; where a position starts from must be known.
        """
        self._select(step, t_tick_ns)
        self._observed_from_ns, self._lacks = t_tick_ns, Reason.TAKEOVER_ENDED
        if problem is not None:
            return problem
        stale = self._stale_measurement(ages)
        return None if stale is None else Verdict(State.HOLDING, *stale)

    def _aged_meanwhile(self, step: "_Decision", t_tick_ns: int, ages: dict[str, int]) -> Verdict | None:
        """Why observations or chunk are too old by the time that the head is done, or None."""
        if self._config.head_deadline_ns is None:
            return None
        aged = {name: age + step.head_ns for name, age in ages.items()}
        stale = stale_stream(aged, self._max_ages_ns, self._config.future_tolerance_ns + step.head_ns)
        if stale is not None:
            return Verdict(State.HOLDING, *stale)
        done_ns, chunk = t_tick_ns + step.head_ns, step.chunk
        if done_ns >= chunk.t_end_ns or done_ns - chunk.t_obs_ns > self._config.max_chunk_age_ns:
            return Verdict(State.HOLDING, Reason.CHUNK_EXPIRED, "when the head was done")
        return None

    def _select(self, step: "_Decision", t_tick_ns: int, observed_from_ns: int = 0) -> Verdict | None:
        """Pick the slot; why it may not be executed, or None."""
        selected = self._buffer.select(t_tick_ns, observed_from_ns)
        if selected is None:
            used_up = self._buffer.observed_since(self._observed_from_ns)
            return Verdict(State.HOLDING, Reason.CHUNK_EXPIRED if used_up else self._lacks)
        chunk, slot = selected
        age_ns = t_tick_ns - chunk.t_obs_ns
        if age_ns > self._config.max_chunk_age_ns:
            return Verdict(
                State.HOLDING, Reason.CHUNK_EXPIRED, f"slot {slot} is {age_ns / 1e9:.3f} s after its observation"
            )
        if self._first_slot[0] is not chunk:
            self._first_slot = selected
        step.chunk, step.slot = selected
        step.base_action = step.action = chunk.actions[slot]
        mismatch = self._mismatch(chunk) if self._config.correction__enabled else ""
        return Verdict(State.HOLDING, Reason.HEAD_MISMATCH, mismatch) if mismatch else None

    def _measured(self, observation: Observation, ages: dict[str, int]) -> np.ndarray | None:
        """The measured position in action units, NaN in channels of which it is not known now; None if of none."""
        limits_ns, tolerance_ns = self._measured_ages_ns, self._config.future_tolerance_ns
        fresh = {
            name: value
            for name, value in observation.values.items()
            if name in limits_ns and stale_stream(ages, {name: limits_ns[name]}, tolerance_ns) is None
        }
        return self._robot.measured_of(fresh) if fresh else None

    def _stale_measurement(self, ages: dict[str, int]) -> tuple[Reason, str] | None:
        return stale_stream(ages, self._measured_ages_ns, self._config.future_tolerance_ns)

    def _correct(self, step: "_Decision", t_tick_ns: int, observation: Observation) -> Verdict:
        """Add the head's residual to the action."""
        if not self._config.correction__enabled:
            return Verdict(State.BASE_ONLY, Reason.CORRECTION_DISABLED)
        if self._head is None:
            return Verdict(State.BASE_ONLY, Reason.NO_HEAD)
        if t_tick_ns < self._head_rests_until_ns:
            return self._failed(Reason.HEAD_LATE, "resting")
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
        except (HeadError, ManifestError, ObservationError) as error:
            step.head_ns = self._monotonic_ns() - started_ns
            return self._failed(Reason.HEAD_FAILED, str(error))
        step.head_ns = self._monotonic_ns() - started_ns
        if residual.shape != step.base_action.shape or not np.isfinite(residual).all():
            return self._failed(Reason.HEAD_NOT_FINITE, f"residual {residual.tolist()}")
        step.residual = residual.astype(np.float32)
        if (beyond := np.abs(residual) > self._residual_limit).any():
            channel = int(np.argmax(beyond))
            return self._failed(
                Reason.RESIDUAL_TOO_LARGE,
                f"{self._robot.action_names[channel]}: {residual[channel]:.4g}, allowed are "
                f"+-{self._residual_limit[channel]:.4g}",
            )
        deadline_ns = self._config.head_deadline_ns
        if deadline_ns is not None and step.head_ns > deadline_ns:
            retry_ns = round(self._config.correction__retry_after_s * 1e9)
            self._head_rests_until_ns = t_tick_ns + step.head_ns + retry_ns
            return self._failed(Reason.HEAD_LATE, f"{step.head_ns / 1e6:.1f} ms, allowed {deadline_ns / 1e6:.1f} ms")
        step.action = step.base_action + step.residual
        return Verdict(State.RUNNING)

    def _failed(self, reason: Reason, detail: str) -> Verdict:
        """What ``correction.on_failure`` says."""
        holds = self._config.correction__on_failure == "hold"
        return Verdict(State.HOLDING if holds else State.BASE_ONLY, reason, detail)

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
    verdict: Verdict = Verdict(State.WAITING)
    chunk: ActionChunk | None = None
    slot: int = -1
    head_ns: int = 0
