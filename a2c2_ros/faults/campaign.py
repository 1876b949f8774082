"""A random campaign: thousands of overlapping fault events against the loop without ROS; the judge sees every tick."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from a2c2_ros.core.errors import ConfigError, HeadError
from a2c2_ros.core.safety import MOVING
from a2c2_ros.faults.monitor import Delay, Violation
from a2c2_ros.faults.rig import KINDS, ChunkOnItsWay, Rig, Sample

RATES_HZ = (20.0, 50.0, 100.0, 250.0)
EVENTS_PER_EPISODE = 50
WARM_UP_S = 0.8
MEAN_GAP_S = 0.5  # between the beginnings of two clusters of events
STOPPED_BY_ITSELF_S = 0.4  # at least: at full speed the command is farther away then than an arm lags
EXECUTES_AGAIN_S = 0.2  # nobody enables a robot that says that it executes commands again
OUTSIDE_S = 0.6  # enabled while the arm is outside its limits: a chunk comes within
SETTLE_S = 6.0  # after the last event the robot must move again within

End = Callable[[], None]
Fault = Callable[[Rig, np.random.Generator], End]
"""Begins a fault; what it returns ends it."""

FAULTS: dict[str, Fault] = {}


def _fault(name: str) -> Callable[[Fault], Fault]:
    def add(begin: Fault) -> Fault:
        FAULTS[name] = begin
        return begin

    return add


def _nothing() -> None:
    """The end of what is over at once."""


def _while(faults: list, fault: object) -> End:
    """Put a fault into one of the rig's lists until its end."""
    faults.append(fault)
    return lambda: faults.remove(fault)


# --- streams ------------------------------------------------------------------------------------------------------


def _stream_fault(stream: str, name: str, spoil: Callable[[Sample, np.random.Generator], Sample | None]) -> None:
    @_fault(f"{stream} {name}")
    def begin(rig: Rig, rng: np.random.Generator) -> End:
        return _while(rig.faults_of(stream, rng), lambda sample: spoil(sample, rng))


def _spoilt(value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sample, np.random.Generator], Sample]:
    def spoil(sample: Sample, rng: np.random.Generator) -> Sample:
        sample.value = value(sample.value)
        return sample

    return spoil


def _with_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[0] = value
        return array

    return change


def _without_stamp(sample: Sample, rng: np.random.Generator) -> Sample:
    sample.stamp_ns = 0
    return sample


def _huge(sample: Sample, rng: np.random.Generator) -> Sample:
    sample.value = _with_first(1e30)(sample.value)
    return sample


for _stream in ("camera", "joints"):
    _stream_fault(_stream, "lost", lambda sample, rng: None)
    _stream_fault(_stream, "30% lost", lambda sample, rng: None if rng.random() < 0.3 else sample)
    _stream_fault(_stream, "wrong shape", _spoilt(lambda array: array[:-1]))
    _stream_fault(_stream, "wrong dtype", _spoilt(lambda array: array.astype(np.float32)))
    _stream_fault(_stream, "without stamp", _without_stamp)
_stream_fault("joints", "NaN", _spoilt(_with_first(np.nan)))
_stream_fault("joints", "Inf", _spoilt(_with_first(-np.inf)))
_stream_fault("joints", "huge", _huge)


def _shifted(stream: str, name: str, low_s: float, high_s: float, *, stamp: bool) -> None:
    """Samples that come late, or whose stamps are wrong by as much; drawn once per event."""

    @_fault(f"{stream} {name}")
    def begin(rig: Rig, rng: np.random.Generator) -> End:
        shift_ns = round(rng.uniform(low_s, high_s) * 1e9)

        def spoil(sample: Sample) -> Sample:
            if stamp:
                sample.stamp_ns += shift_ns
            else:
                sample.delay_ns += shift_ns
            return sample

        return _while(rig.faults_of(stream, rng), spoil)


for _stream in ("camera", "joints"):
    _shifted(_stream, "late", 0.05, 0.6, stamp=False)
    _shifted(_stream, "from the future", 0.06, 2.5, stamp=True)
    _shifted(_stream, "from the past", -3.0, -0.1, stamp=True)


def _frozen(stream: str) -> None:
    @_fault(f"{stream} frozen")
    def begin(rig: Rig, rng: np.random.Generator) -> End:
        first: list[Sample] = []

        def spoil(sample: Sample) -> Sample:
            first.append(sample)
            sample.stamp_ns, sample.value = first[0].stamp_ns, first[0].value
            return sample

        return _while(rig.faults_of(stream, rng), spoil)


_frozen("camera")
_frozen("joints")


