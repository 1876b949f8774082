"""Node ``correction_controller``: a fixed-rate tick that corrects the chunk's action with the newest observation."""

import contextlib
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import ClockType
from rclpy.task import Future
from sensor_msgs.msg import JointState
from std_msgs.msg import Header

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import ControlStep, CorrectionLoop
from a2c2_ros.core.errors import ChunkError, ObservationError
from a2c2_ros.core.health import LoopHealth
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.safety import MOVING, Reason, State, Verdict
from a2c2_ros.core.timing import StepTiming, Tick, TickGrid
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import ControlConfiguration, PlannerStatus
from a2c2_ros.msg import ControlStep as ControlStepMsg
from a2c2_ros.nodes.command_sinks import Sink, make_sink
from a2c2_ros.nodes.conversions import (
    joint_state_to_array,
    message_to_chunk,
    step_to_message,
    to_ns,
    to_time,
)
from a2c2_ros.nodes.diagnostics import diagnostics_of
from a2c2_ros.nodes.handover import Handover
from a2c2_ros.nodes.head_loader import HeadLoader
from a2c2_ros.nodes.observation_source import ObservationSource
from a2c2_ros.nodes.permission import Permission
from a2c2_ros.nodes.realtime import TickThread, become_normal, become_realtime
from a2c2_ros.nodes.runtime import (
    EdgeLog,
    ManagedNode,
    NodeParameters,
    PatientParameterService,
    latched_qos,
    reliable_qos,
    run,
)

GIL_SWITCH_INTERVAL_S = 0.00003
"""After this time a tick takes the interpreter from a callback that is computing; Python's default is 5 ms."""
PREPARATION_LONGEST_S = 0.01
"""Two cameras at 30 Hz leave less than 17 ms per image."""
DIAGNOSTICS_PERIOD_S = 1.0


