"""Real nodes as processes on a DDS domain of their own, and the robot, planner and person around them.

The :class:`World` is one node in this process. It publishes what a robot's drivers publish, follows the commands, and
tells the judge everything in the order of the times at which it left its writer, so that a message that took longer to
arrive here than at the controller does not confuse it.
"""

import contextlib
import heapq
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.task import Future
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool

from a2c2_ros.bringup import DOMAINS
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.core.safety import Reason, State
from a2c2_ros.faults.base import TICK_SHARE
from a2c2_ros.faults.monitor import GivenChunk, Judge, Rules, Seen
from a2c2_ros.faults.rig import Arm, ChunkOnItsWay
from a2c2_ros.msg import ActionChunk, ControlStep
from a2c2_ros.nodes.conversions import (
    array_to_image,
    array_to_joint_state,
    array_to_pose,
    to_duration,
    to_ns,
    to_time,
)
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos, sensor_qos

CONTROLLER = "correction_controller"
TIMEOUT_S = 30.0
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
LOG_LINES = 12  # of each log, in an error
SETTLED_S = 0.3  # what left its writer before has arrived here
SIM_STEP_NS = 5_000_000
SIGNAL_RATE_HZ = 20.0
MAX_STAMP_ERROR_NS = 5_000  # ages are told in float32
RECOVERY_NS = 1_500_000_000  # chunks and heads of a scenario may be sound and yet not be for each other
GRACE_NS = 300_000_000  # from a person's order to the tick that must obey, with a busy machine between


class ExpectationError(A2C2Error, AssertionError):
    """A scenario did not go as it must."""


@dataclass(frozen=True)
class Mark:
    """A moment."""

    time_ns: int  # of the system clock
    due: float  # ticks that were due until then


