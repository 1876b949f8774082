"""How well the control loop does: what diagnostics publish once a second."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import ControlStep
from a2c2_ros.core.limits import LimitFlag
from a2c2_ros.core.safety import EXECUTING, LATCHED, Reason, State
from a2c2_ros.core.seams import Change, ChangeMeter
from a2c2_ros.core.timing import ChunkTiming, StepTiming


class Level(IntEnum):
    """As in diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass(frozen=True)
class Status:
    """One line of the diagnostics."""

    name: str
    level: Level
    message: str
    values: Mapping[str, str]


class LoopHealth:
    """Collects the control steps of the last report's interval.

    :meth:`add` may be called by another thread than :meth:`report`.

    Args:
        streams: Names of the sensor streams.
        keep: Channels of grippers, whose changes do not count.
    """

    CAPACITY = 100_000

    def __init__(self, streams: Sequence[str], keep: Sequence[int] = ()) -> None:
        self._streams = tuple(streams)
        self._meter = ChangeMeter(keep)
        self._records: deque[tuple[ControlStep, StepTiming]] = deque(maxlen=self.CAPACITY)
        self._states: Counter[State] = Counter()
        self._reasons: Counter[Reason] = Counter()
        self._missed = 0
        self._ticks = 0

    def add(self, step: ControlStep, timing: StepTiming) -> None:
        """Take one control step."""
        self._records.append((step, timing))

    def report(
        self,
        config: ControllerConfig,
        interval_s: float,
        received: Mapping[str, int],
        refused: Mapping[str, int],
        chunks: Mapping[str, int],
    ) -> list[Status]:
        """What happened since the last report.

        Args:
            config: Parameters with the thresholds.
            interval_s: Time since the last report [s].
            received: Messages of each stream since the start.
            refused: Messages of each stream that were refused since the start.
            chunks: Chunks since the start by what became of them.

        Returns:
            The lines timing, observations, chunk and state.
        """
        records = [self._records.popleft() for _ in range(len(self._records))]
        self._ticks += len(records)
        self._states.update(step.state for step, _ in records)
        self._reasons.update(step.reason for step, _ in records)
        timing = self._timing(config, interval_s, records)
        if not records:
            return [timing]
        last = records[-1][0]
        changes = [change for step, timing in records if (change := self._change(step, timing)) is not None]
        chunk = _chunk(last, chunks, changes)
        return [timing, self._observations(last, received, refused), chunk, self._state(config, records)]

    def _change(self, step: ControlStep, timing: StepTiming) -> Change | None:
        executed = step.t_obs_ns if step.state in EXECUTING else 0
        return self._meter.add(executed, step.base_action, step.command, timing.missed)

    def _timing(
        self, config: ControllerConfig, interval_s: float, records: list[tuple[ControlStep, StepTiming]]
    ) -> Status:
        missed = sum(timing.missed for _, timing in records)
        self._missed += missed
        error_ms = np.array([abs(timing.period_error_ns) for _, timing in records]) / 1e6
        command_ms = np.array([t.command_latency_ns for _, t in records if t.command_latency_ns]) / 1e6
        head_ms = np.array([step.head_ns for step, _ in records if step.head_ns]) / 1e6
        values = {
            "rate [Hz]": f"{len(records) / interval_s:.2f}",
            "period_error p50 [ms]": _percentile(error_ms, 50),
            "period_error p99 [ms]": _percentile(error_ms, 99),
            "period_error max [ms]": _percentile(error_ms, 100),
            "missed_ticks": str(missed),
            "missed_ticks since start": str(self._missed),
            "ticks since start": str(self._ticks),
            "command_latency p50 [ms]": _percentile(command_ms, 50),
            "command_latency p99 [ms]": _percentile(command_ms, 99),
            "head p50 [ms]": _percentile(head_ms, 50),
            "head p99 [ms]": _percentile(head_ms, 99),
        }
        problems = []
        if not records:
            return Status("timing", Level.ERROR, "no tick", values)
        if missed > config.diagnostics__missed_ticks * interval_s:
            problems.append(f"{missed} ticks missed")
        if np.percentile(error_ms, 99) > 1e3 * config.diagnostics__period_error_s and not config.lockstep:
            problems.append("period error")
        head_limit_ms = 1e3 * config.diagnostics__head_time_s or config.period_ns / 2e6
        if head_ms.size and np.percentile(head_ms, 99) > head_limit_ms:
            problems.append("head is slow")
        return _status("timing", problems, values)

    def _observations(self, last: ControlStep, received: Mapping[str, int], refused: Mapping[str, int]) -> Status:
        values, problems = {}, []
        for stream in self._streams:
            age_ns = last.ages_ns.get(stream)
            values[f"{stream}.age [ms]"] = "none" if age_ns is None else f"{age_ns / 1e6:.1f}"
            values[f"{stream}.received"] = str(received.get(stream, 0))
            values[f"{stream}.refused"] = str(refused.get(stream, 0))
            if age_ns is None:
                problems.append(f"{stream} never delivered")
        if last.reason in (Reason.OBSERVATION_STALE, Reason.OBSERVATION_FUTURE):
            problems.append(f"{last.detail}: {last.reason.name}")
        return _status("observations", problems, values)

    def _state(self, config: ControllerConfig, records: list[tuple[ControlStep, StepTiming]]) -> Status:
        last = records[-1][0]
        limited = sum(step.limits != LimitFlag.NONE for step, _ in records) / len(records)
        values = {
            "state": last.state.name,
            "reason": last.reason.name,
            "detail": last.detail,
            "limited": f"{limited:.2f}",
            **{f"ticks {state.name}": str(self._states[state]) for state in State},
            **{f"ticks for {reason.name}": str(n) for reason, n in sorted(self._reasons.items()) if reason},
        }
        text = f"{last.state.name}: {last.reason.name}" if last.reason else last.state.name
        stops = (Reason.EMERGENCY_STOP, Reason.EMERGENCY_STOP_LOST, Reason.NOT_FOLLOWING, Reason.ROBOT_STOPPED)
        if last.state == State.FAULT or last.reason in stops:
            return Status("state", Level.ERROR, text, values)
        asked_for = last.state in (State.RUNNING, State.WAITING, State.TAKEOVER) or last.state in LATCHED
        if not asked_for and last.reason != Reason.CORRECTION_DISABLED:
            return Status("state", Level.WARN, text, values)
        if limited > config.diagnostics__limited:
            return Status("state", Level.WARN, f"{text}; {limited:.0%} of the commands were limited", values)
        return Status("state", Level.OK, text, values)


