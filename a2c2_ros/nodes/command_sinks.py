"""Command sinks: how a command leaves for the robot; chosen by the profile, not by code.

What ros2_control's joint_trajectory_controller does with a header's stamp: zero starts the trajectory when the message
is taken, however late it is. With the tick's stamp the points lie at fixed times, points that are over are skipped
(from ros2_controllers 6.8 on the trajectory is shifted instead), and a trajectory that is over is refused, so that a
late command cannot move the robot; both clocks must agree to less than ``time_from_start``. A new trajectory replaces
the last one. At the end of a trajectory the robot stays there: with ``points: chunk`` a controller that dies leaves the
rest of its chunk to the driver, with ``points: one`` a single step.
"""

import importlib
from array import array
from collections import deque
from typing import Any, Protocol

import numpy as np
from action_msgs.msg import GoalStatus
from geometry_msgs.msg import TwistStamped
from rclpy.action import ActionClient
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.serialization import serialize_message
from rclpy.task import Future
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import CommandSpec, GripperSpec, Profile
from a2c2_ros.nodes.conversions import to_duration, to_time
from a2c2_ros.nodes.runtime import EdgeLog, reliable_qos

GRIPPER_REPEAT_NS = 1_000_000_000
"""A gripper command that did not change is published again after this time [ns]: its driver may have been restarted.
An action's goal is sent again after a silence of this length, too, because somebody else may have moved the gripper,
and as often as this until it is accepted."""


class Sink(Protocol):
    """Sends commands to a robot; never waits."""

    wants_rest: bool  # send takes the rest of the chunk

    def send(self, command: np.ndarray, stamp_ns: int, rest: np.ndarray | None = None) -> None:
        """Send a command.

        Args:
            command: (A,) float32, action units.
            stamp_ns: Time of the tick [ns].
            rest: (n, A) float32, the actions that follow, one control period apart; only if ``wants_rest``.
        """
        ...

    def rehearse(self, command: np.ndarray, stamp_ns: int) -> None:
        """Do everything but send."""
        ...

    def unheard(self) -> list[str]:
        """Topics to which nobody subscribes although commands were published there since the last call."""
        ...

    def close(self) -> None:
        """Give back what was made on the node; called by the executor's thread, nothing is sent afterwards."""
        ...


def make_sink(node: Node, profile: Profile, callback_group: CallbackGroup | None = None) -> Sink:
    """The sink of a profile.

    Args:
        node: Whose publishers and action client it uses.
        profile: Of the robot.
        callback_group: Of a gripper's action; None: the node's default one.

    Raises:
        ConfigError: If the gripper's kind needs control_msgs and they are not installed.
    """
    return RobotSink(node, profile, callback_group)


class RobotSink:
    """One topic for the arm and, if the profile has a gripper, its own topic or action."""

    def __init__(self, node: Node, profile: Profile, callback_group: CallbackGroup | None) -> None:
        command = profile.command
        self._node = node
        self.wants_rest = command.points == "chunk"
        self._mapping = command.mapping
        self._message = MESSAGES[command.kind](command)
        # First, because it may be refused: nothing is left behind on the node then.
        self._gripper = None if profile.gripper is None else _Gripper(node, profile.gripper, callback_group)
        self._publisher = node.create_publisher(self._message.message_type, command.topic, reliable_qos(1))
        self._sent = False

    def send(self, command: np.ndarray, stamp_ns: int, rest: np.ndarray | None = None) -> None:
        """See :class:`Sink`."""
        self._sent = True
        self._publisher.publish(self._filled(command, stamp_ns, rest))
        if self._gripper is not None:
            self._gripper.send(command, stamp_ns)

    def rehearse(self, command: np.ndarray, stamp_ns: int) -> None:
        """See :class:`Sink`."""
        serialize_message(self._filled(command, stamp_ns, None))

    def unheard(self) -> list[str]:
        """See :class:`Sink`."""
        publishers = [self._publisher]
        if self._gripper is not None:
            publishers += self._gripper.publishers
        sent, self._sent = self._sent, False
        return [publisher.topic_name for publisher in publishers if sent and not publisher.get_subscription_count()]

    def close(self) -> None:
        """See :class:`Sink`."""
        self._node.destroy_publisher(self._publisher)
        if self._gripper is not None:
            self._gripper.close()

    def _filled(self, command: np.ndarray, stamp_ns: int, rest: np.ndarray | None) -> Any:
        values = self._mapping.to_driver(command)
        return self._message.filled(values, stamp_ns, None if rest is None else self._mapping.to_driver(rest))