class System:
    """Nodes as processes, each in a group of its own, so that Ctrl-C reaches only the parent, which ends them.

    Args:
        folder: Gets ``NAME.log`` with the output of each.
        domain_id: DDS domain.
        environment: Added to the environment of each.
    """

    def __init__(self, folder: Path, domain_id: int, environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environment = os.environ | {
            "ROS_DOMAIN_ID": str(domain_id),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "OMP_NUM_THREADS": "1",
        }
        self._environment |= environment or {}
        self._processes: dict[str, subprocess.Popen] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self, name: str, node: str, parameters: Mapping[str, Any], before: Sequence[str] = (), **options: Any
    ) -> None:
        """Start a node.

        Args:
            name: Name of the process; of the node too, unless it is the executable's own.
            node: Module in ``a2c2_ros.nodes``.
            parameters: ROS parameters by name.
            before: Command that runs it, as ``ip netns exec NAME``.
            **options: Of ``subprocess.Popen``.
        """
        arguments = ["--ros-args"] if name == node else ["--ros-args", "-r", f"__node:={name}"]
        for key, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value) or "''"
            arguments += ["-p", f"{key}:={text}"]
        self.start_module(name, f"a2c2_ros.nodes.{node}", arguments, before, **options)

    def start_module(
        self, name: str, module: str, arguments: Sequence[str], before: Sequence[str] = (), **options: Any
    ) -> None:
        """Start ``python -m MODULE ARGUMENTS``; the rest as for :meth:`start`."""
        with (self._folder / f"{name}.log").open("a") as log:
            self._processes[name] = subprocess.Popen(
                [*before, sys.executable, "-m", module, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                **options,
            )

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process and its children."""
        os.killpg(self._processes[name].pid, number)

    @contextlib.contextmanager
    def slowed(self, name: str, runs_s: float, rests_s: float) -> Iterator[None]:
        """Let a process run for a short time, stop it for another, and so on: as a slower machine would run it."""
        over = threading.Event()

        def alternate() -> None:
            while not over.wait(runs_s):
                self.signal(name, signal.SIGSTOP)
                over.wait(rests_s)
                self.signal(name, signal.SIGCONT)

        thread = threading.Thread(target=alternate)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def kill(self, name: str) -> None:
        """End a process as a crash would."""
        self.signal(name, signal.SIGKILL)
        self._processes.pop(name).wait()

    def ask_to_stop(self, name: str) -> subprocess.Popen:
        """Send SIGTERM, wait for nothing."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGTERM)
        return process

    def running(self, name: str) -> bool:
        """True if the process was started and has not ended."""
        return name in self._processes and self._processes[name].poll() is None

    def check(self) -> None:
        """Raises :class:`ExpectationError` with the ends of the logs if a process has ended by itself."""
        died = [name for name, process in self._processes.items() if process.poll() is not None]
        if died:
            tails = (f"{name}: " + "\n".join(self.log(name).splitlines()[-LOG_LINES:]) for name in died)
            raise ExpectationError("\n".join([f"{died} ended by itself", *tails]))

    def close(self) -> None:
        """End whatever still runs."""
        for name, process in self._processes.items():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it may just have ended
                    self.signal(name, signal.SIGCONT)
                    self.signal(name, signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()


@dataclass(frozen=True, eq=False)
class RobotFile:
    """A robot profile as the world reads it: the numbers of the YAML, by no code of the package."""

    cameras: Mapping[str, tuple[str, int, int]]  # name -> topic, height, width
    joints_topic: str
    joint_names: tuple[str, ...]
    pose_topic: str
    action_names: tuple[str, ...]
    rules: Rules
    simulated: bool

    @classmethod
    def read(cls, path: Path, rate_hz: float, **rules: Any) -> "RobotFile":
        """Read a profile; ``rules`` are further fields of the judge's."""
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        names, limits, hold = tuple(data["action"]["names"]), data["limits"], data["hold"]

        def numbers(key: str) -> np.ndarray:
            values = limits.get(key) or [None] * len(names)
            return np.array([np.inf if v is None else v for v in values], np.float64)

        ages_ns = {name: round(age * 1e9) for name, age in data["max_age_s"].items()}
        cameras = {n: (c["topic"], c["height"], c["width"]) for n, c in data.get("cameras", {}).items()}
        max_ages_ns = dict.fromkeys(cameras, ages_ns.get("camera", 0)) | {"joint_position": ages_ns["joint_states"]}
        if "ee_pose" in data:
            max_ages_ns["ee_pose"] = ages_ns["ee_pose"]
        return cls(
            cameras=cameras,
            joints_topic=data["joint_states"]["topic"],
            joint_names=tuple(data["joint_states"]["names"]),
            pose_topic=data.get("ee_pose", {}).get("topic", ""),
            action_names=names,
            simulated=data.get("simulated", False),
            rules=Rules(
                kind=hold["kind"],
                names=names,
                lower=np.array(limits["lower"], np.float64),
                upper=np.array(limits["upper"], np.float64),
                step=numbers("step"),
                velocity=numbers("velocity"),
                period_ns=round(1e9 / rate_hz),
                max_ages_ns=max_ages_ns,
                keep=tuple(names.index(name) for name in hold.get("keep", [])),
                keep_default=tuple(hold.get("keep_default", [])),
                measured_streams=("joint_position",) if hold["kind"] == "position" else (),
                following=np.maximum(
                    0.5 * np.minimum(numbers("step") * rate_hz, numbers("velocity")),
                    0.02 * np.subtract(limits["upper"], limits["lower"]),
                ),
                recovery_ns=RECOVERY_NS,
                stamp_slack_ns=MAX_STAMP_ERROR_NS,
                grace_ns=GRACE_NS + round(1e9 / rate_hz),
                **rules,
            ),
        )


class World:
    """Robot, planner, person and judge around one controller.

    Nothing happens but in :meth:`spin`, which every wait calls.

    Args:
        system: Where the nodes are started.
        domain_id: Its DDS domain.
        robot: The profile that the controller gets.
        simulated_time: Publish ``/clock`` and stamp with it.
        settled_s: What left its writer so long ago has arrived here [s].
        commands_get_lost: The transport fails on purpose: that a command did not come does not say that it was not
            sent, since the middleware repeats only the newest.
    """

    def __init__(
        self,
        system: System,
        domain_id: int,
        robot: RobotFile,
        *,
        simulated_time: bool = False,
        settled_s: float = SETTLED_S,
        commands_get_lost: bool = False,
    ) -> None:
        self.system = system
        self.robot = robot
        self.judge = Judge(robot.rules, robot.simulated)
        self.steps: list[Seen] = []  # in the order of their arrival
        self.raw: list[ControlStep] = []
        self.commands: list[JointState] = []
        self.diagnostics: dict[str, str] = {}  # newest, all lines together
        self.chunks_sent = 0
        self.chunks_heard: list[ActionChunk] = []  # of other planners
        # What drivers do wrong, see the scenarios.
        self.lost: set[str] = set()
        self.lost_share = 0.0
        self.stamp_shift_ns: dict[str, int] = {}
        self.frozen_ns: dict[str, int] = {}
        self.spoil: dict[str, Callable[[Any], bool]] = {}  # changes a message; True if it is still sound
        self.chunk_faults: list[Callable[[list[ChunkOnItsWay]], list[ChunkOnItsWay]]] = []
        self.pressed = False
        self.signal_lost = False
        self.clock_stopped = False
        self.sim_ns = 1_000_000_000_000
        self.arm = Arm(len(robot.joint_names), np.random.default_rng(0))
        self.arm_floats = False
        self.leaving = False  # the controller is told to end: commands come without a tick
        self.tick_share = TICK_SHARE  # a scenario may lower it for itself
        self._gap_since_ns: int | None = time.time_ns()  # no controller runs since
        self._gaps_ns = 0  # all gaps that are over
        self._clock_ns = 0  # how far the simulated clock has come, without the scenarios' jumps
        self._settled_s = settled_s
        self._commands_get_lost = commands_get_lost
        self._newest_tick_ns = 0  # its place among the events
        # By stamp: commands without a tick so far, each with the time at which it left.
        self._sent: dict[int, deque[tuple[int, np.ndarray]]] = {}
        self._newest_sent_ns = 0  # when the newest command left
        self._untold: deque[tuple[float, int, Seen]] = deque()  # ticks: when they arrived (steady) and when they left
        self._recorded: dict[int, list[np.ndarray]] = {}  # commands of the ticks by their time
        self._unrecorded: list[tuple[int, int, np.ndarray]] = []  # commands that came: when they left, stamp, values
        self.planner = "world"
        self.chunk_id = 0
        self.horizon = 0
        self.policy_id = "faults"
        self.sizes = (0, 0)  # of latent and language
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._command: np.ndarray | None = None
        self._delayed: list[tuple[int, int, ChunkOnItsWay]] = []
        self._rng = random.Random(0)
        self._moved_s = time.monotonic()
        self._simulated_time = simulated_time
        self._recent_chunks: list[GivenChunk] = []
        self._planners: dict[tuple[int, int], str] = {}  # of the chunks, by number and observation
        self._parameter_clients: dict[str, AsyncParameterClient] = {}
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain_id)
        self.node = rclpy.create_node("fault_world", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._settled = self.mark()
        self._connect()

    def plan(self, horizon: int, period_s: float, policy_id: str = "faults", sizes: tuple[int, int] = (0, 0)) -> None:
        """Publish chunks regularly, from now on.

        Args:
            horizon: H.
            period_s: Time between two chunks [s].
            policy_id: Of the chunks.
            sizes: Of latent and language.
        """
        self.horizon, self.policy_id, self.sizes = horizon, policy_id, sizes
        self._chunk_publisher = self.node.create_publisher(ActionChunk, "action_chunk", latched_qos(2))
        self.node.create_timer(period_s, self._plan)

    # --- time ---------------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """The ROS time."""
        return self.sim_ns if self._simulated_time else time.time_ns()

    def spin(self, timeout_s: float = 0.02) -> None:
        """Do one thing."""
        self._executor.spin_once(timeout_sec=timeout_s)
        while self._delayed and self._delayed[0][0] <= time.monotonic_ns():
            self.send_chunk(heapq.heappop(self._delayed)[2])
        self._join_commands()
        self._judge(time.time_ns() - round(self._settled_s * 1e9))

    def spin_for(self, duration_s: float) -> None:
        """Let time pass."""
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            self.spin(min(left_s, 0.02))
        self.system.check()

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Spin until the condition holds.

        Raises:
            ExpectationError: If it does not within the time, or a process ended by itself.
        """
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s:
                last = f"; the last step was {describe(self.steps[-1])}" if self.steps else "; there was no step"
                raise ExpectationError(f"{what} did not happen within {timeout_s:g} s{last}")
            self.spin()
            self.system.check()

    def settle(self) -> None:
        """Let everything arrive, then judge it."""
        end_s, now = time.monotonic() + self._settled_s, self.mark()
        while time.monotonic() < end_s:
            self.spin()
        self._judge(time.time_ns())
        came, due = len(self._between(self._settled, now)), now.due - self._settled.due
        if came < self._enough(due):
            self.judge.report("ticks", f"{came} ticks came, {due:.1f} were due")
        self._settled = now

    # --- what is seen -------------------------------------------------------------------------------------------

    def wait_state(self, state: State, reason: Reason | None = None, timeout_s: float = TIMEOUT_S) -> Seen:
        """The next step in this state, for this reason if one is given."""
        since = len(self.steps)

        def found() -> Seen | None:
            return next((s for s in self.steps[since:] if s.state == state and reason in (None, s.reason)), None)

        wanted = f"{state.name} {'' if reason is None else reason.name}".strip()
        self.wait_for(lambda: found() is not None, wanted, timeout_s)
        return found()

    def executed_planner(self) -> str:
        """The planner whose chunk the newest step executes, empty if there is none."""
        return self._planners.get((self.steps[-1].chunk_id, self.steps[-1].t_obs_ns), "")

    def stays(self, duration_s: float, allowed: Callable[[Seen], bool], what: str) -> list[Seen]:
        """Every step for some time must be so, and nearly all that are due must come."""
        begin = self.mark()
        self.spin_for(duration_s)
        steps = self.since(begin)
        for step in steps:
            if not allowed(step):
                raise ExpectationError(f"{what}, but a step was {describe(step)}")
        return steps

    def no_ticks(self, since_ns: int | None = None) -> None:
        """No tick is due since then [ns], or from now on, until one comes: the controller does not run."""
        self._gap_since_ns = time.time_ns() if since_ns is None else since_ns

    def mark(self) -> Mark:
        """Now, for :meth:`since`."""
        now_ns = time.time_ns()
        ran_ns = self._clock_ns
        if not self._simulated_time:
            ran_ns = (now_ns if self._gap_since_ns is None else self._gap_since_ns) - self._gaps_ns
        return Mark(now_ns, ran_ns / self.robot.rules.period_ns)

    def since(self, begin: Mark) -> list[Seen]:
        """All steps since then.

        Raises:
            ExpectationError: If none or too few of those came that were due.
        """
        end = self.mark()
        self.wait_for(lambda: bool(self.steps) and self.steps[-1].wall_ns > end.time_ns, "a step")
        steps, due = self._between(begin, end), end.due - begin.due
        if not steps or len(steps) < self._enough(due):
            raise ExpectationError(f"{len(steps)} ticks came, {due:.1f} were due")
        return steps

    def _between(self, begin: Mark, end: Mark) -> list[Seen]:
        return [step for step in self.steps if begin.time_ns < step.wall_ns <= end.time_ns]

    def _enough(self, due: float) -> float:
        return self.tick_share * due - 2  # at either end one may be on its way

    def stop(self, name: str) -> int:
        """End a process as an operator would, while the world goes on; returns its exit code.

        Raises:
            ExpectationError: If it does not end; it is killed then.
        """
        process = self.system.ask_to_stop(name)
        try:
            self.wait_for(lambda: process.poll() is not None, f"the end of {name}", STOP_TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode

    def wait_log(self, name: str, text: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until a process has written the text."""
        self.wait_for(lambda: text in self.system.log(name), f"{text!r} in the log of {name}", timeout_s)

    # --- what a person does -------------------------------------------------------------------------------------

    def enable(self, value: bool = True) -> SetBool.Response:
        """Call ``~/enable`` and wait for the answer."""
        self.wait_for(self._enable_client.service_is_ready, "the service enable")
        if value:
            self._at(time.time_ns(), self.judge.enabling)
        future = self._enable_client.call_async(SetBool.Request(data=value))
        self.wait_for(future.done, "the answer of enable")
        response = future.result()
        if not value:
            self._at(time.time_ns(), self.judge.disable)
        else:
            self._at(time.time_ns(), lambda: self.judge.enable(response.success))
        return response

    def press(self, pressed: bool) -> None:
        """Press or release the emergency stop."""
        self.pressed = pressed
        self._signal()

    def set_parameter(self, name: str, value: Any, node: str = CONTROLLER) -> SetParametersResult:
        """Set a parameter over the service and wait for the answer."""
        future = self.set_parameter_later(name, value, node)
        self.wait_for(future.done, f"the answer to {name}")
        return future.result().results[0]

    def set_parameter_later(self, name: str, value: Any, node: str = CONTROLLER) -> Future:
        """Set a parameter over the service."""
        if node not in self._parameter_clients:
            self._parameter_clients[node] = AsyncParameterClient(self.node, node)
        return self._parameter_clients[node].set_parameters([Parameter(name, value=value)])

    def controller_restarted(self, may_move: bool) -> None:
        """The controller's process was killed: a new one knows nothing but the chunks that the middleware keeps."""
        # Its first ticks may be over when they are heard: what was observed from now on counts.
        chunks, now_ns = list(self._recent_chunks), self.now_ns()
        self._unrecorded.clear()  # a tick's record may die with its process

        def tell() -> None:
            self.judge.restarted(may_move, now_ns)
            for chunk in chunks:
                self.judge.chunk(chunk, chunk.t_obs_ns)

        self._at(time.time_ns(), tell)

    def tell_judge(self, change: Callable[[Judge], None]) -> None:
        """Something that the judge has to know from now on."""
        self._at(time.time_ns(), lambda: change(self.judge))

    def close(self) -> None:
        """Leave the domain."""
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    # --- inside -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        node, robot = self.node, self.robot
        qos = sensor_qos(lockstep=False)
        self._cameras = {n: node.create_publisher(Image, topic, qos) for n, (topic, _, _) in robot.cameras.items()}
        self._joints = node.create_publisher(JointState, robot.joints_topic, qos)
        self._pose = node.create_publisher(PoseStamped, robot.pose_topic, qos) if robot.pose_topic else None
        self._stop = node.create_publisher(Bool, "emergency_stop", reliable_qos(10))
        self.instruction = node.create_publisher(String, "instruction", latched_qos(1))
        self._enable_client = node.create_client(SetBool, f"{CONTROLLER}/enable")
        node.create_subscription(ControlStep, "control_step", self._on_step, reliable_qos(1000))
        node.create_subscription(JointState, "joint_command", self._on_command, reliable_qos(100))
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, reliable_qos(10))
        node.create_subscription(ActionChunk, "action_chunk", self._on_chunk, latched_qos(10))
        self._images = {n: np.full((h, w, 3), 128, np.uint8) for n, (_, h, w) in robot.cameras.items()}
        if self._simulated_time:
            self._clock = node.create_publisher(Clock, "/clock", reliable_qos(10))
            node.create_timer(SIM_STEP_NS / 1e9, self._tick_clock)
        node.create_timer(0.01, self._publish_joints)
        if robot.cameras:
            node.create_timer(1 / 30, self._publish_images)
        if robot.rules.stop_timeout_ns:
            node.create_timer(1 / SIGNAL_RATE_HZ, self._signal)

    def _at(self, time_ns: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_ns, next(self._order), event))

    def _judge(self, until_ns: int) -> None:
        """Tell the judge what happened until then, but not what came after the newest step: one may be on its way."""
        while self._events and self._events[0][0] <= min(until_ns, self._newest_tick_ns):
            heapq.heappop(self._events)[2]()

    def _tick_clock(self) -> None:
        if not self.clock_stopped:
            self.sim_ns += SIM_STEP_NS
            self._clock_ns += SIM_STEP_NS if self._gap_since_ns is None else 0
        self.publish_clock()

    def publish_clock(self) -> None:
        """Publish the simulated time; while it is stopped nothing comes."""
        if not self.clock_stopped:
            self._clock.publish(Clock(clock=to_time(self.sim_ns)))

    def _signal(self) -> None:
        if self.signal_lost:
            return
        pressed, now_ns = self.pressed, self.now_ns()
        self._stop.publish(Bool(data=pressed))
        self._at(time.time_ns(), lambda: self.judge.emergency_stop(pressed, now_ns))

    def _publish(self, stream: str, publisher, make: Callable[[int], Any], measured: np.ndarray | None = None) -> None:
        """Publish a sample as the faults have it, and tell the judge."""
        if stream in self.lost or self._rng.random() < self.lost_share:
            return
        now_ns = self.now_ns()
        stamp_ns = self.frozen_ns.get(stream, now_ns + self.stamp_shift_ns.get(stream, 0))
        message = make(stamp_ns)
        sound = self.spoil[stream](message) if stream in self.spoil else True
        if sound and measured is not None:
            positions = dict(zip(message.name, message.position))
            measured = np.array([positions[name] for name in self.robot.action_names])
        self._at(time.time_ns(), lambda: self.judge.sample(stream, stamp_ns, now_ns, sound, measured))
        publisher.publish(message)

    def _publish_joints(self) -> None:
        now_s = time.monotonic()
        duration_s, self._moved_s = now_s - self._moved_s, now_s
        is_position = self.robot.rules.kind == "position"
        if is_position:
            self.arm.advance(None if self.arm_floats else self._command, duration_s)
        position = self.arm.measured() if is_position else np.zeros(len(self.robot.joint_names))
        names = self.robot.joint_names
        measured = position if is_position else None
        self._publish("joint_position", self._joints, lambda t: array_to_joint_state(position, names, t), measured)
        if self._pose is not None:
            pose = np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
            self._publish("ee_pose", self._pose, lambda t: array_to_pose(pose, t, "world"))

    def _publish_images(self) -> None:
        for name, publisher in self._cameras.items():
            self._publish(name, publisher, lambda t, name=name: array_to_image(self._images[name], t, name))

    def _plan(self) -> None:
        self.chunk_id += 1
        chunks = [self.make_chunk(self.planner, self.chunk_id)]
        for fault in self.chunk_faults:
            chunks = fault(chunks)
        for chunk in chunks:
            heapq.heappush(self._delayed, (time.monotonic_ns() + chunk.delay_ns, next(self._order), chunk))

    def make_chunk(self, planner: str, chunk_id: int) -> ChunkOnItsWay:
        """A chunk of the observation that is taken now: slow sines for positions, small motions for pose deltas."""
        rules, now_ns = self.robot.rules, self.now_ns()
        times_s = ((now_ns + rules.period_ns * np.arange(self.horizon)) % 1_000_000_000_000) / 1e9
        wave = np.sin(times_s[:, None] + np.arange(len(rules.names)))
        actions = (rules.lower + rules.upper) / 2 + 0.15 * wave * (rules.upper - rules.lower)
        names = self.robot.action_names
        return ChunkOnItsWay(chunk_id, now_ns, rules.period_ns, actions.astype(np.float32), names, planner, delay_ns=0)

    def send_chunk(self, chunk: ChunkOnItsWay) -> None:
        """Publish a chunk, sound or not."""
        message = ActionChunk(
            chunk_id=chunk.chunk_id,
            horizon=len(chunk.actions),
            action_names=list(chunk.names),
            planner_id=chunk.planner,
            policy_id=self.policy_id,
        )
        message.header.stamp = to_time(chunk.t_obs_ns)
        message.step = to_duration(chunk.step_ns)
        for field, values in (
            ("actions", chunk.actions),
            ("latent", np.zeros(self.sizes[0])),
            ("language", np.zeros(self.sizes[1])),
        ):
            getattr(message, field).frombytes(np.asarray(values, np.float32).tobytes())
        self.chunks_sent += 1
        self._give(chunk, self.now_ns(), time.time_ns())
        self._chunk_publisher.publish(message)

    def _give(self, chunk: ChunkOnItsWay, now_ns: int, at_ns: int) -> None:
        given = chunk.given()
        self._planners[chunk.chunk_id, chunk.t_obs_ns] = chunk.planner
        self._recent_chunks = [*self._recent_chunks[-1:], given]
        self._at(at_ns, lambda: self.judge.chunk(given, now_ns))

    def _on_chunk(self, message: ActionChunk, info: Mapping[str, Any]) -> None:
        if self.horizon:
            return  # the world's own
        self.chunks_heard.append(message)
        actions = np.array(message.actions, np.float32).reshape(message.horizon, -1)
        chunk = ChunkOnItsWay(
            message.chunk_id,
            to_ns(message.header.stamp),
            to_ns(message.step),
            actions,
            tuple(message.action_names),
            message.planner_id,
            0,
        )
        sent_ns = info["source_timestamp"]
        self._give(chunk, sent_ns, sent_ns)

    def _on_command(self, message: JointState, info: Mapping[str, Any]) -> None:
        self.commands.append(message)
        self._command = np.array(message.position)
        left_ns, stamp_ns = info["source_timestamp"], to_ns(message.header.stamp)
        self._sent.setdefault(stamp_ns, deque()).append((left_ns, self._command))
        self._newest_sent_ns = max(self._newest_sent_ns, left_ns)
        if not self.leaving:
            self._unrecorded.append((left_ns, stamp_ns, self._command))

    def _check_recorded(self, until_ns: int) -> None:
        """Every command that left before has its step, since steps come in order."""
        while self._unrecorded and self._unrecorded[0][0] < until_ns:
            _, stamp_ns, command = self._unrecorded.pop(0)
            recorded = self._recorded.get(stamp_ns, [])
            if not any(np.array_equal(command, values) for values in recorded):
                self.judge.report("record", f"{command.tolist()} was sent for {stamp_ns}, recorded are {recorded}")

    def _join_commands(self) -> None:
        """Tell the judge of the ticks whose commands have come: what was sent, not what the record says was sent."""
        while self._untold:
            arrived_s, recorded_ns, step = self._untold[0]
            sent = self._sent.get(step.t_ns)
            # The command leaves before its record, but on another topic, and may arrive here after it.
            overtaken = self._newest_sent_ns > recorded_ns or time.monotonic() - arrived_s > self._settled_s
            if step.command is not None and not sent and not overtaken:
                return
            self._untold.popleft()
            missing = step.command if self._commands_get_lost else None
            left_ns, command = sent.popleft() if sent else (step.t_ns, missing)
            if not sent:
                self._sent.pop(step.t_ns, None)
            # A tick that starts late uses what came until then.
            at_ns = recorded_ns if self._simulated_time else max(step.t_ns, left_ns)
            sent_ns = None if self._simulated_time or command is missing else left_ns
            happened = replace(step, command=command, wall_ns=at_ns, sent_ns=sent_ns)
            self._at(at_ns, partial(self._tell_tick, step, happened))
            self._newest_tick_ns = max(self._newest_tick_ns, at_ns)

    def _tell_tick(self, recorded: Seen, happened: Seen) -> None:
        if recorded.command is not None and happened.command is None:
            self.judge.report("record", f"{recorded.command.tolist()} of {recorded.t_ns} is recorded, and was not sent")
        self.judge.tick(happened)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.diagnostics = {v.key: v.value for status in message.status for v in status.values}

    def _on_step(self, message: ControlStep, info: Mapping[str, Any]) -> None:
        recorded_ns, t_ns = info["source_timestamp"], to_ns(message.header.stamp)
        ages = zip(message.stream_names, message.stream_ages_s)
        seen = Seen(
            t_ns=t_ns,
            wall_ns=recorded_ns,
            state=State(message.state),
            reason=Reason(message.reason),
            command=np.array(message.command) if message.command else None,
            ages_ns={name: round(age * 1e9) for name, age in ages if np.isfinite(age)},
            t_obs_ns=to_ns(message.chunk_stamp),
            chunk_id=message.chunk_id,
            slot=message.slot,
            base_action=np.array(message.base_action),
            residual=np.array(message.residual),
        )
        if self._gap_since_ns is not None and recorded_ns > self._gap_since_ns:
            self._gaps_ns += recorded_ns - self._gap_since_ns
            self._gap_since_ns = None
        self.steps.append(seen)
        self.raw.append(message)
        if seen.command is not None:
            self._recorded.setdefault(seen.t_ns, []).append(seen.command)
        self._untold.append((time.monotonic(), recorded_ns, seen))
        self._check_recorded(recorded_ns - 2 * self.robot.rules.period_ns)


def free_domain() -> int:
    """A DDS domain, drawn at random."""
    return random.SystemRandom().choice(DOMAINS)


def describe(step: Seen) -> str:
    """State and reason of a step, for people."""
    return f"{step.state.name} {step.reason.name}"
