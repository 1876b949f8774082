"""Who lets the robot move: a person by ``~/enable`` and the emergency stop, the robot by what it says of itself."""

from collections.abc import Callable
from functools import partial

from rclpy.callback_groups import CallbackGroup
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.service import Service
from rclpy.subscription import Subscription
from std_msgs.msg import Bool
from std_srvs.srv import SetBool

from a2c2_ros.core.errors import StateError
from a2c2_ros.core.safety import NEVER_HEARD, Latch
from a2c2_ros.nodes.handover import Handover
from a2c2_ros.nodes.runtime import latched_qos

NOT_ENABLED = "the control loop does not answer (does the clock stand still?): nothing was changed"
NOT_YET_STOPPED = (
    "NOT STOPPED YET: the control loop does not answer (does the clock stand still?) and stops as soon as it does; use "
    "the robot's own emergency stop"
)
STOP_DEPTH = 1000
"""Messages of the emergency stop that may wait for the executor, which waits for a loop that does not answer or for a
head that loads: a press must not be pushed out by what comes after it."""


class Permission:
    """Tells the latch of a control loop what people and the robot say, from the first configuration on, in every state.

    Args:
        node: Gets the service and the subscriptions.
        group: Their callback group.
        handover: The latch is the loop's.
        configured: Whether there is something to enable.
        on_enabled: Called when a person has enabled.
    """

    def __init__(
        self,
        node: Node,
        group: CallbackGroup,
        handover: Handover,
        configured: Callable[[], bool],
        on_enabled: Callable[[], None],
    ) -> None:
        self.latch: Latch | None = None
        """Outlives the loop: what was switched off stays off when it is made anew. None before the first loop."""
        self._node = node
        self._group = group
        self._handover = handover
        self._configured = configured
        self._on_enabled = on_enabled
        self._service: Service | None = None
        self._pressed: dict[ReliabilityPolicy, bool] = {}  # the emergency stop, as each subscription last heard it
        self._ready_topic: str | None = None
        self._said_ready: dict[ReliabilityPolicy, bool] = {}  # whether the robot executes commands, as each heard it
        self._ready_subscriptions: list[Subscription] = []

    def serve(self, latch: Latch, ready_topic: str | None) -> None:
        """Serve a configuration.

        Args:
            latch: Of its loop; the same in every configuration.
            ready_topic: Where the robot says whether it executes commands; None if it does not.
        """
        self.latch = latch
        if self._service is None:
            # The best-effort subscription alone would hear every publisher, too, but it may lose what a reliable one
            # says. The service comes last: who can enable can stop.
            for reliability in (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT):
                qos = QoSProfile(depth=STOP_DEPTH, reliability=reliability)
                self._hear("emergency_stop", self.on_emergency_stop, qos, self._on_other_stop_qos)
            self._service = self._node.create_service(SetBool, "~/enable", self.on_enable, callback_group=self._group)
        if ready_topic != self._ready_topic:
            self._listen_to_robot(ready_topic)

    def _listen_to_robot(self, topic: str | None) -> None:
        for subscription in self._ready_subscriptions:
            self._node.destroy_subscription(subscription)
        self._ready_topic, self._said_ready, self._ready_subscriptions = topic, {}, []
        self._handover.post(partial(self.latch.robot_ready, topic is None, NEVER_HEARD))
        if topic is None:
            return
        # Drivers say it once and keep it for late joiners, or again and again and not reliably.
        for qos in (latched_qos(1), QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)):
            heard = self._hear(topic, self.on_ready, qos, on_incompatible=lambda event: None)  # the other one hears it
            self._ready_subscriptions.append(heard)

    def _hear(
        self, topic: str, take: Callable[..., None], qos: QoSProfile, on_incompatible: Callable[[object], None]
    ) -> Subscription:
        """One of two subscriptions to a topic whose publishers differ in QoS; ``take`` is told which one heard."""
        return self._node.create_subscription(
            Bool,
            topic,
            partial(take, heard_by=qos.reliability),
            qos,
            callback_group=self._group,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=on_incompatible),
        )

    def on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        """The service ``~/enable``."""
        if request.data and not self._configured():
            response.message = "not configured, allowed is to configure first"
            return response
        try:
            self._handover.ask(self.latch.enable if request.data else self.latch.disable, keep=not request.data)
        except StateError as error:
            response.message = str(error)
            return response
        except TimeoutError:
            response.message = NOT_ENABLED if request.data else NOT_YET_STOPPED
            self._node.get_logger().error(f"~/enable: {response.message}")
            return response
        if request.data:
            self._on_enabled()
        response.success = True
        response.message = "enabled" if request.data else "disabled"
        self._node.get_logger().info(f"{response.message} by ~/enable")
        return response

    def on_emergency_stop(self, message: Bool, heard_by: ReliabilityPolicy) -> None:
        """A message on ``emergency_stop``; ``heard_by`` names the subscription."""
        # A message of a reliable publisher comes twice, and its two copies in any order with those of the messages
        # around it: a release counts when both subscriptions have heard it, else a late copy could undo a newer press.
        self._pressed[heard_by] = message.data
        pressed = any(self._pressed.values())
        self._handover.post(lambda: self.latch.emergency_stop(pressed, self._node.get_clock().now().nanoseconds))

    def _on_other_stop_qos(self, event: object) -> None:
        # In place of rclpy's text, which says that no message will be received.
        self._node.get_logger().warning(
            "emergency_stop has a best-effort publisher: it is heard, but messages may be lost; reliable is safer"
        )

    def on_ready(self, message: Bool, heard_by: ReliabilityPolicy) -> None:
        """A message of the robot on its own topic; ``heard_by`` names the subscription."""
        # Reliable copies come all and in order, so the newest of them says how it is. A best-effort one alone can only
        # stop: it may be a late one, or another publisher's.
        if heard_by == ReliabilityPolicy.RELIABLE:
            self._said_ready = {}
        self._said_ready[heard_by] = message.data
        self._handover.post(partial(self.latch.robot_ready, all(self._said_ready.values())))
