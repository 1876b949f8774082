"""Named faults of the loop without ROS, each on every kind of robot."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2c2_ros.core.errors import HeadError
from a2c2_ros.core.safety import MOVING, Reason, State
from a2c2_ros.faults.base import FUTURE, group, must, scenario
from a2c2_ros.faults.campaign import FAULTS
from a2c2_ros.faults.monitor import Judge
from a2c2_ros.faults.rig import KINDS, Rig, Sample


class CoreBench:
    """Runs a scenario on every kind of robot; collects the judges."""

    def __init__(self) -> None:
        self.judges: list[Judge] = []

    def rigs(self, *, rates_hz: Sequence[float] = (20.0, 250.0), **parameters: Any) -> Iterator[Rig]:
        """A moving rig of every kind at every rate."""
        for kind in KINDS.values():
            for rate_hz in rates_hz:
                rig = Rig(kind, control_rate_hz=rate_hz, **({"horizon": round(2 * rate_hz)} | parameters))
                self.judges.append(rig.judge)
                rig.start()
                must(_moves(rig), "a new loop moves")
                rig.run(0.5)
                yield rig
                must(_moves(rig), f"it moves again, but it is {rig.last_step.state.name} {rig.last_step.reason.name}")
                rig.finish()


def _moves(rig: Rig) -> bool:
    return rig.run_until(lambda: rig.last_step is not None and rig.last_step.state in MOVING, 4.0)


def _is(rig: Rig, state: State, *reasons: Reason) -> None:
    step = rig.last_step
    must(step.state == state and (not reasons or step.reason in reasons), f"{state.name}, not {step.state.name}")


def _apply(rig: Rig, fault: str, duration_s: float) -> Callable[[], None]:
    end = FAULTS[fault](rig, rig.rng)
    rig.run(duration_s)
    return end


@group("core")
def _core(folder: Path) -> Iterator[CoreBench]:
    yield CoreBench()


@scenario("core", "defect in the loop", "the head raises what nobody expects", "FAULT until a person enables")
def _defect(bench: CoreBench) -> None:
    for rig in bench.rigs():
        _apply(rig, "head has a defect", 0.3)
        _is(rig, State.FAULT, Reason.INTERNAL_ERROR)
        rig.head_faults.clear()
        rig.run(0.5)
        _is(rig, State.FAULT)
        rig.enable()


@scenario(
    "core",
    "planner id taken twice",
    "two planners send chunks under one id and number",
    "a number is used for one observation only; it goes on",
)
def _id_twice(bench: CoreBench) -> str:
    refused = 0
    for rig in bench.rigs():
        end = _apply(rig, "a planner's id taken twice", 4.0)
        refused += rig.loop.chunks["number"]
        end()
    must(refused > 0, "no chunk was refused for its number")
    return f"{refused} chunks refused for their number"


@scenario("core", "ticks missed", "no tick for 1.2 s while the robot moves", "HOLDING or moving, no jump")
def _missed(bench: CoreBench) -> None:
    for rig in bench.rigs():
        rig.ticks_to_miss = round(1.2e9 / rig.period_ns)
        rig.run(3.0)


@scenario(
    "core",
    "sample from the future, then silence",
    "one camera sample is stamped 0.7 s ahead, then the camera is silent",
    "HOLDING; the sample never counts as fresh",
)
def _future_sample(bench: CoreBench) -> None:
    for rig in bench.rigs():
        sent: list[Sample] = []

        def once(sample: Sample, sent: list[Sample] = sent) -> Sample | None:
            sample.stamp_ns += 700_000_000
            sent.append(sample)
            return sample if len(sent) == 1 else None

        rig.stream_faults["camera"].append(once)
        rig.run(2.0)
        _is(rig, State.HOLDING, *FUTURE)
        rig.stream_faults["camera"].clear()


@scenario(
    "core",
    "clock back with samples on their way",
    "the clock goes back by 0.6 s; a sample with the old time arrives afterwards, then the camera is silent",
    "HOLDING; the old sample never counts as fresh",
)
def _clock_back_in_flight(bench: CoreBench) -> None:
    for rig in bench.rigs():
        late: list[Sample] = []

        def last(sample: Sample, late: list[Sample] = late, rig: Rig = rig) -> Sample | None:
            late.append(sample)
            sample.delay_ns += 4 * rig.period_ns
            return sample if len(late) == 1 else None

        rig.stream_faults["camera"].append(last)
        rig.run_until(lambda late=late: bool(late), 1.0)
        rig.clock_ns -= 600_000_000
        rig.run(2.0)
        _is(rig, State.HOLDING, *FUTURE)
        rig.stream_faults["camera"].clear()


@scenario(
    "core",
    "failing head, on_failure hold",
    "the head fails for 2 s while the arm sags",
    "HOLDING; the hold does not follow the sagging arm",
)
def _hold_does_not_sink(bench: CoreBench) -> None:
    def fails(residual: np.ndarray) -> np.ndarray:
        raise HeadError("out of memory")

    for rig in bench.rigs(correction__on_failure="hold", correction__retry_after_s=0.1):
        rig.head_faults.append(fails)
        rig.run(1.0)
        held = rig.last_step.command
        rig.run(1.0)
        _is(rig, State.HOLDING)
        must(np.array_equal(held, rig.last_step.command), f"held {held}, a second later {rig.last_step.command}")
        rig.head_faults.clear()


@scenario(
    "core",
    "impossible position at an emergency stop",
    "one joint reads 1e30 at the tick of an emergency stop",
    "STOPPED; the arm stays where it was",
)
def _spike(bench: CoreBench) -> None:
    for rig in bench.rigs():
        end = _apply(rig, "joints huge", 0.0)
        rig.run(0.03)
        before = rig.arm.position.copy()
        rig.pressed = 1
        rig.signal()
        rig.run(0.05)
        end()
        rig.run(1.0)
        _is(rig, State.STOPPED, Reason.EMERGENCY_STOP)
        must(np.abs(rig.arm.position - before).max() < 0.3, f"the arm went from {before} to {rig.arm.position}")
        rig.pressed = 0
        rig.signal()
        rig.enable()


@scenario("core", "deactivated while it moves", "the loop is stopped as on shutdown", "it leaves a hold behind")
def _deactivated(bench: CoreBench) -> None:
    for rig in bench.rigs():
        rig.leave()


@scenario(
    "core",
    "pulled outside the limits while deactivated",
    "the loop is deactivated, the arm is pulled beyond its limits, the loop is activated; then it is pulled back",
    "HOLDING OUTSIDE_LIMITS without a command, then moving",
)
def _outside_while_deactivated(bench: CoreBench) -> None:
    for rig in bench.rigs():
        rig.leave()
        if rig.kind.hold == "delta":
            continue
        inside = rig.arm.position
        rig.arm.position = np.full(rig.kind.joints, 2.0)
        rig.run(0.5)
        must(rig.silent, f"nothing is commanded, but {rig.last_step.command} is")
        rig.arm.position = inside


@scenario(
    "core",
    "arm does not follow",
    "the arm stands still while it is commanded to move",
    "STOPPED NOT_FOLLOWING within 2 s, with the arm where it is, until a person enables",
)
def _does_not_follow(bench: CoreBench) -> None:
    for rig in bench.rigs(rates_hz=(50.0,)):
        if rig.kind.hold == "delta":
            continue
        rig.arm.blocked = 1
        position = rig.arm.position.copy()
        stopped = rig.run_until(lambda rig=rig: rig.last_step.state == State.STOPPED, 2.0)
        must(stopped, f"STOPPED within 2 s, not {rig.last_step.state.name}")
        _is(rig, State.STOPPED, Reason.NOT_FOLLOWING)
        rig.arm.blocked = 0
        rig.run(1.0)
        _is(rig, State.STOPPED, Reason.NOT_FOLLOWING)
        must(rig.silent, "nothing is commanded any more")
        moved = np.abs(rig.arm.position - position).max()
        must(moved < 0.05, f"the arm moved by {moved:.2f} after it was stopped")
        rig.enable()


@scenario("core", "every stream fault in turn", "each for 0.6 s, without a pause", "HOLDING or moving, it goes on")
def _streams_in_turn(bench: CoreBench) -> str:
    names = [name for name in FAULTS if name.split()[0] in ("camera", "joints")]
    for rig in bench.rigs(rates_hz=(50.0,)):
        for name in names:
            _apply(rig, name, 0.6)()
    return f"{len(names)} faults"


@scenario("core", "every chunk fault in turn", "each for 1.5 s, without a pause", "refused, HOLDING or moving")
def _chunks_in_turn(bench: CoreBench) -> str:
    names = [name for name in FAULTS if name.startswith("chunks")]
    for rig in bench.rigs(rates_hz=(50.0,)):
        for name in names:
            _apply(rig, name, 1.5)()
    return f"{len(names)} faults"
