"""The judge of the fault suite: watches a control loop from outside and says which promise was broken, and when.

It knows the limits as plain numbers and the names of states and reasons, nothing else of the loop. What was delivered
to the loop it is told by whoever delivered it, so a loop that believes a wrong stamp or a damaged chunk does not
convince the judge.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from a2c2_ros.core.safety import LATCHED, MOVING, Reason, State

INVARIANTS = {
    "finite": "every command has one finite value per channel",
    "position limit": "every command is inside [lower, upper]",
    "elsewhere": "the policy moves the robot to base action + residual: a command lies between the last one and there, "
    "and is short of it only by a limit; the residual is within its own",
    "step limit": "a command differs from the one before by at most min(step, velocity * period)",
    "stale data moved the robot": "what moves the robot was computed from fresh, valid data and a slot in [0, H)",
    "hold bound": "from the first tick that shows a fault the commands reach the hold within ceil(max|d| / step) + 1 "
    "ticks and stay there",
    "recovery jump": "the first motion starts within a step of where the robot is",
    "rearming": "after bad observations or a bad clock nothing moves before they were good for rearm_after_s",
    "latched": "after an emergency stop, a disable or a defect nothing moves until a person enables",
    "takeover": "a person's fresh command is followed within the limits; afterwards no chunk that was observed before "
    "is executed",
    "following": "an arm that is measured too far from its command is stopped, and only such an arm",
    "planners took turns": "a second planner does not move the robot while the first has a chunk",
    "no recovery": "with good data the robot moves again within the bound",
    "record": "every command that was sent is in the record of its tick, and every command of the record was sent",
    "parameters": "a wrong value is refused",
    "ticks": "of the ticks that are due nine in ten come, wherever a controller runs",
    "counters": "states and chunk outcomes add up to the ticks and chunks",
}

HARMLESS = frozenset({"counters", "no recovery", "parameters", "record", "ticks"})
"""Broken promises that are no unsafe command."""

RELATIVE = 1e-6  # of the step limit: float32
POSITION = 1e-5  # [action units] two positions are the same
POLICY_MOVES = MOVING - {State.TAKEOVER}
BORDER_NS = 5_000_000  # data so near to its largest age need not move the robot: the command leaves a little later
BACKLOG_NS = 1_000_000_000
KEPT = 4096  # samples and chunks that are remembered


@dataclass(frozen=True, eq=False)
class Rules:
    """What the robot and the parameters allow, as plain numbers."""

    kind: str  # "position" or "delta"
    names: tuple[str, ...]  # A channels
    lower: np.ndarray  # (A,) float64, action units
    upper: np.ndarray
    step: np.ndarray  # (A,) float64, largest change per control step; inf for none
    velocity: np.ndarray  # (A,) float64, largest change per second; inf for none
    period_ns: int
    max_ages_ns: Mapping[str, int]  # stream -> allowed age
    keep: tuple[int, ...] = ()  # channels that keep their last command in a hold
    keep_default: tuple[float, ...] = ()  # their values before the first command
    measured_streams: tuple[str, ...] = ()  # the streams that tell the position; none for pose deltas
    following: np.ndarray | None = None  # (A,) float64, largest distance of a moving arm from its command; None: any
    reports_ready: bool = False  # the robot says whether it executes commands
    lag_s: float = 0.3  # an arm that is farther behind than the way at its limits in this time holds where it is
    max_chunk_age_ns: int = 5_000_000_000
    future_tolerance_ns: int = 50_000_000
    action_margin: float = 1.0
    residual_limit: float = 4.0  # largest |residual| that may be executed, action units
    rearm_after_ns: int = 100_000_000
    stop_timeout_ns: int = 0
    takeover_timeout_ns: int = 200_000_000
    recovery_ns: int = 200_000_000  # beside rearm_after and the way to where the arm is, time to move again
    stamp_slack_ns: int = 0  # ages are told with this accuracy
    grace_ns: int = 0  # time from a person's order to the tick that must obey

    @property
    def largest(self) -> np.ndarray:
        """(A,) float64 largest change per control step by both limits."""
        return np.minimum(self.step, self.velocity * (self.period_ns / 1e9))

    @property
    def lag(self) -> np.ndarray:
        """(A,) float64 largest distance of an arm that follows from its command."""
        largest = self.largest
        return np.where(largest > 0, largest * max(1.0, self.lag_s * 1e9 / self.period_ns), np.inf)


@dataclass(frozen=True, eq=False)
class GivenChunk:
    """A chunk as it was handed to the loop, damaged or not."""

    chunk_id: int
    t_obs_ns: int
    step_ns: int
    actions: np.ndarray  # any shape
    names: tuple[str, ...]
    planner: str


@dataclass(frozen=True, eq=False)
class Seen:
    """One tick as it was seen from outside."""

    t_ns: int  # scheduled time on the ROS clock
    wall_ns: int  # steady time
    state: State
    reason: Reason
    command: np.ndarray | None  # (A,), None: nothing was sent
    ages_ns: Mapping[str, int]  # what the loop says of its data
    t_obs_ns: int  # chunk that the loop says it executes
    chunk_id: int
    slot: int
    base_action: np.ndarray
    residual: np.ndarray  # what the head returned
    sent_ns: int | None = None  # time on the ROS clock at which the command left, if it is known


@dataclass(frozen=True)
class Violation:
    """A broken promise."""

    tick: int  # number of the tick as the judge counts, from 0
    t_ns: int
    invariant: str  # a key of INVARIANTS
    detail: str
    faults: tuple[str, ...]  # what was being done to the loop


@dataclass(frozen=True)
class Delay:
    """How long something took."""

    ticks: int
    ms: float
    cause: str  # what the judge saw
    faults: tuple[str, ...]
    ended_ns: int  # steady time


@dataclass(eq=False)
class _Leg:
    """On the way to a hold, or to where the robot is measured."""

    target: np.ndarray
    budget: int  # ticks in which it must be reached
    approaches: bool = False
    also: list[np.ndarray] = field(default_factory=list)  # where it may be going as well
    ticks: int = 0
    reached: bool = False


@dataclass(eq=False)
class _Stream:
    """Good samples of a stream: stamp to measured position."""

    measured: dict[int, np.ndarray | None] = field(default_factory=dict)
    stamps: list[int] = field(default_factory=list)  # sorted

    def add(self, stamp_ns: int, measured: np.ndarray | None) -> None:
        if stamp_ns in self.measured:
            return
        self.measured[stamp_ns] = measured
        self.stamps.insert(bisect_left(self.stamps, stamp_ns), stamp_ns)
        if len(self.stamps) > KEPT:
            del self.measured[self.stamps.pop(0)]

    def find(self, stamp_ns: int, slack_ns: int) -> int | None:
        """The stamp of a good sample that is this one."""
        i = bisect_left(self.stamps, stamp_ns - slack_ns)
        return self.stamps[i] if i < len(self.stamps) and self.stamps[i] <= stamp_ns + slack_ns else None


class Judge:
    """Watches one control loop.

    Tell it everything that is given to the loop (:meth:`sample`, :meth:`chunk`, :meth:`enable` ...) before the tick
    that could see it, and every :meth:`tick`. Read ``violations``, ``holds`` and ``recoveries``.

    Args:
        rules: Replace the attribute when parameters change.
        may_move: False if the loop starts disabled.
    """

    def __init__(self, rules: Rules, may_move: bool = True) -> None:
        self.rules = rules
        self.faults: tuple[str, ...] = ()  # what is being done to the loop, for the record
        self.head_fails = False  # the head fails now, and the parameters say that the loop holds then
        self.head_rests = False  # it may still hold for a head that failed before
        self.violations: list[Violation] = []
        self.holds: list[Delay] = []
        self.recoveries: list[Delay] = []
        self.ticks = 0
        self.states: Counter[State] = Counter()
        self.chunks = 0
        self.unsafe_ticks: set[int] = set()
        self._wall_ns = 0
        self.restarted(may_move)

    # --- what is given to the loop ------------------------------------------------------------------------------

    def sample(self, stream: str, stamp_ns: int, now_ns: int, sound: bool, measured: np.ndarray | None = None) -> None:
        """A sample was delivered.

        Args:
            stream: Name.
            stamp_ns: Its stamp.
            now_ns: ROS time of its arrival.
            sound: Its shape, dtype and values are right.
            measured: (A,) position in action units that it tells, NaN for what is not measured.
        """
        if not sound or not 0 < stamp_ns <= now_ns + self.rules.future_tolerance_ns:
            return
        stamps = self._streams[stream].stamps
        if stamps and stamp_ns < stamps[-1] - BACKLOG_NS:
            self._good = None  # the loop may hold again: so old a sample can mean that the clock went back
        self._streams[stream].add(stamp_ns, measured)

    def chunk(self, chunk: GivenChunk, now_ns: int, accepted: bool | None = None) -> None:
        """A chunk was delivered; ``accepted`` is what the loop said, None if it did not say."""
        self.chunks += 1
        valid = self._valid(chunk, now_ns)
        self._given.setdefault((chunk.t_obs_ns, chunk.chunk_id), []).append((chunk, valid))
        if len(self._given) > KEPT:
            del self._given[next(iter(self._given))]
        if valid and accepted is not False:
            self._usable.append(chunk)
            self._usable.sort(key=lambda c: c.t_obs_ns, reverse=True)
            del self._usable[4:]

    def takeover(self, command: np.ndarray, stamp_ns: int, now_ns: int) -> None:
        """A person's command was delivered."""
        sound = command.shape == (len(self.rules.names),) and bool(np.isfinite(command).all())
        newest = self._person is None or stamp_ns > self._person[0]
        if sound and newest and 0 < stamp_ns <= now_ns + self.rules.future_tolerance_ns:
            self._person = stamp_ns, np.clip(command, self.rules.lower, self.rules.upper)
            self._person_ended = False

    def enabling(self) -> None:
        """A person asks to enable the loop: from now on it may be enabled, the answer comes later."""
        self._asked = True

    def enable(self, accepted: bool = True) -> None:
        """A person enabled the loop, or was refused."""
        self._asked = False
        if accepted and self.pressed:
            self._violation("latched", "enabled while the emergency stop is pressed")
        if accepted and not self.ready:
            self._violation("latched", "enabled while the robot does not say that it executes commands")
        if accepted:
            self._latched_ns = self._signal_ns = None

    def disable(self) -> None:
        """A person disabled the loop."""
        self._latch()

    def emergency_stop(self, pressed: bool, now_ns: int) -> None:
        """The emergency stop sent its state."""
        self.pressed = pressed
        self._signal_ns = now_ns
        if pressed:
            self._latch()

    def robot_ready(self, ready: bool) -> None:
        """The robot said whether it executes commands."""
        self.ready = ready
        if not ready:
            self._latch()

    def defect(self) -> None:
        """The loop raised."""
        self._latch()

    def restarted(self, may_move: bool = True, known_from_ns: int | None = None) -> None:
        """A new loop: it knows nothing, commanded nothing, and may move the robot if it starts enabled.

        Args:
            may_move: It starts enabled.
            known_from_ns: Chunks of observations from this time [ns] on may count, because its first ticks may not be
                heard; those from the first one heard on must. None: from its first tick on.
        """
        self._last_t_ns: int | None = None
        self._latched_ns: int | None = None if may_move else -(10**18)
        self._asked = False
        self.pressed = False
        self.ready = not self.rules.reports_ready
        self._signal_ns: int | None = None
        self._forget_data()
        self._known_from_ns = known_from_ns
        self._kept: np.ndarray | None = None  # last command
        self._silence()

    def _silence(self) -> None:
        """The robot is under no command, and no chunk is known."""
        self._last: np.ndarray | None = None
        self._leg: _Leg | None = None
        self._where: list[np.ndarray] = []  # where the arm was measured since its data came back
        self._was_moving = False
        self._recovery_budget = 0
        self._bad: tuple[int, int, str] | None = None  # tick and wall time of the first tick that showed a fault; fault
        self._held: tuple[int, int, str] | None = None  # as _bad, while the hold is not reached
        self._good: tuple[int, int] | None = None  # tick and wall time of the first tick with good data, not moving
        self._forget_chunks()

    # --- what the loop does -------------------------------------------------------------------------------------

    def tick(self, seen: Seen) -> None:
        """Judge one tick."""
        self._wall_ns = seen.wall_ns
        clock = ""
        if self._last_t_ns is not None and seen.t_ns <= self._last_t_ns:
            clock = "the clock stands still"
            if seen.t_ns < self._last_t_ns:
                clock = "the clock went back"
                self._forget_data()
        self._watch_ages(seen.t_ns)
        self._last_t_ns = seen.t_ns
        self._watch_signal(seen.t_ns)
        self._watch_following(seen)
        if self._latched_ns is not None and seen.state in LATCHED:
            self._known_from_ns, self._person_ended = seen.t_ns, True
        if self._latched_ns is None and self._drives(seen.t_ns):
            self._commanded_ns = seen.t_ns
        problem = self._problem(seen.t_ns, clock)
        moving = seen.state in MOVING
        self._watch_observations(seen, clock)
        if moving:
            self._check_latch(seen, clock)
            if seen.state == State.TAKEOVER:
                self._check_person(seen)
            else:
                self._check_data(seen)
                self._check_action(seen)
        self._check_command(seen, moving)
        self._check_hold(seen, moving, problem)
        self._measure(seen, moving, problem if moving else self._problem(seen.t_ns, clock, BORDER_NS))
        if seen.command is not None:
            self._last = self._kept = np.asarray(seen.command, np.float64)
        else:
            self._last = self._leg = None
        self._was_moving = moving
        self.ticks += 1
        self.states[seen.state] += 1

    def leave(self, seen: Seen) -> None:
        """Judge a command that the loop leaves behind when it is shut down on purpose; not a tick."""
        self._check_command(seen, moving=False)
        self._check_hold(seen, moving=False, problem="shut down")
        if seen.command is not None:
            self._last = self._kept = np.asarray(seen.command, np.float64)

    def left(self) -> None:
        """The shutdown is over: the hold must have been reached if the robot was under a command."""
        if self._last is not None and (self._leg is None or not self._leg.reached):
            self._violation("hold bound", "shut down before the hold was reached")
        self._last_t_ns = None
        self._forget_data()
        self._silence()

    def report(self, invariant: str, detail: str) -> None:
        """A broken promise that somebody else saw."""
        self._violation(invariant, detail)

    def finish(self, ticks: int, states: Mapping[State, int], reasons: Mapping[Reason, int], chunks: int) -> None:
        """Compare the loop's own counters with what was seen; ``chunks`` is the sum of all outcomes."""
        for name, theirs, ours in (
            ("ticks", ticks, self.ticks),
            ("states", {k: n for k, n in states.items() if n}, dict(self.states)),
            ("reasons", sum(reasons.values()), self.ticks),
            ("chunks", chunks, self.chunks),
        ):
            if theirs != ours:
                self._violation("counters", f"{name}: the loop says {theirs}, seen were {ours}")

    # --- data ---------------------------------------------------------------------------------------------------

    def _forget_data(self) -> None:
        self._person: tuple[int, np.ndarray] | None = None  # stamp and command
        self._person_ended = False  # it does not count any more
        self._known_from_ns: int | None = None  # chunks of older observations do not count; None: than the next tick
        self._heard_from_ns: int | None = None  # first tick since
        self._age_limit_ns = self.rules.max_chunk_age_ns  # at the last tick
        self._driven_ns = 0  # last tick of a takeover
        self._commanded_ns = 0  # last tick at which a person commanded, perhaps in vain
        self._unfit_ns: int | None = None  # last tick at which an observation or the clock was bad
        self._streams = {name: _Stream() for name in self.rules.max_ages_ns}
        self._forget_chunks()

    def _forget_chunks(self) -> None:
        self._usable: list[GivenChunk] = []
        self._given: dict[tuple[int, int], list[tuple[GivenChunk, bool]]] = {}
        self._owner, self._owner_until_ns = "", 0

    def _latch(self) -> None:
        self._asked = False
        if self._latched_ns is None:
            self._latched_ns = self._wall_ns

    def _watch_signal(self, t_ns: int) -> None:
        timeout_ns = self.rules.stop_timeout_ns
        if not timeout_ns or self._latched_ns is not None:
            return
        if self._signal_ns is None or t_ns < self._signal_ns:
            self._signal_ns = t_ns
        if t_ns - self._signal_ns > timeout_ns:
            self._latch()

    def _watch_ages(self, t_ns: int) -> None:
        """What was too old at the last tick stays so, whatever the parameters become."""
        limit_ns = self.rules.max_chunk_age_ns
        if self._heard_from_ns is None:
            self._heard_from_ns = t_ns
        if self._known_from_ns is None:
            self._known_from_ns = t_ns
        elif limit_ns > self._age_limit_ns and self._last_t_ns is not None:
            self._known_from_ns = max(self._known_from_ns, self._last_t_ns - self._age_limit_ns)
        self._age_limit_ns = limit_ns
        if self._person is not None:
            self._person_ended |= t_ns - self._person[0] > self.rules.takeover_timeout_ns

    def _watch_following(self, seen: Seen) -> None:
        """An arm that does not follow latches."""
        following, claims = self.rules.following, seen.reason == Reason.NOT_FOLLOWING and self._latched_ns is None
        measured = self._claimed_measured(seen)
        away = np.full(len(self.rules.names), -np.inf)  # farther than allowed
        if self._last is not None and measured is not None and self._was_moving and following is not None:
            known = ~np.isnan(measured) & ~self._outside(measured)
            away[known] = np.abs(measured - self._last)[known] - following[known]
        if claims and not (away > -POSITION).any():
            self._violation("following", f"stopped {-away.max():g} before the arm was too far from its command")
        if seen.state in POLICY_MOVES and (away > POSITION).any():
            self._violation("following", f"moved on {away.max():g} too far from where the arm is measured")
        if claims:
            self._latch()

    def _watch_observations(self, seen: Seen, clock: str) -> None:
        """Data that came back has to stay for a while; in silence before a chunk and in a latch nobody waits for it."""
        bad = clock or self._stale_one(seen.t_ns, self.rules.max_ages_ns)
        if bad and seen.state in (State.HOLDING, State.TAKEOVER):
            self._unfit_ns = seen.t_ns
        elif self._unfit_ns is not None and seen.t_ns - self._unfit_ns >= self.rules.rearm_after_ns:
            self._unfit_ns = None

    def _stale_one(self, t_ns: int, streams: Iterable[str], border_ns: int = 0) -> str:
        """The first of the streams that has no fresh sample, empty if there is none."""
        for stream in streams:
            stamp_ns = self._newest(stream, t_ns)
            if stamp_ns is None or t_ns - stamp_ns > self.rules.max_ages_ns[stream] - border_ns:
                return stream
        return ""

    def _valid(self, chunk: GivenChunk, now_ns: int) -> bool:
        rules, actions = self.rules, np.asarray(chunk.actions, np.float64)
        if chunk.chunk_id < 1 or chunk.step_ns != rules.period_ns or chunk.t_obs_ns < 0 or chunk.names != rules.names:
            return False
        if actions.ndim != 2 or not len(actions) or actions.shape[1] != len(rules.names):
            return False
        margin = rules.action_margin * (rules.upper - rules.lower) * (1 + RELATIVE) + RELATIVE
        if not np.isfinite(actions).all() or (actions < rules.lower - margin).any():
            return False
        return not (actions > rules.upper + margin).any() and chunk.t_obs_ns - now_ns <= rules.future_tolerance_ns

    def _problem(self, t_ns: int, clock: str, border_ns: int = 0) -> str:
        """Why the robot may not move at this tick, by what was delivered; empty if it may.

        Data within ``border_ns`` of its largest age counts as too old.
        """
        if self._latched_ns is not None:
            return "latched"
        if clock:
            return clock
        driven, names = self._drives(t_ns), self.rules.measured_streams
        needed = names if driven else self.rules.max_ages_ns
        stale = self._stale_one(t_ns, needed, border_ns)
        if stale:
            return f"{stale} is stale"
        from_ns = max(self._commanded_ns, self._known_from_ns, self._heard_from_ns)
        known = [chunk for chunk in self._usable if chunk.t_obs_ns >= from_ns]
        if not driven and not any(self._slot_error(chunk, t_ns) == "" for chunk in known):
            return "no chunk"
        if self.head_fails and not driven:
            return "head"
        if self._was_moving:
            return ""
        newest = [self._streams[name].measured[self._newest(name, t_ns)] for name in names]
        return "measured outside the limits" if any(self._outside(m).any() for m in newest) else ""

    def _drives(self, t_ns: int) -> bool:
        """A person commands at this tick."""
        if self._person is None or self._person_ended:
            return False
        return -BACKLOG_NS <= t_ns - self._person[0] <= self.rules.takeover_timeout_ns

    def _newest(self, stream: str, t_ns: int) -> int | None:
        """Stamp of the newest good sample that may count at the tick."""
        stamps = self._streams[stream].stamps
        i = bisect_right(stamps, t_ns + self.rules.future_tolerance_ns)
        return stamps[i - 1] if i else None

    def _slot_error(self, chunk: GivenChunk, t_ns: int) -> str:
        age_ns = t_ns - chunk.t_obs_ns
        slot, horizon = age_ns // chunk.step_ns, len(chunk.actions)
        if not 0 <= slot < horizon:
            return f"slot {slot} of chunk {chunk.chunk_id} with {horizon} slots"
        if age_ns > self.rules.max_chunk_age_ns:
            return f"chunk {chunk.chunk_id} is {age_ns / 1e9:.3f} s old"
        if chunk.t_obs_ns < self._driven_ns:
            return f"chunk {chunk.chunk_id} was observed before a takeover ended"
        if chunk.t_obs_ns < self._known_from_ns:
            return f"chunk {chunk.chunk_id} was observed before a start or stop, or was too old before"
        return ""

    def _claimed_measured(self, seen: Seen) -> np.ndarray | None:
        """The position that the loop knew at the tick, where it was fresh and is one that was delivered; NaN elsewhere.

        None if nothing of it is known.
        """
        known = [m for name in self.rules.measured_streams if (m := self._claimed_of(name, seen)) is not None]
        measured = None
        for part in known:
            measured = part if measured is None else np.where(np.isnan(part), measured, part)
        return measured

    def _claimed_of(self, name: str, seen: Seen) -> np.ndarray | None:
        age_ns = seen.ages_ns.get(name)
        if age_ns is None or not -self.rules.future_tolerance_ns <= age_ns <= self.rules.max_ages_ns[name]:
            return None
        stamp_ns = self._streams[name].find(seen.t_ns - age_ns, self.rules.stamp_slack_ns)
        return None if stamp_ns is None else self._streams[name].measured[stamp_ns]

    def _unknown(self, seen: Seen) -> str:
        """A stream of which the loop knew no position at the tick, empty if there is none."""
        return next((name for name in self.rules.measured_streams if self._claimed_of(name, seen) is None), "")

    def _outside(self, measured: np.ndarray) -> np.ndarray:
        """(A,) bool: channels where no arm within its limits can be, or a person has to move it."""
        largest = self.rules.largest
        slack = np.where(np.isfinite(largest), largest, 0.0) * (1 + RELATIVE) + RELATIVE
        return (measured < self.rules.lower - slack) | (measured > self.rules.upper + slack)  # False for NaN

    def _check_latch(self, seen: Seen, clock: str) -> None:
        """The robot moves: may it?"""
        grace_ns = self.rules.grace_ns
        if self._latched_ns is not None and not self._asked and seen.wall_ns - self._latched_ns > grace_ns:
            self._violation("latched", f"{seen.state.name} after a stop")
        if clock:
            self._stale(clock)

    def _check_person(self, seen: Seen) -> None:
        """A person moves the robot: to where the person says?"""
        self._driven_ns = seen.t_ns
        if not self._drives(seen.t_ns):
            self._stale("nobody commands")
            return
        reference, unknown = self._reference(seen), self._unknown(seen)
        if unknown:
            self._stale(f"{unknown} is stale")
        if reference is None or seen.command is None or seen.command.shape != reference.shape:
            return  # told elsewhere
        wanted = self._person[1]
        if (np.abs(seen.command - wanted) > np.abs(reference - wanted) * (1 + RELATIVE) + POSITION).any():
            self._violation("takeover", f"commanded {seen.command.tolist()}, the person {wanted.tolist()}")

    def _check_data(self, seen: Seen) -> None:
        """The policy moves the robot: on what?"""
        rules, t_ns = self.rules, seen.t_ns
        late_ns = 0 if seen.sent_ns is None else max(0, seen.sent_ns - t_ns - rules.period_ns)
        if self._drives(t_ns):
            self._violation("takeover", f"{seen.state.name} while a person commands")
        if self._unfit_ns is not None:
            good_ms = (t_ns - self._unfit_ns) / 1e6
            self._violation("rearming", f"{seen.state.name}, {good_ms:.1f} ms after observations or clock were bad")
        for name, limit_ns in rules.max_ages_ns.items():
            age_ns = seen.ages_ns.get(name)
            if age_ns is None:
                self._stale(f"{name} never delivered")
            elif not -rules.future_tolerance_ns <= age_ns or age_ns + late_ns > limit_ns + rules.stamp_slack_ns:
                self._stale(f"{name} is {age_ns / 1e6:.1f} ms old, sent {late_ns / 1e6:.1f} ms late")
            elif self._streams[name].find(t_ns - age_ns, rules.stamp_slack_ns) is None:
                self._stale(f"{name}: no sound sample has the stamp {t_ns - age_ns}")
        chunks = [c for c, valid in self._given.get((seen.t_obs_ns, seen.chunk_id), []) if valid]
        if not chunks:
            self._stale(f"chunk {seen.chunk_id} of {seen.t_obs_ns} was never given or may not be used")
            return
        errors = [self._slot_error(c, t_ns) or self._action_error(c, seen) for c in chunks]
        if all(errors):
            self._violation("takeover" if "takeover" in errors[0] else "stale data moved the robot", errors[0])
            return
        possible = [chunk for chunk, error in zip(chunks, errors) if not error]
        chunk = next((c for c in possible if c.planner == self._owner), possible[0])  # two may be the same to the eye
        if late_ns and self._slot_error(chunk, t_ns + late_ns):
            self._stale(f"{self._slot_error(chunk, t_ns + late_ns)}, sent {late_ns / 1e6:.1f} ms late")
        if chunk.planner != self._owner and t_ns + rules.period_ns < self._owner_until_ns:
            self._violation("planners took turns", f"{chunk.planner!r} before the chunks of {self._owner!r} were used")
        until_ns = chunk.t_obs_ns + min(len(chunk.actions) * chunk.step_ns, rules.max_chunk_age_ns)
        if chunk.planner != self._owner:
            self._owner, self._owner_until_ns = chunk.planner, until_ns
        self._owner_until_ns = max(self._owner_until_ns, until_ns)

    def _action_error(self, chunk: GivenChunk, seen: Seen) -> str:
        slot = (seen.t_ns - chunk.t_obs_ns) // chunk.step_ns
        if seen.slot != slot:
            return f"slot {seen.slot} of chunk {chunk.chunk_id} at the time of slot {slot}"
        if not np.array_equal(np.asarray(chunk.actions[slot], np.float32), np.asarray(seen.base_action, np.float32)):
            return f"base action is not slot {slot} of chunk {chunk.chunk_id}"
        return ""

    def _check_action(self, seen: Seen) -> None:
        """The policy moves the robot: to where chunk and head say?"""
        if seen.command is None:
            self._violation("elsewhere", f"{seen.state.name} without a command")
            return
        wanted = np.asarray(seen.base_action, np.float64)
        if seen.state == State.RUNNING:
            residual = np.asarray(seen.residual, np.float64)
            if residual.shape != wanted.shape or not np.isfinite(residual).all():
                self._violation("elsewhere", f"residual {residual.tolist()} was executed")
                return
            if np.abs(residual).max() > self.rules.residual_limit * (1 + RELATIVE):
                self._violation("elsewhere", f"residual {residual.tolist()}, allowed is {self.rules.residual_limit:g}")
            wanted = wanted + residual
        command, reference = np.asarray(seen.command, np.float64), self._reference(seen)
        if reference is None or command.shape != wanted.shape or wanted.shape != reference.shape:
            return  # told elsewhere
        wanted, command = (np.clip(values, self.rules.lower, self.rules.upper) for values in (wanted, command))
        largest = self.rules.largest
        slack = POSITION + RELATIVE * np.abs(wanted)
        short = (np.abs(command - wanted) > slack) & (largest > 0)
        beside = (command < np.minimum(reference, wanted) - slack) | (command > np.maximum(reference, wanted) + slack)
        # A step is scaled as a whole: one channel at its limit makes all that have one fall short.
        at_limit = ((np.abs(command - reference) > largest * (1 - RELATIVE) - slack) & (largest > 0)).any()
        if (short & (beside | np.isinf(largest) | ~at_limit)).any():
            self._violation("elsewhere", f"{command.tolist()} after {reference.tolist()}, wanted {wanted.tolist()}")

    # --- commands -----------------------------------------------------------------------------------------------

    def _reference(self, seen: Seen) -> np.ndarray | None:
        """What the next command is compared with: the last one; after silence where the robot is, None if unknown."""
        if self._last is not None:
            return self._last
        rules = self.rules
        rest, keep = np.zeros(len(rules.names)), list(rules.keep)
        rest[keep] = rules.keep_default if self._kept is None else self._kept[keep]
        if rules.kind == "delta":
            return rest
        measured = self._claimed_measured(seen)
        if measured is None or self._unknown(seen) or self._outside(measured).any():
            return None
        position = np.clip(np.where(np.isnan(measured), rest, measured), rules.lower, rules.upper)
        return position.astype(np.float32).astype(np.float64)  # as a command would tell it

    def _check_command(self, seen: Seen, moving: bool) -> None:
        if seen.command is None:
            return
        rules, command = self.rules, np.asarray(seen.command, np.float64)
        if command.shape != (len(rules.names),) or not np.isfinite(command).all():
            self._violation("finite", f"command {command.tolist()}")
            return
        over = np.maximum(rules.lower - command, command - rules.upper)
        if (over > RELATIVE).any():
            self._violation("position limit", f"{rules.names[int(over.argmax())]} by {over.max():g}")
        begins = self._last is None or (moving and not self._was_moving)
        invariant = "recovery jump" if begins else "step limit"
        reference = self._reference(seen)
        if reference is None:
            self._violation(invariant, "commanded without knowing where the robot is, or outside its limits")
            return
        if not moving and self._leg is None:
            reference = self._hold_start(reference, self._claimed_measured(seen))
        step, largest = np.abs(command - reference), rules.largest
        wrong = step > largest * (1 + RELATIVE) + 1e-9
        if wrong.any():
            i = int(np.argmax(wrong))
            self._violation(invariant, f"{rules.names[i]} by {step[i]:g}, allowed is {largest[i]:g}")

    def _hold_start(self, reference: np.ndarray, measured: np.ndarray | None) -> np.ndarray:
        """From where a hold begins: the last command, but the measurement where the arm is farther behind than it lags.

        This is the one command that may differ from the last by more than a step.
        """
        if measured is None or self.rules.kind != "position":
            return reference
        behind = ~np.isnan(measured) & ~self._outside(measured) & (np.abs(measured - reference) > self.rules.lag)
        return np.where(behind, self._hold_target(reference, measured), reference)

    def _hold_target(self, reference: np.ndarray, measured: np.ndarray | None) -> np.ndarray:
        rules = self.rules
        if rules.kind == "delta":
            target = np.zeros(len(rules.names))
        elif measured is None:
            target = reference.copy()
        else:  # what cannot be true is not measured
            target = np.where(np.isnan(measured) | self._outside(measured), reference, measured)
        target[list(rules.keep)] = reference[list(rules.keep)]
        return np.clip(target, rules.lower, rules.upper)

    def _steps_to(self, target: np.ndarray, position: np.ndarray) -> float:
        """Distance in largest steps; channels that may not move or have no limit do not count."""
        distance, largest = np.abs(target - position), self.rules.largest
        counts = (distance > POSITION) & (largest > 0)
        return float((distance[counts] / largest[counts]).max(initial=0.0))

    def _leg_to(self, target: np.ndarray, reference: np.ndarray, approaches: bool = False) -> _Leg:
        return _Leg(target, math.ceil(self._steps_to(target, reference) * (1 - RELATIVE)) + 1, approaches)

    def _check_hold(self, seen: Seen, moving: bool, problem: str) -> None:
        measured = self._claimed_measured(seen)
        if moving:
            self._check_start(measured)
            self._leg, self._where = None, []
            return
        if seen.command is None:
            self._check_silence(seen)
            return
        command, reference = np.asarray(seen.command, np.float64), self._reference(seen)
        if reference is None or command.shape != reference.shape:
            return  # told already
        if self._leg is None:
            reference = self._hold_start(reference, measured)
            self._leg = self._leg_to(self._hold_target(reference, measured), reference)
        if seen.reason == Reason.REARMING and not problem and measured is not None:
            self._follow(command, reference, self._hold_target(reference, measured))
        elif problem or seen.reason != Reason.REARMING:
            self._where = []
            self._leg.approaches = False
        leg = self._leg
        leg.ticks += 1
        leg.target = next((also for also in leg.also if not leg.reached and self._same(command, also)), leg.target)
        there = self._same(command, leg.target)
        away = f"{np.abs(command - leg.target).max():g} from the hold"
        if leg.reached and not there:
            self._violation("hold bound", f"left it, {away}")
            self._leg = self._leg_to(leg.target, command)
        elif not leg.reached and not there and leg.ticks >= leg.budget:
            self._violation("hold bound", f"{away} after {leg.ticks} ticks")
            leg.budget = 10**9
        leg.reached |= there

    def _follow(self, command: np.ndarray, reference: np.ndarray, position: np.ndarray) -> None:
        """Data is back: the loop may wait in its hold, or leave it once for where the arm is measured."""
        self._where.append(position)
        leg = self._leg
        waits = self._steps_to(leg.target, command) <= max(self._steps_to(leg.target, reference) - 1, 0) + 1e-3
        if not waits and not leg.approaches:
            legs = [self._leg_to(where, reference, approaches=True) for where in self._where]
            self._leg = max(legs, key=lambda leg: leg.budget)
            self._leg.also = list(self._where)
        elif not leg.reached:
            leg.also.append(position)  # one direction, two targets: it has to stop at one of them

    def _check_silence(self, seen: Seen) -> None:
        if self._last is None:
            return
        if seen.state not in LATCHED:
            self._violation("hold bound", f"{seen.state.name}: fell silent")
        elif self._leg is None or not self._leg.reached:
            self._violation("hold bound", f"{seen.state.name}: fell silent before the hold was reached")

    def _check_start(self, measured: np.ndarray | None) -> None:
        """An arm that was held goes to where it is measured before it moves on."""
        if self.rules.kind != "position" or self._leg is None or self._last is None:
            return
        where = list(self._where)
        if measured is not None:
            where.append(self._hold_target(self._last, measured))
        if not any(self._same(self._last, position) for position in where):
            self._violation("recovery jump", f"moved on from {self._last.tolist()}, measured was {where[-1:]}")

    def _same(self, a: np.ndarray, b: np.ndarray) -> bool:
        return bool((np.abs(a - b) <= POSITION).all())

    # --- times --------------------------------------------------------------------------------------------------

    def _measure(self, seen: Seen, moving: bool, problem: str) -> None:
        now = (self.ticks, seen.wall_ns)
        if problem:
            self._good = None
        if self._bad is None and (problem or not moving):  # if nothing seems wrong, the loop knows better
            self._bad = (*now, problem or f"{seen.state.name} {seen.reason.name}")
            self._held = self._bad if self._last is not None else None
        if self._held is not None and not moving and self._leg is not None and self._leg.reached:
            self.holds.append(self._delay(self._held, now))
            self._held = None
        if not problem and self._bad is not None and self._good is None:
            self._good = now
            self._recovery_budget = self._recovery_ticks(seen)
        if moving and not problem:
            if self._good is not None:
                self.recoveries.append(self._delay((*self._good, self._bad[2]), now))
            self._good = self._bad = self._held = None
        elif not problem:
            if self.head_rests:
                self._recovery_budget += 1
            if self.ticks - self._good[0] > self._recovery_budget:
                self._violation("no recovery", f"{seen.state.name}: {seen.reason.name}, {self._bad[2]} is over")
                self._recovery_budget = 10**9

    def _recovery_ticks(self, seen: Seen) -> int:
        wait = math.ceil((self.rules.rearm_after_ns + self.rules.recovery_ns) / self.rules.period_ns) + 2
        measured = self._claimed_measured(seen)
        if self._last is None or measured is None:
            return wait
        return wait + 2 * self._leg_to(self._hold_target(self._last, measured), self._last).budget

    def _delay(self, since: tuple[int, int, str], now: tuple[int, int]) -> Delay:
        return Delay(now[0] - since[0], (now[1] - since[1]) / 1e6, since[2], self.faults, now[1])

    def _stale(self, detail: str) -> None:
        self._violation("stale data moved the robot", detail)

    def _violation(self, invariant: str, detail: str) -> None:
        if invariant not in HARMLESS:
            self.unsafe_ticks.add(self.ticks)
        t_ns = 0 if self._last_t_ns is None else self._last_t_ns
        self.violations.append(Violation(self.ticks, t_ns, invariant, detail, self.faults))