@_fault("one sample from the future, then silence")
def _one_from_the_future(rig: Rig, rng: np.random.Generator) -> End:
    stream = str(rng.choice(("camera", "joints")))
    shift_ns = round(rng.uniform(0.06, 0.9) * 1e9)
    sent: list[Sample] = []

    def spoil(sample: Sample) -> Sample | None:
        if sent:
            return None
        sent.append(sample)
        sample.stamp_ns += shift_ns
        return sample

    return _while(rig.faults_of(stream, rng), spoil)


# --- chunks -------------------------------------------------------------------------------------------------------


def _chunk_fault(name: str, spoil: Callable[[ChunkOnItsWay, np.random.Generator], list[ChunkOnItsWay]]) -> None:
    @_fault(f"chunks {name}")
    def begin(rig: Rig, rng: np.random.Generator) -> End:
        return _while(rig.chunk_faults, lambda chunks: [out for chunk in chunks for out in spoil(chunk, rng)])


def _changed(change: Callable[[ChunkOnItsWay, np.random.Generator], None]) -> Callable:
    def spoil(chunk: ChunkOnItsWay, rng: np.random.Generator) -> list[ChunkOnItsWay]:
        change(chunk, rng)
        return [chunk]

    return spoil


def _one_value(value: float) -> Callable:
    def change(chunk: ChunkOnItsWay, rng: np.random.Generator) -> None:
        if chunk.actions.size:  # another fault may have emptied it
            chunk.actions.flat[rng.integers(chunk.actions.size)] = value

    return _changed(change)


def _set(**changes: Callable[[ChunkOnItsWay, np.random.Generator], object]) -> Callable:
    def change(chunk: ChunkOnItsWay, rng: np.random.Generator) -> None:
        for name, value in changes.items():
            setattr(chunk, name, value(chunk, rng))

    return _changed(change)


def _delayed(chunk: ChunkOnItsWay, rng: np.random.Generator, low_s: float, high_s: float) -> ChunkOnItsWay:
    copy = chunk.copy()
    copy.delay_ns += round(rng.uniform(low_s, high_s) * 1e9)
    return copy


_chunk_fault("lost", lambda chunk, rng: [])
_chunk_fault("late", lambda chunk, rng: [_delayed(chunk, rng, 0.02, 3.0)])
_chunk_fault("doubled", lambda chunk, rng: [chunk, _delayed(chunk, rng, 0.0, 1.0)])
_chunk_fault("reordered", lambda chunk, rng: [_delayed(chunk, rng, 0.0, 1.0)])
_chunk_fault("from the past", _set(t_obs_ns=lambda c, rng: c.t_obs_ns - round(rng.uniform(0.1, 10.0) * 1e9)))
_chunk_fault("from the future", _set(t_obs_ns=lambda c, rng: c.t_obs_ns + round(rng.uniform(0.06, 10.0) * 1e9)))
_chunk_fault("from before time", _set(t_obs_ns=lambda c, rng: -1))
_chunk_fault("NaN", _one_value(np.nan))
_chunk_fault("Inf", _one_value(np.inf))
_chunk_fault("huge", _one_value(1e30))
_chunk_fault("with renamed actions", _set(names=lambda c, rng: (*c.names[:-1], "hand")))
_chunk_fault("with reordered names", _set(names=lambda c, rng: c.names[::-1]))
_chunk_fault("of wrong width", _set(actions=lambda c, rng: c.actions[:, 1:]))
_chunk_fault("empty", _set(actions=lambda c, rng: c.actions[:0]))
_chunk_fault("with a wrong slot time", _set(step_ns=lambda c, rng: 2 * c.step_ns * (c.chunk_id % 2)))
_chunk_fault("of number 0", _set(chunk_id=lambda c, rng: 0))


@_fault("chunks with a number twice")
def _number_twice(rig: Rig, rng: np.random.Generator) -> End:
    number = rig.chunk_id

    def spoil(chunks: list[ChunkOnItsWay]) -> list[ChunkOnItsWay]:
        for chunk in chunks:
            chunk.chunk_id = max(1, number)
        return chunks

    return _while(rig.chunk_faults, spoil)


@_fault("H changed")
def _horizon_changed(rig: Rig, rng: np.random.Generator) -> End:
    return _while(rig.horizons, int(rng.integers(2, 80)))


@_fault("planner slower than e")
def _slow_planner(rig: Rig, rng: np.random.Generator) -> End:
    return _while(rig.planner_delays_ns, round(rng.uniform(0.5, 1.5) * rig.horizons[-1]) * rig.period_ns)


@_fault("planner restarted")
def _planner_restarted(rig: Rig, rng: np.random.Generator) -> End:
    rig.start_planner()
    return _nothing


