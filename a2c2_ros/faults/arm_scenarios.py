"""Named faults of a real controller that commands a hardware-like arm: drivers, chunks, person, head, process."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from builtin_interfaces.msg import Time

from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.core.safety import LATCHED, MOVING, Reason, State
from a2c2_ros.faults.base import FUTURE, NodeBench, closing, group, must, scenario
from a2c2_ros.faults.dds import CONTROLLER, RobotFile, System, World, free_domain
from a2c2_ros.faults.heads import RESIDUALS, write_head

ARM_RATE_HZ = 50.0
ARM_HORIZON = 50
ARM_JOINTS = 7
REORDERED_TOLERANCE = 0.15  # [rad] what the arm moves until its hold is noticed; two joints differ by more
STOP_TICKS = 3  # that may still move after the emergency stop was pressed


def write_arm_profile(path: Path, simulated: bool) -> Path:
    """A seven-joint arm with position commands and two small cameras."""
    names = [f"joint{i + 1}" for i in range(ARM_JOINTS)]
    profile = {
        "name": "fault arm",
        "simulated": simulated,
        "cameras": {name: {"topic": f"{name}/image", "height": 24, "width": 32} for name in ("front", "wrist")},
        "joint_states": {"topic": "joint_states", "names": names},
        "state": "joint_position",
        "action": {"space": "joint_position", "names": names, "measured": names},
        "command": {"topic": "joint_command", "kind": "joint_state"},
        "limits": {"lower": [-2.9] * ARM_JOINTS, "upper": [2.9] * ARM_JOINTS, "velocity": [2.0] * ARM_JOINTS},
        "hold": {"kind": "position"},
        "max_age_s": {"camera": 0.25, "joint_states": 0.25},
    }
    path.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
    return path


class ArmBench(NodeBench):
    """A hardware-like arm at 50 Hz with a tiny head; the world plans."""

    STOP_TIMEOUT_S = 0.5

    def __init__(self, folder: Path, system: System, world: World, heads: dict[str, Path]) -> None:
        super().__init__(folder, system, world)
        self.heads = heads

    def start_controller(self) -> None:
        """Start the process."""
        parameters = {
            "robot": self.folder / "arm.yaml",
            "control_rate_hz": ARM_RATE_HZ,
            "correction.model_path": self.heads["good"],
            "emergency_stop_timeout_s": self.STOP_TIMEOUT_S,
        }
        self.system.start(CONTROLLER, CONTROLLER, parameters)

    def stop(self) -> None:
        """Press the emergency stop: it takes effect within a few ticks."""
        world = self.world
        pressed_ns = world.now_ns()
        world.press(True)
        self.fault_begins()
        world.wait_state(State.STOPPED, Reason.EMERGENCY_STOP)
        moved = sum(step.t_ns > pressed_ns and step.state in MOVING for step in world.steps)
        must(moved <= STOP_TICKS, f"it moved in {moved} ticks after the emergency stop was pressed")

    def use_head(self, behaviour: str) -> None:
        """Swap the head."""
        result = self.world.set_parameter("correction.model_path", str(self.heads[behaviour]))
        must(result.successful, f"head {behaviour}: {result.reason}")


@group("arm")
def _arm(folder: Path) -> Iterator[ArmBench]:
    path = write_arm_profile(folder / "arm.yaml", simulated=False)
    robot = RobotFile.read(path, ARM_RATE_HZ, stop_timeout_ns=round(ArmBench.STOP_TIMEOUT_S * 1e9))
    manifest = HeadManifest(
        architecture="tiny",
        policy_id="faults",
        horizon=ARM_HORIZON,
        step_ns=round(1e9 / ARM_RATE_HZ),
        action_names=robot.action_names,
        action_space="joint_position",
        cameras={},
        state_names=robot.joint_names,
        latent_size=0,
        language_size=0,
    )
    heads = {name: write_head(folder / f"{name}.onnx", name, manifest) for name in RESIDUALS}
    domain_id = free_domain()
    system = System(folder, domain_id)
    world = World(system, domain_id, robot)
    with closing(system, world):
        bench = ArmBench(folder, system, world, heads)
        bench.start_controller()
        world.wait_for(lambda: bool(world.steps), "the first step", 60.0)
        world.plan(ARM_HORIZON, period_s=0.4)
        yield bench


@scenario(
    "arm",
    "hardware starts disabled",
    "data and chunks are there, nobody has enabled the loop",
    "STOPPED DISABLED, nothing is sent; RUNNING after ~/enable",
    at_start=True,
)
def _starts_disabled(bench: ArmBench) -> None:
    world = bench.world
    world.stays(1.0, lambda s: s.state == State.STOPPED and s.command is None, "STOPPED and silent")
    must(not world.commands, "no command was published")
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


def _stream_scenario(
    name: str, does: str, begin: Callable[[World], None], end: Callable[[World], None], *reasons: Reason
) -> None:
    expects = f"HOLDING {' or '.join(r.name for r in reasons)}, then RUNNING"

    @scenario("arm", name, does, expects)
    def run(bench: ArmBench) -> None:
        bench.holds_for(lambda: begin(bench.world), lambda: end(bench.world), *reasons)


def _lost_scenario(name: str, stream: str) -> None:
    _stream_scenario(
        name,
        "no sample comes",
        lambda world: world.lost.add(stream),
        lambda world: world.lost.discard(stream),
        Reason.OBSERVATION_STALE,
    )


def _stamp_scenario(name: str, does: str, stream: str, shift_s: float, *reasons: Reason) -> None:
    _stream_scenario(
        name,
        does,
        lambda world: world.stamp_shift_ns.update({stream: round(shift_s * 1e9)}),
        lambda world: world.stamp_shift_ns.clear(),
        *reasons,
    )


def _spoil_scenario(name: str, does: str, stream: str, spoil: Callable[[Any], None]) -> None:
    def spoilt(message: Any) -> bool:
        spoil(message)
        return False

    _stream_scenario(
        name,
        does,
        lambda world: world.spoil.update({stream: spoilt}),
        lambda world: world.spoil.clear(),
        Reason.OBSERVATION_STALE,
    )


def _setting(**values: Any) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        for name, value in values.items():
            setattr(message, name, value)

    return change


def _first_position(value: float) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.position[0] = value

    return change


def _rename_first(message: Any) -> None:
    message.name = ["shoulder", *message.name[1:]]


def _cut_image(message: Any) -> None:
    message.data = message.data[: len(message.data) // 2]


_lost_scenario("camera lost", "front")
_lost_scenario("joint states lost", "joint_position")
_stream_scenario(
    "camera frozen",
    "the driver repeats one image with its stamp",
    lambda world: world.frozen_ns.update(wrist=world.now_ns()),
    lambda world: world.frozen_ns.clear(),
    Reason.OBSERVATION_STALE,
)
_stamp_scenario("camera late", "images are 0.4 s old when they come", "front", -0.4, Reason.OBSERVATION_STALE)
_stamp_scenario("camera from the future", "the camera's clock is 0.5 s ahead", "front", 0.5, *FUTURE)
_stamp_scenario("joint states from the future", "the arm's clock is 2 s ahead", "joint_position", 2.0, *FUTURE)
_spoil_scenario("camera of wrong size", "images are 16 rows high", "front", _setting(height=16))
_spoil_scenario("camera of wrong encoding", "images are mono8", "front", _setting(encoding="mono8"))
_spoil_scenario("camera image cut off", "half of the bytes are missing", "wrist", _cut_image)
_spoil_scenario("joints renamed", "a joint has another name", "joint_position", _rename_first)
_spoil_scenario("joint missing", "a name without a position", "joint_position", lambda m: m.position.pop())
_spoil_scenario("joint NaN", "a position is NaN", "joint_position", _first_position(float("nan")))
_spoil_scenario("joint Inf", "a position is infinite", "joint_position", _first_position(float("inf")))
_spoil_scenario(
    "joint states without stamp", "the stamp is 0", "joint_position", lambda m: setattr(m.header, "stamp", Time())
)


@scenario(
    "arm",
    "joints reordered",
    "joint states come in another order; then the camera is lost",
    "RUNNING: joints are found by name; HOLDING with every joint where it is",
)
def _reordered(bench: ArmBench) -> None:
    world = bench.world

    def turn(message: Any) -> bool:
        # Not in reverse: there are moments at which every joint is where its mirror image is.
        message.name, message.position = np.roll(message.name, 2).tolist(), np.roll(message.position, 2).tolist()
        return True

    world.spoil["joint_position"] = turn
    bench.keeps_moving(1.0)
    world.lost.add("front")
    world.wait_state(State.HOLDING, Reason.OBSERVATION_STALE)
    there = world.arm.position.copy()
    world.spin_for(0.5)
    away = np.abs(world.steps[-1].command - there)
    must(away.max() < REORDERED_TOLERANCE, f"joint{away.argmax() + 1} is held {away.max():.2f} rad from where it was")
    world.lost.clear()
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")
    world.spoil.clear()


@scenario("arm", "30% of all samples lost", "for 3 s", "moving in at least 90% of the ticks")
def _lossy(bench: ArmBench) -> None:
    bench.world.lost_share = 0.3
    bench.keeps_moving(3.0, share=0.9)
    bench.world.lost_share = 0.0


def _chunk_scenario(name: str, does: str, words: str, change: Callable[[Any], None]) -> None:
    @scenario("arm", name, does, f"refused ({words}); RUNNING with the others")
    def run(bench: ArmBench) -> None:
        world = bench.world
        refusals = world.system.log(CONTROLLER).count(words)
        chunk = world.make_chunk(world.planner, 100_000 + world.chunks_sent)
        change(chunk)
        world.send_chunk(chunk)
        bench.keeps_moving(0.6)
        log = world.system.log(CONTROLLER)
        must(log.count(words) > refusals, f"{words!r} is not in the log")


def _set_one(value: float) -> Callable[[Any], None]:
    def change(chunk: Any) -> None:
        chunk.actions[3, 1] = value

    return change


def _cut_actions(chunk: Any) -> None:
    chunk.actions = chunk.actions.ravel()[:-1]


def _rename_action(chunk: Any) -> None:
    chunk.names = ("shoulder", *chunk.names[1:])


def _reverse_names(chunk: Any) -> None:
    chunk.names = chunk.names[::-1]


def _shift_chunk(shift_s: float) -> Callable[[Any], None]:
    def change(chunk: Any) -> None:
        chunk.t_obs_ns += round(shift_s * 1e9)

    return change


_chunk_scenario("chunk with NaN", "one action is NaN", "not finite", _set_one(np.nan))
_chunk_scenario("chunk with Inf", "one action is infinite", "not finite", _set_one(np.inf))
_chunk_scenario("chunk with huge values", "one action is 1e6 rad", "allowed is", _set_one(1e6))
_chunk_scenario("chunk of wrong shape", "one value is missing", "values, allowed are", _cut_actions)
_chunk_scenario("chunk with renamed actions", "one name is another", "action_names are", _rename_action)
_chunk_scenario("chunk with reordered actions", "names in reverse order", "action_names are", _reverse_names)
_chunk_scenario("chunk from the past", "its observation is 30 s old", "used up", _shift_chunk(-30.0))
_chunk_scenario("chunk from the future", "its observation is 5 s ahead", "in the future", _shift_chunk(5.0))


@scenario("arm", "chunks doubled and reordered", "copies 0.3 s later, every other 0.5 s late", "RUNNING")
def _doubled(bench: ArmBench) -> None:
    def fault(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            chunk.delay_ns = 500_000_000 * (chunk.chunk_id % 2)
        copies = [chunk.copy() for chunk in chunks]
        for copy in copies:
            copy.delay_ns += 300_000_000
        return chunks + copies

    bench.world.chunk_faults.append(fault)
    bench.keeps_moving(3.0)
    bench.world.chunk_faults.clear()


@scenario("arm", "chunks stop", "the planner is silent for longer than a chunk", "HOLDING CHUNK_EXPIRED, then RUNNING")
def _chunks_stop(bench: ArmBench) -> None:
    faults = bench.world.chunk_faults
    bench.holds_for(lambda: faults.append(lambda chunks: []), faults.clear, Reason.CHUNK_EXPIRED)


@scenario(
    "arm",
    "planner replaced",
    "chunks come under another planner's id",
    "refused until the first planner's are used up, then RUNNING with them",
)
def _replaced(bench: ArmBench) -> None:
    world, first = bench.world, bench.world.executed_planner()
    refusals = world.system.log(CONTROLLER).count("two planners")
    world.planner, world.chunk_id = f"{first}'", 0
    world.wait_for(lambda: world.system.log(CONTROLLER).count("two planners") > refusals, "a refusal")
    must(world.executed_planner() == first, "the first planner's chunk is used up")
    world.wait_for(
        lambda: world.steps[-1].state in MOVING and world.executed_planner() == world.planner, "motion with its chunks"
    )


@scenario(
    "arm",
    "H changed while running",
    "chunks of 80 slots instead of 50, then 30",
    "HOLDING HEAD_MISMATCH with a head for 50; without the head they are executed",
)
def _horizon_changed(bench: ArmBench) -> None:
    world = bench.world
    world.horizon = 80
    world.wait_state(State.HOLDING, Reason.HEAD_MISMATCH)
    must(world.set_parameter("correction.enabled", False).successful, "correction switched off")
    world.wait_state(State.BASE_ONLY)
    world.horizon = 30
    world.wait_for(lambda: world.raw[-1].horizon == 30, "a chunk of 30 slots")
    bench.keeps_moving(1.0)
    world.horizon = ARM_HORIZON
    must(world.set_parameter("correction.enabled", True).successful, "correction switched on")
    world.wait_state(State.RUNNING)


@scenario(
    "arm",
    "emergency stop",
    "pressed while it moves; ~/enable; released; ~/enable",
    f"STOPPED within {STOP_TICKS} ticks; enable refused; released it stays STOPPED and goes silent; then RUNNING",
)
def _emergency_stop(bench: ArmBench) -> None:
    world = bench.world
    bench.stop()
    answer = world.enable()
    must(not answer.success and "pressed" in answer.message, "enable is refused while it is pressed")
    world.press(False)
    world.stays(0.8, lambda s: s.state == State.STOPPED, "a release does not enable")
    must(world.steps[-1].command is None, "it is silent by now")
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


@scenario(
    "arm",
    "emergency stop's signal lost",
    "its topic falls silent, comes back",
    "STOPPED EMERGENCY_STOP_LOST after the timeout, until ~/enable",
)
def _signal_lost(bench: ArmBench) -> None:
    world = bench.world
    world.signal_lost = True
    bench.fault_begins()
    world.wait_state(State.STOPPED, Reason.EMERGENCY_STOP_LOST)
    world.signal_lost = False
    world.stays(0.5, lambda s: s.state == State.STOPPED, "the signal alone does not enable")
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


def _stop_and_move(world: World, to: np.ndarray) -> None:
    must(world.enable(False).success, "disabled")
    world.wait_for(lambda: world.steps[-1].command is None, "silence")
    world.arm_floats, world.arm.hand = True, to
    world.spin_for(1.0)


@scenario(
    "arm",
    "moved by hand while stopped",
    "disabled, pulled by 0.8 rad, enabled",
    "silent while stopped; the first command is one step from where the arm is",
)
def _moved_by_hand(bench: ArmBench) -> None:
    world = bench.world
    _stop_and_move(world, world.arm.position + 0.8)
    world.arm_floats, world.arm.hand = False, None
    world._command = None  # the driver's motors take over when the next command comes
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


@scenario(
    "arm",
    "measured outside the limits",
    "disabled, pulled to 3.2 rad, enabled, pulled back",
    "HOLDING OUTSIDE_LIMITS without a command, then RUNNING",
)
def _outside(bench: ArmBench) -> None:
    world = bench.world
    _stop_and_move(world, np.full(ARM_JOINTS, 3.2))
    must(world.enable().success, "enabled")
    held = world.wait_state(State.HOLDING, Reason.OUTSIDE_LIMITS)
    must(held.command is None, "nothing is commanded")
    world.arm.hand = np.full(ARM_JOINTS, 0.5)
    world.wait_state(State.RUNNING)
    world.arm_floats, world.arm.hand = False, None


@scenario(
    "arm",
    "arm blocked, then camera lost",
    "the arm does not follow for 0.4 s, then the camera is lost",
    "HOLDING where the arm is, not where it should be; then RUNNING",
)
def _blocked(bench: ArmBench) -> None:
    world = bench.world
    world.spin_for(1.5)  # the command has come to the chunk, whose motion is slower than the limits
    world.arm.blocked = 1
    world.spin_for(0.4)
    bench.holds_for(lambda: world.lost.add("front"), world.lost.clear, Reason.OBSERVATION_STALE)
    away = np.abs(world.arm.position - world._command).max()
    world.arm.blocked = 0
    world.spin_for(0.5)
    must(away < 1.0, f"the command ran {away:.2f} rad away from the blocked arm")


@scenario(
    "arm",
    "arm blocked",
    "the arm does not follow until the robot is stopped; then it is free; ~/enable",
    "STOPPED NOT_FOLLOWING with the command where the arm is, until ~/enable; then RUNNING",
)
def _does_not_follow(bench: ArmBench) -> None:
    world = bench.world
    world.arm.blocked = 1
    world.wait_state(State.STOPPED, Reason.NOT_FOLLOWING)
    position = world.arm.position.copy()
    world.spin_for(0.4)  # joints that are nearer go back on a ramp
    away = np.abs(world.commands[-1].position - position).max()
    must(away < 0.05, f"the command is {away:.2f} rad from where the arm is")
    world.arm.blocked = 0
    world.stays(0.5, lambda s: s.state == State.STOPPED, "an arm that could follow again does not enable")
    moved = np.abs(world.arm.position - position).max()
    must(moved < 0.05, f"the arm moved by {moved:.2f} rad after the stop")
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


@scenario(
    "arm",
    "impossible position with an emergency stop (nodes)",
    "a joint reads 100 rad when the emergency stop is pressed",
    "STOPPED; the hold is the last command, not the limit",
)
def _spike_in_nodes(bench: ArmBench) -> None:
    world = bench.world

    def spike(message: Any) -> bool:
        message.position[0] = 100.0
        return True

    world.spoil["joint_position"] = spike
    bench.stop()
    before = world.arm.position[0]
    world.wait_for(lambda: world.steps[-1].command is None, "silence")
    world.spoil.clear()
    must(abs(world.arm.position[0] - before) < 0.3, f"joint1 went from {before:.2f} to {world.arm.position[0]:.2f}")
    world.press(False)
    world.spin_for(0.2)
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


@scenario(
    "arm",
    "parameter storm",
    "300 changes in 3 s, every third wrong",
    "the wrong ones are refused, the robot moves in at least 90% of the ticks",
)
def _storm(bench: ArmBench) -> str:
    world = bench.world
    begin, answers = world.mark(), []
    for i in range(100):
        for name, value in (
            ("residual_limit", 3.0 + i % 2),
            ("correction.retry_after_s", 0.1 * (i % 9)),
            ("halt_steps", 0),
        ):
            answers.append((name, world.set_parameter_later(name, value)))
        world.spin_for(0.03)
    world.wait_for(lambda: all(future.done() for _, future in answers), "the answers")
    for name, future in answers:
        result = future.result().results[0]
        must(result.successful == (name != "halt_steps"), f"{name}: {result.reason}")
    bench.moved_since(begin, share=0.9)
    for name, value in (("residual_limit", 4.0), ("correction.retry_after_s", 1.0)):
        must(world.set_parameter(name, value).successful, "set back")
    return f"{len(answers)} changes"


def _head_scenario(name: str, behaviour: str, does: str, reason: Reason) -> None:
    @scenario("arm", name, does, f"BASE_ONLY {reason.name}, then RUNNING with a good head")
    def run(bench: ArmBench) -> None:
        world = bench.world
        if behaviour == "slow":
            world.tick_share = 0.5  # a head blocks its tick, and the next ones are missed
        bench.use_head(behaviour)
        world.wait_state(State.BASE_ONLY, reason)
        world.spin_for(0.7)
        bench.use_head("good")
        world.wait_state(State.RUNNING)


_head_scenario("head returns NaN", "nan", "a head is loaded that returns NaN", Reason.HEAD_NOT_FINITE)
_head_scenario("head returns too much", "huge", "a head is loaded that returns 50 rad", Reason.RESIDUAL_TOO_LARGE)
_head_scenario("head returns too little", "low", "a head is loaded that returns -50 rad", Reason.RESIDUAL_TOO_LARGE)
_head_scenario("head fails", "broken", "a head is loaded that ONNX Runtime cannot run", Reason.HEAD_FAILED)
_head_scenario("head too slow", "slow", "a head is loaded that takes several periods", Reason.HEAD_LATE)


@scenario(
    "arm",
    "head changed twice between two ticks",
    "a head that returns NaN, then another parameter or a good head, without a pause; twelve times",
    "the head of the last answer is in use",
)
def _changed_twice(bench: ArmBench) -> None:
    world = bench.world
    for i in range(6):
        last = [
            world.set_parameter_later("correction.model_path", str(bench.heads["nan"])),
            world.set_parameter_later("residual_limit", 3.0 + i % 2),
        ]
        world.wait_for(lambda last=last: all(future.done() for future in last), "the answers")
        world.wait_for(lambda: world.steps[-1].reason == Reason.HEAD_NOT_FINITE, "the head that returns NaN", 3.0)
        bench.use_head("huge")
        bench.use_head("good")
        world.wait_for(lambda: world.steps[-1].state == State.RUNNING, "the good head", 3.0)
    must(world.set_parameter("residual_limit", 4.0).successful, "set back")


@scenario(
    "arm",
    "emergency stop while a head loads",
    "a head that takes a second to load is asked for, then the emergency stop is pressed",
    f"moving while it loads; STOPPED within {STOP_TICKS} ticks",
)
def _stop_while_loading(bench: ArmBench) -> None:
    world = bench.world
    begin = world.mark()
    loading = world.set_parameter_later("correction.model_path", str(bench.heads["slow"]))
    world.spin_for(0.2)
    bench.moved_since(begin)
    bench.stop()
    must(not loading.done(), "the head is still loading when the stop takes effect")
    world.wait_for(loading.done, "the answer")
    bench.use_head("good")
    world.press(False)
    world.spin_for(0.2)
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


@scenario(
    "arm",
    "head returns NaN, on_failure hold",
    "the same with correction.on_failure: hold",
    "HOLDING HEAD_NOT_FINITE in place, then RUNNING with a good head",
)
def _head_holds(bench: ArmBench) -> None:
    world = bench.world
    world.tell_judge(lambda judge: setattr(judge, "head_fails", True))
    must(world.set_parameter("correction.on_failure", "hold").successful, "hold")
    bench.use_head("nan")
    bench.fault_begins()
    world.wait_state(State.HOLDING, Reason.HEAD_NOT_FINITE)
    world.spin_for(0.3)
    held = world.steps[-1].command
    world.stays(0.7, lambda s: s.state == State.HOLDING, "it stays HOLDING")
    moved = np.abs(world.steps[-1].command - held).max()
    must(moved == 0.0, f"the hold moved by {moved:.4f} rad")
    bench.use_head("good")
    world.tell_judge(lambda judge: setattr(judge, "head_fails", False))
    world.wait_state(State.RUNNING)
    must(world.set_parameter("correction.on_failure", "base").successful, "base")


@scenario(
    "arm",
    "head file replaced by garbage",
    "the file of the head in use is overwritten, then loaded under another name",
    "RUNNING all the time; the garbage is refused",
)
def _garbage(bench: ArmBench) -> None:
    world, used, garbage = bench.world, bench.folder / "used.onnx", bench.folder / "garbage.onnx"
    shutil.copy(bench.heads["good"], used)
    must(world.set_parameter("correction.model_path", str(used)).successful, "a copy of the head is used")
    bench.keeps_moving(0.3)
    for path in (used, garbage):
        path.write_bytes(b"garbage" * 1000)
    result = world.set_parameter("correction.model_path", str(garbage))
    must(not result.successful and "cannot be loaded" in result.reason, f"refused: {result.reason}")
    bench.keeps_moving(1.0)
    bench.use_head("good")


@scenario(
    "arm",
    "diagnostics add up",
    "the controller's own counters beside what was sent and seen",
    "equal: ticks, the sum of the states, the sum of the chunks' outcomes",
)
def _diagnostics(bench: ArmBench) -> str:
    world = bench.world
    world.chunk_faults.append(lambda chunks: [])
    world.spin_for(0.3)
    world.diagnostics = {}
    world.wait_for(lambda: bool(world.diagnostics), "diagnostics")
    values = world.diagnostics
    world.chunk_faults.clear()
    ticks = int(values["ticks since start"])
    states = sum(int(values[f"ticks {state.name}"]) for state in State)
    codes = ("accepted", "duplicate", "invalid", "names", "implausible", "future", "expired", "owner", "number")
    chunks = sum(int(values.get(code, 0)) for code in codes)
    must(ticks == states, f"{ticks} ticks, {states} in all states")
    must(abs(world.raw[-1].tick + 1 - ticks) <= 2 * ARM_RATE_HZ, f"{ticks} ticks, seen up to {world.raw[-1].tick}")
    numbers = [step.tick for step in world.raw]
    must(numbers == list(range(numbers[0], numbers[0] + len(numbers))), "every tick was seen once")
    must(chunks == world.chunks_sent, f"{chunks} outcomes, {world.chunks_sent} chunks")
    return f"{ticks} ticks, {chunks} chunks"


@scenario("arm", "controller stopped for 1 s", "SIGSTOP, SIGCONT", "missed ticks are not made up for; no jump; RUNNING")
def _controller_stopped(bench: ArmBench) -> str:
    world = bench.world
    missed = sum(step.missed_ticks for step in world.raw)
    world.system.signal(CONTROLLER, signal.SIGSTOP)
    world.no_ticks()
    world.spin_for(1.0)
    world.system.signal(CONTROLLER, signal.SIGCONT)
    resumed_ns = world.now_ns() - round(1e9 / ARM_RATE_HZ)
    world.wait_for(lambda: world.steps[-1].t_ns > resumed_ns, "a tick")
    if world.steps[-1].state in LATCHED:  # it heard no signal of the emergency stop either
        world.enable()
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")
    missed = sum(step.missed_ticks for step in world.raw) - missed
    must(missed >= 0.9 * ARM_RATE_HZ, f"{missed} ticks reported as missed in a second")
    return f"{missed} ticks reported as missed"


@scenario(
    "arm",
    "controller killed and restarted",
    "SIGKILL while it moves; the arm is pulled by 0.5 rad; started again; enabled",
    "STOPPED DISABLED; the first command is one step from where the arm is",
)
def _controller_killed(bench: ArmBench) -> None:
    world = bench.world
    world.system.kill(CONTROLLER)
    world.no_ticks()
    world.settle()
    world.controller_restarted(may_move=False)
    world.arm_floats, world.arm.hand = True, world.arm.position + 0.5
    since = len(world.steps)
    bench.start_controller()
    world.wait_for(lambda: len(world.steps) > since, "a step of the new process", 60.0)
    must(world.steps[-1].state == State.STOPPED, "hardware starts disabled")
    world.arm_floats, world.arm.hand, world._command = False, None, None
    must(world.enable().success, "enabled")
    world.wait_state(State.RUNNING)


@scenario("arm", "controller ended while it moves", "SIGTERM", "exit code 0; it leaves a hold behind")
def _controller_ended(bench: ArmBench) -> None:
    world = bench.world
    position, world.leaving, began_ns = world.arm.position.copy(), True, time.time_ns()
    code = world.stop(CONTROLLER)
    world.no_ticks(began_ns)
    must(code == 0, f"exit code {code}")
    world.spin_for(0.5)
    last = np.array(world.commands[-1].position)
    away = np.abs(last - position).max()
    must(away < 0.2, f"the last command is {away:.2f} rad from where the arm was")
    must(to_time_s(world.commands[-1]) >= world.steps[-1].t_ns / 1e9, "the last command came after the last tick")


def to_time_s(message: Any) -> float:
    """Stamp of a message [s]."""
    return message.header.stamp.sec + message.header.stamp.nanosec / 1e9