def planner_status(
    policy_id: str, instruction: str, idle: str | None, failure: str | None, timing: ChunkTiming | None
) -> Status:
    """The planner's line of the diagnostics.

    Args:
        policy_id: Of the policy in use.
        instruction: What it is told to do.
        idle: Why no inference starts, None if nothing is missing.
        failure: What the last inference failed by, None if it did not.
        timing: Of the last chunk, None before the first.
    """
    values = {"policy_id": policy_id, "instruction": instruction}
    if timing is not None:
        values |= {
            "delay [ms]": f"{timing.delay_ns / 1e6:.1f}",
            "delay [steps]": str(timing.delay_steps),
            "effective delay [steps]": str(timing.effective_delay_steps),
            "execution_horizon [steps]": str(timing.execution_horizon),
        }
    if failure is not None:
        return Status("inference", Level.ERROR, failure, values)
    problems = [text for text in (idle and f"no inference: {idle}", timing and timing.problem) if text]
    return _status("inference", problems, values)


def _chunk(last: ControlStep, chunks: Mapping[str, int], changes: Sequence[Change]) -> Status:
    age_ms = f"{(last.t_tick_ns - last.t_obs_ns) / 1e6:.1f}" if last.chunk_id else "none"
    values = {
        "chunk_id": str(last.chunk_id),
        "slot": str(last.slot),
        "horizon": str(last.horizon),
        "age [ms]": age_ms,
        "measured delay [steps]": str(last.chunk_delay_steps),
        **{f"{name} max": _percentile(np.array(values), 100) for name, values in _by_place(changes).items()},
        **{name: str(n) for name, n in sorted(chunks.items())},
    }
    unwanted = last.state in LATCHED or last.state == State.WAITING
    return _status("chunk", [] if last.chunk_id or unwanted else ["no chunk for this tick"], values)


def _by_place(changes: Sequence[Change]) -> dict[str, list[float]]:
    """Largest change of any channel from tick to tick [action units]."""
    places = {"at seams": [c for c in changes if c.seam], "between seams": [c for c in changes if not c.seam]}
    return {
        f"{what} change {place}": [getattr(change, what) for change in found]
        for place, found in places.items()
        for what in ("base", "command")
    }


def _status(name: str, problems: list[str], values: Mapping[str, str]) -> Status:
    return Status(name, Level.WARN if problems else Level.OK, "; ".join(problems) or "ok", values)


def _percentile(values: np.ndarray, q: float) -> str:
    return f"{np.percentile(values, q):.3f}" if values.size else "none"