@_fault("two planners")
def _two_planners(rig: Rig, rng: np.random.Generator) -> End:
    numbers: Counter[str] = Counter()
    name = f"second planner {rng.integers(1_000_000)}"

    def add(chunks: list[ChunkOnItsWay]) -> list[ChunkOnItsWay]:
        numbers[name] += 1
        other = rig.make_chunk(name, numbers[name])
        other.actions[:] = other.actions[::-1]
        other.t_obs_ns += int(rng.integers(-20, 20)) * 1_000_000
        return [*chunks, other]

    return _while(rig.chunk_faults, add)


@_fault("a planner's id taken twice")
def _same_planner_twice(rig: Rig, rng: np.random.Generator) -> End:
    def add(chunks: list[ChunkOnItsWay]) -> list[ChunkOnItsWay]:
        others = [chunk.copy() for chunk in chunks]
        for other in others:
            other.t_obs_ns -= int(rng.integers(1, 100)) * 1_000_000
            other.actions[:] = other.actions[::-1]
        return chunks + others

    return _while(rig.chunk_faults, add)


# --- clock and ticks ----------------------------------------------------------------------------------------------


def _clock_fault(name: str, low_s: float, high_s: float) -> None:
    @_fault(name)
    def begin(rig: Rig, rng: np.random.Generator) -> End:
        rig.clock_ns += round(rng.uniform(low_s, high_s) * 1e9)
        return _nothing


_clock_fault("clock back a little", -0.05, -0.0005)
_clock_fault("clock back", -20.0, -0.05)
_clock_fault("clock forward a little", 0.0005, 0.9)
_clock_fault("clock forward", 1.0, 100.0)


@_fault("clock stopped")
def _clock_stopped(rig: Rig, rng: np.random.Generator) -> End:
    rig.clock_stopped += 1

    def end() -> None:
        rig.clock_stopped -= 1

    return end


@_fault("ticks missed")
def _ticks_missed(rig: Rig, rng: np.random.Generator) -> End:
    rig.ticks_to_miss += int(rng.integers(1, max(2, round(1.2e9 / rig.period_ns))))
    return _nothing


# --- head and parameters ------------------------------------------------------------------------------------------


def _raises(error: Exception) -> Callable:
    def fault(residual: np.ndarray) -> np.ndarray:
        raise error

    return fault


def _head_fault(name: str, fault: Callable[[np.ndarray], object]) -> None:
    @_fault(f"head {name}")
    def begin(rig: Rig, rng: np.random.Generator) -> End:
        own = lambda residual: fault(residual)  # noqa: E731, two of a kind must be two objects
        return _while(rig.head_faults, own)


_head_fault("returns NaN", lambda residual: residual * np.float32(np.nan))
_head_fault("returns Inf", lambda residual: residual + np.float32(np.inf))
# Both at once must not cancel out.
_head_fault("returns too much", lambda residual: np.abs(residual) + np.float32(50.0))
_head_fault("returns too little", lambda residual: -np.abs(residual) - np.float32(50.0))
_head_fault("returns a wrong shape", lambda residual: residual[:-1])
_head_fault("fails", _raises(HeadError("out of memory")))


@_fault("head has a defect")
def _head_defect(rig: Rig, rng: np.random.Generator) -> End:
    end_head = _while(rig.head_faults, _raises(ZeroDivisionError("a defect")))

    def end() -> None:
        end_head()
        rig.enable()

    return end


@_fault("head too slow")
def _head_slow(rig: Rig, rng: np.random.Generator) -> End:
    takes_ns = round(rng.uniform(0.01, 1.0) * 1e9) + 2 * rig.period_ns

    def slow(residual: np.ndarray) -> np.ndarray:
        rig.head_clock_ns += takes_ns
        rig.ticks_to_miss = takes_ns // rig.period_ns
        return residual

    return _while(rig.head_faults, slow)


@_fault("head removed and loaded")
def _head_removed(rig: Rig, rng: np.random.Generator) -> End:
    head = rig.head
    rig.swap_head(None)
    return lambda: rig.swap_head(head or rig.head)


@_fault("parameters changed")
def _parameters_changed(rig: Rig, rng: np.random.Generator) -> End:
    choices = {
        "correction.enabled": (True, False),
        "correction.on_failure": ("base", "hold"),
        "correction.retry_after_s": (0.0, 0.1, 1.0),
        "residual_limit": (0.5, 4.0),
        "action_margin": (0.2, 1.0),
        "max_chunk_age_s": (0.5, 5.0),
        "future_tolerance_s": (0.01, 0.05),
        "rearm_after_s": (0.0, 0.1, 0.3),
        "halt_steps": (1, 20),
        "takeover_timeout_s": (0.02, 0.2),
        "clock_timeout_s": (0.05, 0.5),
    }
    for name in rng.choice(list(choices), size=rng.integers(1, 4), replace=False):
        values = choices[str(name)]
        rig.set_parameters({str(name): values[rng.integers(len(values))]})
    return _nothing


