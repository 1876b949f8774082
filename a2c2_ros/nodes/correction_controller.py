"""Node ``correction_controller``: a fixed-rate tick that corrects the chunk's action with the newest observation."""

import sys

from rclpy.clock import ClockType

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import ControlStep, CorrectionLoop
from a2c2_ros.core.errors import ChunkError
from a2c2_ros.core.safety import State
from a2c2_ros.core.timing import Tick, TickGrid
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.drivers.sinks import Sink, make_sink
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import ControlStep as ControlStepMsg
from a2c2_ros.msg import PlannerStatus
from a2c2_ros.nodes.conversions import message_to_chunk, step_to_message, to_ns
from a2c2_ros.nodes.observation_source import ObservationSource
from a2c2_ros.nodes.runtime import EdgeLog, ManagedNode, NodeParameters, latched_qos, reliable_qos, run
from a2c2_ros.paths import model_path


class CorrectionController(ManagedNode):
    """Runs :class:`CorrectionLoop` on a timer of the ROS clock; everything happens on the executor's one thread.

    In lockstep the timer only says that a step is due; it runs when every input of that step has arrived.
    """

    def __init__(self) -> None:
        super().__init__("correction_controller")
        self._log = EdgeLog(self)
        self._profile = None
        self._loop: CorrectionLoop | None = None
        self._candidate_head: tuple[str, OnnxHead] | None = None
        self._settings = NodeParameters(self, ControllerConfig(), self._validate, self._apply)
        self._send: Sink | None = None
        self._timer = None
        self._due: Tick | None = None
        self._postponed = 0
        self._last_run_ns: int | None = None
        self._status: PlannerStatus | None = None
        self._newest_chunk_ns = 0
        self._state: State | None = None
        if self._settings.value.autostart:
            self.autostart()

    def configure(self) -> None:
        config = self._settings.value
        self._profile = load_profile(config.robot)
        head = self._load_head(config)
        self._loop = CorrectionLoop(config, self._profile.robot, head)
        self._grid = TickGrid(config.period_ns)
        if self._send is None:  # the robot cannot change: what was made once serves every configuration
            self._send = make_sink(self, self._profile)
            self._step_publisher = self.create_publisher(ControlStepMsg, "control_step", reliable_qos(100))
        self._stream_names = tuple(self._profile.robot.streams)
        clock = "simulated" if self.get_clock().ros_time_is_active else "system"
        self.get_logger().info(
            f"configured: robot {self._profile.robot.name}, {config.control_rate_hz:g} Hz on the {clock} clock, "
            f"{'lockstep' if config.lockstep else 'real time'}, head {config.correction__model_path}"
        )

    def activate(self) -> None:
        config = self._settings.value
        assert self.get_clock().clock_type == ClockType.ROS_TIME
        self._source = ObservationSource(self, self._profile, config.lockstep, self._log, self._run_if_ready)
        self._chunk_subscription = self.create_subscription(
            ActionChunkMsg, "action_chunk", self._on_chunk, latched_qos(2)
        )
        self._status_subscription = None
        if config.lockstep:
            self._status_subscription = self.create_subscription(
                PlannerStatus, "planner_status", self._on_status, reliable_qos(10)
            )
        self._timer = self.create_timer(config.period_ns / 1e9, self._on_timer, clock=self.get_clock())

    def deactivate(self) -> None:
        if self._timer is None:
            return
        self.destroy_timer(self._timer)
        self._timer = None
        self._source.close()
        self.destroy_subscription(self._chunk_subscription)
        if self._status_subscription is not None:
            self.destroy_subscription(self._status_subscription)
        hold = self._loop.stop()
        if hold is not None and self.context.ok():
            self._send(hold, self.get_clock().now().nanoseconds)

    def cleanup(self) -> None:
        self._loop = None

    def close(self) -> None:
        """Stop working; the node is about to be destroyed."""
        self.deactivate()

    def _load_head(self, config: ControllerConfig) -> OnnxHead | None:
        """The head of a configuration, checked against the robot, or None if correction is off and no head is named."""
        name = config.correction__model_path
        if not name and not config.correction__enabled:
            return None
        head = OnnxHead(model_path(name), config.correction__threads)
        robot = self._profile.robot
        head.manifest.check_robot(
            self._profile.camera_shapes(), robot.state_names, robot.action_names, robot.action_space, config.period_ns
        )
        head.warm_up()
        return head

    def _validate(self, candidate: ControllerConfig) -> None:
        if self._loop is not None and candidate.correction__model_path != self._loop.config.correction__model_path:
            self._candidate_head = (candidate.correction__model_path, self._load_head(candidate))

    def _apply(self, config: ControllerConfig) -> None:
        if self._loop is None:
            return
        head = self._loop.head
        if self._candidate_head is not None and self._candidate_head[0] == config.correction__model_path:
            head = self._candidate_head[1]
        self._candidate_head = None
        self._loop.configure(config, head)

    def _on_chunk(self, message: ActionChunkMsg) -> None:
        try:
            chunk = message_to_chunk(message)
            self._loop.install(chunk, self._now_ns())
        except ChunkError as error:
            self._log.problem("chunk", f"chunk refused: {error}")
        else:
            self._log.fine("chunk")
        self._newest_chunk_ns = max(self._newest_chunk_ns, to_ns(message.header.stamp))
        self._run_if_ready()

    def _on_status(self, message: PlannerStatus) -> None:
        self._status = message
        self._run_if_ready()

    def _now_ns(self) -> int:
        """Time on the ROS clock; in lockstep sensor data may be ahead of ``/clock`` by the transport."""
        now = self.get_clock().now().nanoseconds
        if self._settings.value.lockstep:
            now = max(now, *self._source.snapshot().stamps_ns.values(), 0)
        return now

    def _on_timer(self) -> None:
        now = self.get_clock().now().nanoseconds
        tick = self._grid.tick(now)
        if tick is None:
            return
        if tick.jump_ns:
            self._last_run_ns = None
        if tick.jump_ns < 0:
            self.get_logger().warning(f"the clock jumped back by {-tick.jump_ns / 1e9:.3f} s: starting afresh")
            self._loop.reset()
            self._source.clear()
            self._status, self._newest_chunk_ns = None, 0
        if self._due is not None and not tick.jump_ns:
            self._postponed += 1
        self._due = tick
        self._run_if_ready()

    def _run_if_ready(self) -> None:
        tick = self._due
        if tick is None:
            return
        observation = self._source.snapshot()
        if self._settings.value.lockstep:
            status = self._status
            if (
                status is None
                or to_ns(status.header.stamp) != tick.t_tick_ns
                or to_ns(status.chunk_stamp) > self._newest_chunk_ns
                or not observation.synchronous_at(tick.t_tick_ns, self._profile.robot.streams)
            ):
                return
        self._due = None
        started_ns = self.get_clock().now().nanoseconds
        step = self._loop.tick(tick.t_tick_ns, observation)
        if step.command is not None:
            self._send(step.command, tick.t_tick_ns)
        period_error_ns = 0
        missed, self._postponed = tick.missed + self._postponed, 0
        if self._last_run_ns is not None:
            period_error_ns = started_ns - self._last_run_ns - (missed + 1) * self._settings.value.period_ns
        self._last_run_ns = started_ns
        self._step_publisher.publish(step_to_message(step, self._stream_names, period_error_ns, missed))
        self._log_edge(step)

    def _log_edge(self, step: ControlStep) -> None:
        if step.state == self._state:
            return
        self._state = step.state
        text = f"{step.state.name}: {step.reason.name}" + (f" ({step.detail})" if step.detail else "")
        # rclpy ties a severity to the line that logs: one line for both raises.
        if step.state >= State.HOLDING:
            self.get_logger().warning(text)
        else:
            self.get_logger().info(text)


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(CorrectionController, args))


if __name__ == "__main__":
    main()