# --- messages: made once and reused, nothing but the values changes --------------------------------------------------


class Message(Protocol):
    """A message of the driver."""

    message_type: type

    def filled(self, values: np.ndarray, stamp_ns: int, rest: np.ndarray | None) -> Any:
        """The message with (J,) float64 values in the driver's units and order, and (n, J) that follow."""
        ...


class _JointState:
    """``sensor_msgs/JointState``: positions by name."""

    message_type = JointState

    def __init__(self, spec: CommandSpec) -> None:
        self._message = JointState(name=list(spec.joints))

    def filled(self, values: np.ndarray, stamp_ns: int, rest: np.ndarray | None) -> JointState:
        self._message.header.stamp = to_time(stamp_ns)
        self._message.position = array("d", values)
        return self._message


class _Float64MultiArray:
    """``std_msgs/Float64MultiArray``: bare values, as the forward controllers of ros2_control take them."""

    message_type = Float64MultiArray

    def __init__(self, spec: CommandSpec | GripperSpec) -> None:
        self._message = Float64MultiArray()

    def filled(self, values: np.ndarray, stamp_ns: int, rest: np.ndarray | None) -> Float64MultiArray:
        self._message.data = array("d", values)
        return self._message


class _TwistStamped:
    """``geometry_msgs/TwistStamped``: velocities [m/s, rad/s] in a frame."""

    message_type = TwistStamped

    def __init__(self, spec: CommandSpec) -> None:
        self._message = TwistStamped()
        self._message.header.frame_id = spec.frame_id

    def filled(self, values: np.ndarray, stamp_ns: int, rest: np.ndarray | None) -> TwistStamped:
        linear, angular = self._message.twist.linear, self._message.twist.angular
        self._message.header.stamp = to_time(stamp_ns)
        linear.x, linear.y, linear.z, angular.x, angular.y, angular.z = values.tolist()
        return self._message


class _JointTrajectory:
    """``trajectory_msgs/JointTrajectory``: positions at times."""

    message_type = JointTrajectory

    def __init__(self, spec: CommandSpec | GripperSpec) -> None:
        joints = spec.joints if isinstance(spec, CommandSpec) else [spec.joint]
        self._message = JointTrajectory(joint_names=list(joints))
        self._timing = spec.timing
        self._points: list[JointTrajectoryPoint] = []

    def filled(self, values: np.ndarray, stamp_ns: int, rest: np.ndarray | None) -> JointTrajectory:
        timing = self._timing
        if timing.stamp == "tick":
            self._message.header.stamp = to_time(stamp_ns)
        rows = [values] if rest is None else [values, *rest]
        while len(self._points) < len(rows):
            time_ns = timing.time_from_start_ns + len(self._points) * timing.period_ns
            self._points.append(JointTrajectoryPoint(time_from_start=to_duration(time_ns)))
        points = self._points[: len(rows)]
        for point, row in zip(points, rows, strict=True):
            point.positions = array("d", row)
        self._message.points = points
        return self._message


MESSAGES: dict[str, type] = {
    "joint_state": _JointState,
    "joint_trajectory": _JointTrajectory,
    "float64_multi_array": _Float64MultiArray,
    "twist_stamped": _TwistStamped,
}


# --- grippers --------------------------------------------------------------------------------------------------------