@_fault("parameters refused")
def _parameters_refused(rig: Rig, rng: np.random.Generator) -> End:
    wrong = (("residual_limit", -1.0), ("halt_steps", 0), ("max_chunk_age_s", float("nan")), ("control_rate_hz", 1.0))
    name, value = wrong[rng.integers(len(wrong))]
    try:
        rig.config.replaced({name: value})
    except ConfigError:
        return _nothing
    rig.judge.report("parameters", f"{name} = {value} was accepted")
    return _nothing


# --- a person and the system --------------------------------------------------------------------------------------


@_fault("disabled")
def _disabled(rig: Rig, rng: np.random.Generator) -> End:
    rig.disable()
    return lambda: _enable(rig)


@_fault("emergency stop")
def _emergency_stop(rig: Rig, rng: np.random.Generator) -> End:
    rig.pressed += 1
    rig.signal()
    if rng.random() < 0.3:
        rig.enable()  # must be refused; the judge is told

    def end() -> None:
        rig.pressed -= 1
        rig.signal()
        _enable(rig)

    return end


@_fault("emergency stop signal lost")
def _signal_lost(rig: Rig, rng: np.random.Generator) -> End:
    rig.signal_lost += 1

    def end() -> None:
        rig.signal_lost -= 1
        _enable(rig)

    return end


def _enable(rig: Rig) -> None:
    """As a person does who comes after an event: not while another keeps the robot stopped."""
    if _may_run(rig):
        rig.enable()


def _may_run(rig: Rig) -> bool:
    return not rig.pressed and not rig.stopped


@_fault("moved by hand while stopped")
def _moved_by_hand(rig: Rig, rng: np.random.Generator) -> End:
    rig.disable()
    rig.arm.hand = rng.uniform(-1.4, 1.4, rig.kind.joints)

    def end() -> None:
        rig.arm.hand = None
        _enable(rig)

    return end


@_fault("moved by hand to outside the limits")
def _moved_outside(rig: Rig, rng: np.random.Generator) -> End:
    rig.disable()
    rig.arm.hand = rng.uniform(-2.2, 2.2, rig.kind.joints)

    def end() -> None:
        # Enabled as it is, it must not move when there is a chunk; then a person brings it back.
        _enable(rig)
        rig.run(OUTSIDE_S)
        rig.arm.hand = rng.uniform(-1.0, 1.0, rig.kind.joints)

    return end


@_fault("a person takes over")
def _taken_over(rig: Rig, rng: np.random.Generator) -> End:
    lower, upper = np.array(rig.kind.lower), np.array(rig.kind.upper)
    goal = rng.uniform(lower - 0.2, upper + 0.2)
    return _while(rig.people, lambda: (goal, rig.clock_ns))


@_fault("a person sends garbage")
def _garbage_taken_over(rig: Rig, rng: np.random.Generator) -> End:
    size = len(rig.kind.names)
    garbage = (
        lambda: (np.full(size, np.nan), rig.clock_ns),
        lambda: (np.full(size, np.inf), rig.clock_ns),
        lambda: (np.zeros(size - 1), rig.clock_ns),
        lambda: (np.zeros(size), 0),
        lambda: (np.zeros(size), rig.clock_ns + 1_000_000_000),
        lambda: (np.zeros(size), rig.clock_ns - 1_000_000_000),
    )
    return _while(rig.people, lambda: garbage[rng.integers(len(garbage))]())


@_fault("arm blocked")
def _blocked(rig: Rig, rng: np.random.Generator) -> End:
    rig.arm.blocked += 1

    def end() -> None:
        rig.arm.blocked -= 1
        _enable(rig)  # it may have been stopped because it did not follow

    return end


@_fault("arm stopped by itself")
def _stopped_by_itself(rig: Rig, rng: np.random.Generator) -> End:
    end = _blocked(rig, rng)
    rig.run(STOPPED_BY_ITSELF_S)
    return end


