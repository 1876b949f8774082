"""Named faults of the shipped system: real planner, real head, real recorder; the world plays the robot of LIBERO."""

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from std_msgs.msg import String

from a2c2_ros.core.safety import MOVING, Reason, State
from a2c2_ros.faults.base import NodeBench, SkippedError, closing, group, must, scenario
from a2c2_ros.faults.dds import CONTROLLER, RobotFile, System, World, free_domain
from a2c2_ros.paths import model_path, robot_profile
from a2c2_ros.recording.reader import DamageReport, read_bag

RATE_HZ = 20.0
HEAD = "compact_libero_spatial/head.onnx"
PLANNER = "chunk_planner"
SECOND_PLANNER = "second_planner"
SERVER = "policy_server"
POLICY = "flow_libero_spatial"
NO_CHUNK = (Reason.NO_CHUNK, Reason.CHUNK_EXPIRED)
ADDRESS = re.compile(r"(ws://\S+)\n")  # a line that is complete
RECORDER = "episode_recorder"
INSTRUCTION = "pick up the black bowl and place it on the plate"
DISK_MIB = 3


class LiberoBench(NodeBench):
    """The controller with the shipped head at 20 Hz, the planner with the shipped policy."""

    def start_planner(self, name: str = PLANNER, **parameters: Any) -> None:
        """Start a planner's process."""
        self.system.start(name, PLANNER, {"execution_horizon": 20, "inference_delay": 0} | parameters)

    def start_controller(self) -> None:
        """Start the controller's process."""
        self.system.start(CONTROLLER, CONTROLLER, {})


@group("libero")
def _libero(folder: Path) -> Iterator[LiberoBench]:
    robot = RobotFile.read(robot_profile("libero"), RATE_HZ)
    domain_id = free_domain()
    system = System(folder, domain_id)
    world = World(system, domain_id, robot)
    with closing(system, world):
        bench = LiberoBench(folder, system, world)
        bench.start_controller()
        bench.start_planner()
        world.instruction.publish(String(data=INSTRUCTION))
        world.wait_for(lambda: bool(world.steps), "the first step", 90.0)
        world.wait_for(lambda: world.steps[-1].state in MOVING, "the first motion", 90.0)
        yield bench


@scenario("libero", "pose lost", "the end-effector pose does not come", "HOLDING: no motion; then RUNNING")
def _pose_lost(bench: LiberoBench) -> None:
    lost = bench.world.lost
    bench.holds_for(lambda: lost.add("ee_pose"), lost.clear, Reason.OBSERVATION_STALE)


@scenario(
    "libero",
    "pose without direction",
    "the quaternion is zero: the head has no input",
    "BASE_ONLY HEAD_FAILED, then RUNNING",
)
def _no_direction(bench: LiberoBench) -> None:
    def spoil(message) -> bool:
        message.pose.orientation.x = message.pose.orientation.w = 0.0
        return True

    bench.world.spoil["ee_pose"] = spoil
    bench.world.wait_state(State.BASE_ONLY, Reason.HEAD_FAILED)
    bench.world.spoil.clear()
    bench.world.wait_state(State.RUNNING)


@scenario(
    "libero",
    "shipped head swapped while it moves",
    "a copy of the head is loaded under another name",
    "it moves all the time",
)
def _swapped(bench: LiberoBench) -> str:
    world, copy = bench.world, bench.folder / "copy.onnx"
    shutil.copy(model_path(HEAD), copy)
    begin, began_s = world.mark(), time.monotonic()
    must(world.set_parameter("correction.model_path", str(copy)).successful, "swapped")
    took_s = time.monotonic() - began_s
    world.spin_for(0.5)
    bench.moved_since(begin)
    return f"loaded in {took_s:.2f} s"


@scenario(
    "libero",
    "planner slower than e",
    "a chunk is asked for at every step, from a policy server that runs in 4 ms of every 114 ms only",
    "there is always a chunk: the older one until the next comes",
)
def _slow_planner(bench: LiberoBench) -> str:
    world, system = bench.world, bench.system
    system.start_module(SERVER, "a2c2_ros.policies.server", ["--policy-path", POLICY, "--port", "0", "--threads", "1"])
    world.wait_for(lambda: ADDRESS.search(system.log(SERVER)) is not None, "the server's address", 90.0)
    _replace_planner(bench, execution_horizon=1, policy="remote", policy_path=ADDRESS.search(system.log(SERVER))[1])
    # Not the planner itself: it could be stopped while it holds what it shares with those who send it images.
    with system.slowed(SERVER, runs_s=0.004, rests_s=0.11):
        world.spin_for(1.0)
        since, begin = len(world.raw), world.mark()
        world.stays(3.0, lambda s: s.reason not in NO_CHUNK, "there is always a chunk")
        bench.moved_since(begin, share=0.8)  # a busy machine may lose images
        delays = [step.chunk_delay_steps for step in world.raw[since:]]
    must(min(delays) > 1, f"every chunk comes later than e = 1, but the delays are {min(delays):.0f} steps and more")
    _replace_planner(bench)
    system.kill(SERVER)
    return f"measured delays {min(delays):.0f} to {max(delays):.0f} steps"