class _Gripper:
    """Sends a gripper's channel when it changed by more than the tolerance; see GRIPPER_REPEAT_NS."""

    def __init__(self, node: Node, spec: GripperSpec, callback_group: CallbackGroup | None) -> None:
        self._spec = spec
        on_topic = spec.kind in MESSAGES
        self._driver = _GripperTopic(node, spec) if on_topic else _GripperAction(node, spec, callback_group)
        self._sent: float | None = None
        self._sent_ns = 0
        self._asked_ns = 0

    def send(self, command: np.ndarray, stamp_ns: int) -> None:
        value = self._spec.mapping.to_driver(float(command[self._spec.mapping.channel]))
        last_ns = self._sent_ns if self._driver.repeats else self._asked_ns
        self._asked_ns = stamp_ns
        if (
            self._sent is None
            or abs(value - self._sent) > self._spec.tolerance
            or not 0 <= stamp_ns - last_ns < GRIPPER_REPEAT_NS
        ):
            self._sent, self._sent_ns = value, stamp_ns
            self._driver.send(value, stamp_ns)

    @property
    def publishers(self) -> list[Publisher]:
        """Of its topic; none if it has an action."""
        return self._driver.publishers

    def close(self) -> None:
        self._driver.close()


class _GripperTopic:
    repeats = True

    def __init__(self, node: Node, spec: GripperSpec) -> None:
        self._node = node
        self._message = MESSAGES[spec.kind](spec)
        self._publisher = node.create_publisher(self._message.message_type, spec.topic, reliable_qos(1))
        self.publishers = [self._publisher]

    def send(self, value: float, stamp_ns: int) -> None:
        self._publisher.publish(self._message.filled(np.array([value]), stamp_ns, None))

    def close(self) -> None:
        self._node.destroy_publisher(self._publisher)


class _GripperAction:
    """Goals of control_msgs; the executor's thread sends them, the tick only says which one is wanted.

    A goal that cannot be sent now is forgotten: kept for later it would move a gripper that was stopped meanwhile. The
    commands, as long as they come, ask for it again.
    """

    def __init__(self, node: Node, spec: GripperSpec, callback_group: CallbackGroup | None) -> None:
        name = "GripperCommand" if spec.kind == "gripper_command" else "ParallelGripperCommand"
        try:
            self._type = getattr(importlib.import_module("control_msgs.action"), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"gripper.kind is {spec.kind!r}, which needs control_msgs with the action {name}: {error}"
            ) from error
        self._node = node
        self._spec = spec
        self._log = EdgeLog(node)
        self.publishers = []  # that there is no server is told when a goal cannot be sent
        self.repeats = True  # until the goal that was wanted last is accepted; only the executor's thread writes it
        self._answer: Future | None = None  # to that goal
        self._client = ActionClient(node, self._type, spec.topic, callback_group=callback_group)
        self._wanted: deque[float] = deque(maxlen=1)
        self._ready = node.create_guard_condition(self._send_goal, callback_group)

    def send(self, value: float, stamp_ns: int) -> None:
        self._wanted.append(value)
        self._ready.trigger()

    def close(self) -> None:
        self._wanted.clear()  # the executor may still hold a trigger, and the client is gone then
        self._node.destroy_guard_condition(self._ready)
        self._client.destroy()

    def _send_goal(self) -> None:
        if not self._wanted:
            return
        wanted = self._wanted.popleft()
        self.repeats, self._answer = True, None
        if not self._client.server_is_ready():
            self._log.problem("gripper", f"gripper: nobody serves the action {self._spec.topic!r}")
            return
        goal = self._type.Goal()
        if self._spec.kind == "gripper_command":
            goal.command.position = wanted
            goal.command.max_effort = self._spec.max_effort
        else:
            goal.command.name = [self._spec.joint]
            goal.command.position = [wanted]
            goal.command.effort = [self._spec.max_effort] if self._spec.max_effort else []
        self._answer = self._client.send_goal_async(goal)
        self._answer.add_done_callback(self._on_answer)

    def _on_answer(self, answer: Future) -> None:
        accepted = answer.result().accepted
        if accepted:
            self._log.fine("gripper")
            answer.result().get_result_async().add_done_callback(self._on_result)
        else:
            self._log.problem("gripper", f"gripper: {self._spec.topic!r} did not accept its goal")
        if answer is self._answer:
            self.repeats = not accepted

    def _on_result(self, result: Future) -> None:
        # Nothing is repeated: what closes on an object would do so again and again.
        if result.result().status == GoalStatus.STATUS_ABORTED:
            hint = "usual where it closes on an object, else see its driver: was it homed?"
            self._log.problem("gripper goal", f"gripper: {self._spec.topic!r} gave up its goal ({hint})")
        else:
            self._log.fine("gripper goal")