@_fault("robot says that it stopped")
def _says_that_it_stopped(rig: Rig, rng: np.random.Generator) -> End:
    """Protective stop; a robot of the kind that says nothing is only blocked."""
    end_of_block = _blocked(rig, rng)
    rig.stopped += 1
    rig.robot_says()
    if rng.random() < 0.3:
        rig.enable()  # must be refused; the judge is told

    def end() -> None:
        rig.stopped -= 1
        rig.robot_says()
        rig.run(EXECUTES_AGAIN_S)
        end_of_block()

    return end


@_fault("controller killed and restarted")
def _killed(rig: Rig, rng: np.random.Generator) -> End:
    rig.restart_loop()

    def end() -> None:
        if _may_run(rig):
            rig.start()

    return end


@_fault("controller deactivated and activated")
def _left(rig: Rig, rng: np.random.Generator) -> End:
    rig.leave()
    return _nothing


# --- the campaign -------------------------------------------------------------------------------------------------


@dataclass
class CampaignResult:
    """What a campaign did and found."""

    events: Counter[str] = field(default_factory=Counter)
    episodes: int = 0
    ticks: int = 0
    simulated_s: float = 0.0
    unsafe_ticks: int = 0
    violations: list[Violation] = field(default_factory=list)
    holds: list[Delay] = field(default_factory=list)
    recoveries: list[Delay] = field(default_factory=list)


def run_campaign(
    events: int, seed: int = 0, progress: Callable[[int], None] = lambda n: None, stop_at: int = 1_000_000
) -> CampaignResult:
    """Run episodes until there were that many fault events.

    Args:
        events: Fault events.
        seed: Equal seeds give equal campaigns.
        progress: Called with the number of events of every episode.
        stop_at: End early after this many violations.
    """
    result = CampaignResult()
    while (left := events - result.events.total()) > 0 and len(result.violations) < stop_at:
        n = min(left, EVENTS_PER_EPISODE)
        run_episode(result, n, (seed, result.episodes))
        progress(n)
    return result


def run_episode(result: CampaignResult, events: int, seed: tuple[int, int]) -> Rig:
    """One robot, one control rate, a number of events, and then quiet; adds to the result."""
    rng = np.random.default_rng(seed)
    kind = KINDS[str(rng.choice(list(KINDS)))]
    rate_hz = float(rng.choice(RATES_HZ, p=(0.4, 0.3, 0.2, 0.1)))
    rig = Rig(
        kind,
        int(rng.integers(2**31)),
        horizon=int(np.clip(round(rng.uniform(0.4, 2.5) * rate_hz), 8, 100)),
        control_rate_hz=rate_hz,
        correction__on_failure=str(rng.choice(("base", "hold"))),
        emergency_stop_timeout_s=float(rng.choice((0.0, 0.3))),
    )
    rig.start()
    rig.run(WARM_UP_S)
    active: list[tuple[int, str, End]] = []
    while events or active:
        if events:
            for _ in range(min(events, int(rng.integers(1, 4)))):
                name = str(rng.choice(list(FAULTS)))
                active.append((rig.steady_ns + _duration_ns(rng, rig.period_ns), name, FAULTS[name](rig, rng)))
                result.events[name] += 1
                events -= 1
        pause_ns = rig.steady_ns + (round(rng.exponential(MEAN_GAP_S) * 1e9) if events else 10**9)
        while rig.steady_ns < pause_ns and (events or active):
            for fault in [fault for fault in active if fault[0] <= rig.steady_ns]:
                active.remove(fault)
                fault[2]()
            rig.judge.faults = tuple(sorted({name for _, name, _ in active})) or rig.judge.faults
            rig.step()
    _settle(rig)
    result.episodes += 1
    result.ticks += rig.judge.ticks
    result.simulated_s += rig.steady_ns / 1e9
    result.unsafe_ticks += len(rig.judge.unsafe_ticks)
    result.violations += rig.judge.violations
    result.holds += rig.judge.holds
    result.recoveries += rig.judge.recoveries
    return rig


def _settle(rig: Rig) -> None:
    """A person puts everything right; the robot must move again."""
    rig.signal()
    rig.robot_says()
    rig.arm.hand = np.zeros(rig.kind.joints)  # an arm that floats outside its limits is brought back
    rig.enable()
    rig.run_until(lambda: False, 1.0)
    rig.arm.hand = None
    rig.enable()
    if not rig.run_until(lambda: rig.last_step is not None and rig.last_step.state in MOVING, SETTLE_S):
        rig.judge.report("no recovery", f"{rig.last_step.state.name}: {rig.last_step.reason.name}")
    rig.finish()


def _duration_ns(rng: np.random.Generator, period_ns: int) -> int:
    """From one period to 1.5 s, short ones as often as long ones."""
    low, high = np.log(period_ns), np.log(1.5e9)
    return round(float(np.exp(rng.uniform(low, high))))