def _replace_planner(bench: LiberoBench, **parameters: Any) -> None:
    world, before = bench.world, bench.world.executed_planner()
    bench.system.kill(PLANNER)
    bench.start_planner(**parameters)
    world.wait_for(lambda: world.executed_planner() not in ("", before), "a chunk of the new planner is executed", 90.0)
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")


@scenario("libero", "planner stopped for 5 s", "SIGSTOP, SIGCONT", "HOLDING CHUNK_EXPIRED, then moving")
def _planner_stopped(bench: LiberoBench) -> None:
    world = bench.world
    world.system.signal(PLANNER, signal.SIGSTOP)
    stopped_s = time.monotonic()
    world.wait_state(State.HOLDING, Reason.CHUNK_EXPIRED)
    world.stays(5.0 - (time.monotonic() - stopped_s), lambda s: s.state == State.HOLDING, "it stays HOLDING")
    world.system.signal(PLANNER, signal.SIGCONT)
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")


@scenario(
    "libero",
    "planner killed and restarted",
    "SIGKILL while it moves, started again after the hold",
    "HOLDING CHUNK_EXPIRED, then moving with the new planner's chunks",
)
def _planner_killed(bench: LiberoBench) -> None:
    world, before = bench.world, bench.world.executed_planner()
    world.system.kill(PLANNER)
    world.wait_state(State.HOLDING, Reason.CHUNK_EXPIRED)
    bench.start_planner()
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion", 90.0)
    must(world.executed_planner() not in ("", before), "the chunk is of the new planner")


@scenario(
    "libero",
    "two planners at once",
    "a second planner is started; then the first is killed",
    "the second's chunks are refused while the first has one; then they are used",
)
def _two_planners(bench: LiberoBench) -> None:
    world, first = bench.world, bench.world.executed_planner()
    bench.start_planner(SECOND_PLANNER)
    world.wait_for(lambda: world.chunks_heard[-1].planner_id != first, "a chunk of the second planner", 90.0)
    world.wait_log(CONTROLLER, "two planners")
    steps = world.stays(3.0, lambda s: s.state in MOVING, "it keeps moving")
    heard = {(m.chunk_id, m.header.stamp.nanosec) for m in world.chunks_heard if m.planner_id == first}
    foreign = [s for s in steps if (s.chunk_id, s.t_obs_ns % 10**9) not in heard]
    must(not foreign, f"{len(foreign)} of {len(steps)} ticks executed the second planner's chunks")
    world.system.kill(PLANNER)
    world.wait_for(lambda: world.executed_planner() not in ("", first), "a chunk of the second planner is executed")
    world.system.kill(SECOND_PLANNER)
    bench.start_planner()
    world.wait_state(State.HOLDING, Reason.CHUNK_EXPIRED, 90.0)
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion with the planner that was started again", 90.0)


@contextlib.contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[Path]:
    """A file system of its own.

    Raises:
        SkippedError: If it cannot be mounted, which needs root.
    """
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise SkippedError(f"no small file system: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


@scenario(
    "libero",
    "disk full for the recorder",
    f"the recorder writes to a disk of {DISK_MIB} MiB",
    "it says so and goes on; the robot moves all the time",
)
def _disk_full(bench: LiberoBench) -> str:
    world = bench.world
    with small_disk(bench.folder / "disk", DISK_MIB) as disk:
        world.system.start(RECORDER, RECORDER, {"out": disk / "run", "min_free_mb": 0})
        world.wait_log(RECORDER, "recording")
        begin = world.mark()
        world.wait_log(RECORDER, "No space left on device")
        world.spin_for(1.0)
        bench.moved_since(begin)
        must(world.system.running(RECORDER), "the recorder's node goes on")
        code = world.stop(RECORDER)
        must(code == 0, f"exit code {code}")
        report = DamageReport()
        kept = sum(1 for _ in read_bag(disk / "run" / "bag", report=report))
        must(kept > 0 and not report.bytes_lost, f"a valid bag is left: {report}")
        early = [problem for problem in report.problems if "No space left on device" in problem]
        must(len(early) == 1 == len(report.problems), f"it says that it ended early, and why: {report}")
    return f"{kept} messages are kept"


@scenario(
    "libero",
    "picture frozen, stamps fresh",
    "the camera repeats one picture with new stamps",
    "not noticed, see docs/safety.md: RUNNING",
)
def _picture_frozen(bench: LiberoBench) -> str:
    bench.keeps_moving(1.0)  # the world's cameras never show anything else
    return "no motion can be told from the picture"


@scenario(
    "libero",
    "controller of a simulation killed and restarted",
    "SIGKILL while it moves, started again",
    "it starts by itself with the chunk that the middleware kept",
)
def _controller_killed(bench: LiberoBench) -> None:
    world = bench.world
    world.system.kill(CONTROLLER)
    world.no_ticks()
    world.settle()
    world.controller_restarted(may_move=True)
    since = len(world.steps)
    bench.start_controller()
    world.wait_for(lambda: len(world.steps) > since and world.steps[-1].state in MOVING, "motion", 90.0)