class CorrectionController(ManagedNode):
    """Runs :class:`CorrectionLoop` at every deadline of a grid on the ROS clock.

    In real time the loop belongs to a :class:`TickThread`; the executor's thread takes messages, parameters and
    services; what changes the loop, and what of a tick may block (logging), goes from one to the other by a
    :class:`Handover`. In lockstep everything is in the executor's thread: a timer says that a step is due, and it runs
    when every input of that step has arrived.
    """

    def __init__(self) -> None:
        super().__init__("correction_controller", start_parameter_services=False)
        # Messages, enable and stop go on while a change of a parameter waits for a head to load.
        self._inputs = MutuallyExclusiveCallbackGroup()
        self._parameter_services = PatientParameterService(self, self._prepare_parameters)
        self._handover = Handover(self, self._inputs)
        self._heads = HeadLoader(self._handover.wake)
        self._permission = Permission(
            self, self._inputs, self._handover, lambda: self._loop is not None, self._ask_for_chunk
        )
        self._log = EdgeLog(self)
        self._profile = None
        self._loop: CorrectionLoop | None = None
        self._head: OnnxHead | None = None  # of the last accepted parameters
        # The file of a head may be another one under its old name.
        self._settings = NodeParameters(
            self, ControllerConfig(), self._validate, self._apply, frozenset({"correction.model_path"})
        )
        self._sink: Sink | None = None
        self._step_publisher = None
        self._source: ObservationSource | None = None
        self._thread: TickThread | None = None
        self._timer = None
        self._unpublished: ControlStepMsg | None = None
        self._announced = 0  # newest revision of the configuration
        self._revision = 0  # the one that the loop uses
        self._due: Tick | None = None
        self._postponed_ticks = 0
        self._last_run_ns: int | None = None
        self._status: PlannerStatus | None = None
        self._newest_chunk_ns = 0
        self._language: np.ndarray | None = None
        self._verdict: tuple[State, Reason] | None = None
        if self._settings.value.autostart:
            self.autostart()

    def configure(self) -> None:
        self.cleanup()  # a defect in another transition leaves the last configuration behind
        config = self._settings.value
        self._profile = load_profile(config.robot)
        self._profile.check_rate(config.control_rate_hz)
        self._head = self._heads.load(config, self._profile)
        self._loop = CorrectionLoop(config, self._profile.robot, self._head, latch=self._permission.latch)
        robot = self._profile.robot
        nothing = np.full(len(robot.action_names), np.inf)
        self._rehearsal = CorrectionLoop(
            dataclasses.replace(config, correction__enabled=False, start_state="enabled"),
            # No arm follows what is not sent.
            dataclasses.replace(
                robot, limits=dataclasses.replace(robot.limits, following=nothing), reports_ready=False
            ),
        )
        self._stream_names = tuple(self._profile.robot.streams)
        # The file may have been edited since the last configuration: loop and sink are of one and the same profile.
        self._sink = make_sink(self, self._profile, callback_group=self._inputs)
        self._permission.serve(self._loop.latch, self._profile.ready_topic)
        if self._step_publisher is None:
            self._open_topics()
        self._revision = self._announce(config, self._head)
        clock = "simulated" if self.get_clock().ros_time_is_active else "system"
        self.get_logger().info(
            f"configured: robot {self._profile.robot.name}, {config.control_rate_hz:g} Hz on the {clock} clock, "
            f"{'lockstep' if config.lockstep else 'real time'}, head {config.correction__model_path}"
        )

    def _open_topics(self) -> None:
        """What serves every configuration, from the first one on."""
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", reliable_qos(10))
        self._configuration_publisher = self.create_publisher(
            ControlConfiguration, "control_configuration", latched_qos(10)
        )
        self._replan_publisher = self.create_publisher(Header, "replan", latched_qos(1))
        self._step_publisher = self.create_publisher(ControlStepMsg, "control_step", reliable_qos(100))

    def activate(self) -> None:
        config = self._settings.value
        assert self.get_clock().clock_type == ClockType.ROS_TIME
        # The time in which the node was not active is no missed tick, and the clock may have gone back in it.
        self._grid, self._last_run_ns = TickGrid(config.period_ns), None
        self._due, self._postponed_ticks = None, 0
        self._status, self._newest_chunk_ns = None, 0
        self._loop.forget()  # the last chunks come again, whatever happened since they were computed
        self._ask_for_chunk()
        prepare = None if config.lockstep else self._prepare
        self._source = ObservationSource(
            self,
            self._profile,
            config.lockstep,
            self._log,
            lambda: self._settings.value.future_tolerance_ns,
            self._run_if_ready,
            prepare,
            self._inputs,
            config.realtime__priority - 1,
            PREPARATION_LONGEST_S,
        )
        self._chunk_subscription = self.create_subscription(
            ActionChunkMsg, "action_chunk", self._on_chunk, latched_qos(2), callback_group=self._inputs
        )
        self._takeover_subscription = self.create_subscription(
            JointState, "takeover", self._on_takeover, reliable_qos(1), callback_group=self._inputs
        )
        self._health = LoopHealth(self._stream_names, self._profile.robot.hold.keep)
        self._reported_s = time.monotonic()
        # What exists now lives as long as the node: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        if config.lockstep:
            self._status_subscription = self.create_subscription(
                PlannerStatus, "planner_status", self._on_status, reliable_qos(10), callback_group=self._inputs
            )
            self._timer = self.create_timer(
                config.period_ns / 1e9, self._on_timer, callback_group=self._inputs, clock=self.get_clock()
            )
            return
        sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
        self._handover.threaded = True
        with contextlib.ExitStack() as undo:
            undo.callback(self._handover.end)  # a stop would wait for a thread that there is not
            self._thread = TickThread(
                self,
                config.period_ns,
                next_ns=lambda: self._grid.next_ns,
                lead_s=min(config.realtime__lead_s, config.period_ns / 2e9),
                on_lead=self._rehearse,
                on_tick=self._on_deadline,
                on_standstill=self._on_standstill,
                standstill_s=lambda: self._settings.value.clock_timeout_s,
                on_failure=lambda error: self._handover.later(partial(self._give_up, error)),
                priority=config.realtime__priority,
            )
            undo.pop_all()
        # A callback that holds the interpreter must not be displaced by another process while a tick waits for it.
        become_realtime(config.realtime__priority - 1)
        self.get_logger().info(f"control loop: {self._thread.scheduling}")

    def deactivate(self) -> None:
        if self._source is None:
            return
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
            become_normal()
            self._handover.end()
            self._publish_step()
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None
            self.destroy_subscription(self._status_subscription)
        observation = self._source.snapshot()
        self._source.close()
        self._source = None
        self.destroy_subscription(self._chunk_subscription)
        self.destroy_subscription(self._takeover_subscription)
        for command in self._loop.stop(self._now_ns(observation), observation):
            if self.context.ok():
                self._sink.send(command, self.get_clock().now().nanoseconds)
                time.sleep(self._settings.value.period_ns / 1e9)

    def cleanup(self) -> None:
        self._loop = None
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def close(self) -> None:
        """Stop working; the node is about to be destroyed."""
        self.deactivate()
        self._heads.close()

    # --- parameters and heads -----------------------------------------------------------------------------------

    def _prepare_parameters(self, values: Mapping[str, object]) -> Future | None:
        """Load the head that a change of parameters asks for, off the executor's thread."""
        self._heads.forget()
        name = values.get("correction.model_path")
        # For "" there is nothing to load, and correction.enabled of the same request says whether it is allowed.
        if self._loop is None or not isinstance(name, str) or name == "":
            return None
        return self._heads.begin(dataclasses.replace(self._settings.value, correction__model_path=name), self._profile)

    def _validate(self, candidate: ControllerConfig) -> None:
        if self._loop is not None and "correction.model_path" in self._settings.named:
            self._heads.check(candidate, self._profile)

    def _apply(self, config: ControllerConfig) -> None:
        if self._loop is None:
            return
        if "correction.model_path" in self._settings.named:
            self._head = self._heads.take()
        # Not the loop's head: what was posted before may not have reached it yet.
        self._handover.post(partial(self._use, config, self._head, self._announce(config, self._head)))

    def _use(self, config: ControllerConfig, head: OnnxHead | None, revision: int) -> None:
        self._loop.configure(config, head)
        self._rehearsal.configure(dataclasses.replace(config, correction__enabled=False), None)
        self._revision = revision

    def _announce(self, config: ControllerConfig, head: OnnxHead | None) -> int:
        """Publish a configuration, before any step that uses it; returns its revision."""
        self._announced += 1
        message = ControlConfiguration(
            revision=self._announced,
            parameters=json.dumps(config.ros_values),
            robot=self._profile.text,
        )
        if head is not None:
            message.head_path, message.head_sha256 = str(head.path), head.sha256
            message.head_manifest = head.manifest.to_json()
        message.header.stamp = to_time(self.get_clock().now().nanoseconds)
        self._configuration_publisher.publish(message)
        return self._announced

    def _prepare(self, camera: str, image: np.ndarray) -> None:
        """Runs on the source's preparation thread."""
        head = self._loop.head
        if head is not None and camera in head.manifest.cameras:
            language = self._language
            if language is None:
                language = np.zeros(head.manifest.language_size, np.float32)
            head.prepare(camera, image, language)

    # --- messages, on the executor's thread ----------------------------------------------------------------------

    def _ask_for_chunk(self) -> None:
        """Tell the planner that no chunk counts that was observed until now; a simulation waits for the next anyway."""
        if not self._settings.value.lockstep:
            self._replan_publisher.publish(Header(stamp=self.get_clock().now().to_msg()))

    def _on_takeover(self, message: JointState) -> None:
        try:
            command = joint_state_to_array(message, self._profile.robot.action_names)
        except ObservationError as error:
            self._log.problem("takeover", f"takeover command refused: {error}")
        else:
            self._log.fine("takeover")
            self._handover.post(partial(self._take_over, command, to_ns(message.header.stamp)))

    def _take_over(self, command: np.ndarray, stamp_ns: int) -> None:
        try:
            self._loop.take_over(command, stamp_ns, self._now_ns(self._source.snapshot()))
        except ObservationError as error:
            self._handover.later(partial(self._log.problem, "takeover command", f"takeover command refused: {error}"))
        else:
            self._fine("takeover command")

    def _on_chunk(self, message: ActionChunkMsg) -> None:
        try:
            chunk = message_to_chunk(message)
        except ChunkError as error:
            self._handover.post(partial(self._loop.refused, error))
            self._log.problem("chunk", f"chunk refused: {error}")
        else:
            self._handover.post(lambda: self._install(chunk))
        self._newest_chunk_ns = max(self._newest_chunk_ns, to_ns(message.header.stamp))
        self._run_if_ready()

    def _install(self, chunk) -> None:
        try:
            installed = self._loop.install(chunk, self._now_ns(self._source.snapshot()))
        except ChunkError as error:
            self._handover.later(partial(self._log.problem, "chunk", f"chunk refused: {error}"))
            return
        if installed:
            self._language = chunk.language
            self._rehearsal.reset()
            with contextlib.suppress(ChunkError):  # the loop took it: no reason to stop, only to tick with cold caches
                self._rehearsal.install(chunk, chunk.t_obs_ns)
            self._handover.later(partial(self._log.fine, "chunk"))

    def _on_status(self, message: PlannerStatus) -> None:
        self._status = message
        self._run_if_ready()

    def _now_ns(self, observation: Observation) -> int:
        """Time on the ROS clock; in lockstep sensor data may be ahead of ``/clock`` by the transport."""
        now = self.get_clock().now().nanoseconds
        if self._settings.value.lockstep:
            now = max(now, *observation.stamps_ns.values(), 0)
        return now

    def _fine(self, key: str) -> None:
        """End a problem; where there is none, as in nearly every tick, the executor is not woken."""
        if self._log.holds(key):
            self._handover.later(partial(self._log.fine, key))

    def _report_health(self) -> None:
        """Once a second, at the end of a tick: a timer of its own could meet a deadline every time."""
        now_s = time.monotonic()
        if now_s - self._reported_s >= DIAGNOSTICS_PERIOD_S:
            self._handover.later(partial(self._publish_diagnostics, now_s - self._reported_s))
            self._reported_s = now_s

    def _publish_diagnostics(self, interval_s: float) -> None:
        if unheard := self._sink.unheard():
            hint = "is the driver's controller loaded, is the name right?"
            self._log.problem("subscriber", f"nobody subscribes to {' and '.join(unheard)}: {hint}")
        else:
            self._log.fine("subscriber")
        statuses = self._health.report(
            self._settings.value,
            interval_s,
            self._source.received,
            self._log.counts,
            self._loop.chunks.copy(),
        )
        self._diagnostics_publisher.publish(diagnostics_of(self, statuses, self._profile.robot.name))

    def _give_up(self, error: Exception) -> None:
        raise error

    # --- ticks --------------------------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Run the code of a tick on a loop of its own, without a head and without sending.

        Between two ticks other code and other processes take over the processor's caches; a tick that begins with cold
        ones takes several times as long. To publish the last step only now warms what publishes the command.
        """
        next_ns = self._grid.next_ns
        if next_ns is None:
            return
        self._publish_step()
        try:
            step = self._rehearsal.tick(next_ns, self._source.snapshot())
            if step.command is not None:
                self._sink.rehearse(step.command, next_ns)
        except Exception as error:  # noqa: BLE001, a defect, but not of the tick: the robot goes on, a little later
            self._handover.later(
                partial(self._log.problem, "rehearsal", f"{type(error).__name__} in a rehearsal: {error}")
            )
        else:
            self._fine("rehearsal")

    def _on_deadline(self) -> None:
        """Real time: a deadline has come; on the loop's thread."""
        clock = self.get_clock()
        now_ns = clock.now().nanoseconds
        tick = self._grid.tick(now_ns, None if clock.ros_time_is_active else time.monotonic_ns())
        if tick is None:
            return
        problem = self._clock_jumped(tick)
        self._run(tick, self._source.snapshot(), now_ns, problem)

    def _on_standstill(self) -> None:
        """Real time: the simulated clock stands still; on the loop's thread."""
        next_ns = self._grid.next_ns
        if next_ns is None:
            self._handover.take()
            self._report_health()
            return
        last_ns = next_ns - self._grid.period_ns
        problem = Verdict(State.HOLDING, Reason.CLOCK_STOPPED)
        self._last_run_ns = None
        self._run(Tick(last_ns, 0, 0, 0), self._source.snapshot(), self.get_clock().now().nanoseconds, problem)

    def _on_timer(self) -> None:
        """Lockstep: a step is due; it runs when its inputs are there."""
        tick = self._grid.tick(self.get_clock().now().nanoseconds)
        if tick is None:
            return
        self._clock_jumped(tick)
        if self._due is not None and not tick.jump_ns:
            self._postponed_ticks += 1
        self._due = tick
        self._run_if_ready()

    def _clock_jumped(self, tick: Tick) -> Verdict | None:
        if tick.jump_ns:
            self._last_run_ns = None
        if tick.jump_ns >= 0:
            return None
        detail = f"the clock jumped back by {-tick.jump_ns / 1e9:.3f} s"
        self._handover.later(partial(self.get_logger().warning, f"{detail}: starting afresh"))
        self._loop.forget()
        self._source.clear()
        self._status, self._newest_chunk_ns = None, 0
        return Verdict(State.HOLDING, Reason.CLOCK_JUMPED, detail)

    def _run_if_ready(self) -> None:
        tick = self._due
        if tick is None:
            return
        observation = self._source.snapshot()
        status = self._status
        if (
            status is None
            or to_ns(status.header.stamp) != tick.t_tick_ns
            or to_ns(status.chunk_stamp) > self._newest_chunk_ns
            or not observation.synchronous_at(tick.t_tick_ns, self._profile.robot.streams)
        ):
            return
        self._due = None
        self._run(tick, observation, self.get_clock().now().nanoseconds, None)

    def _run(self, tick: Tick, observation: Observation, started_ns: int, problem: Verdict | None) -> None:
        self._handover.take()
        try:
            step = self._loop.tick(tick.t_tick_ns, observation, problem)
        except Exception as error:  # noqa: BLE001, a defect: the robot must come to its hold, commanded by the next tick
            self._loop.fault(f"{type(error).__name__}: {error}")
            text = f"a defect of the control loop:\n{traceback.format_exc()}"
            # Every one: the latch makes it one per fault. A lambda: rclpy ties a severity to the line that logs.
            self._handover.later(lambda: self.get_logger().error(text))
            return
        command_latency_ns = 0
        if step.command is not None:
            rest = self._loop.rest_of_chunk(step) if self._sink.wants_rest else None
            self._sink.send(step.command, tick.t_tick_ns, rest)
            command_latency_ns = self.get_clock().now().nanoseconds - tick.t_tick_ns
        missed, self._postponed_ticks = tick.missed + self._postponed_ticks, 0
        period_error_ns = 0
        if self._last_run_ns is not None:
            period_error_ns = started_ns - self._last_run_ns - (missed + 1) * self._settings.value.period_ns
        self._last_run_ns = started_ns
        timing = StepTiming(period_error_ns, started_ns - tick.t_tick_ns, command_latency_ns, missed)
        self._publish_step()
        self._unpublished = step_to_message(step, self._stream_names, timing, self._revision)
        if self._thread is None or not self._thread.leads:
            self._publish_step()
        self._health.add(step, timing)
        self._report_health()
        if (step.state, step.reason) != self._verdict:
            self._verdict = (step.state, step.reason)
            self._handover.later(partial(self._log_edge, step))

    def _publish_step(self) -> None:
        if self._unpublished is not None:
            self._step_publisher.publish(self._unpublished)
            self._unpublished = None

    def _log_edge(self, step: ControlStep) -> None:
        text = f"{step.state.name}: {step.reason.name}" + (f" ({step.detail})" if step.detail else "")
        # rclpy ties a severity to the line that logs: one line for both raises.
        if step.state not in (State.WAITING, *MOVING):
            self.get_logger().warning(text)
        else:
            self.get_logger().info(text)


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(CorrectionController, args))


if __name__ == "__main__":
    main()
