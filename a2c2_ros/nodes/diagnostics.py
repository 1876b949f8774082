"""What a node says of itself on ``/diagnostics``."""

from collections.abc import Sequence

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node

from a2c2_ros.core.health import Status
from a2c2_ros.nodes.conversions import status_to_message, to_time


def diagnostics_of(node: Node, statuses: Sequence[Status], hardware: str = "") -> DiagnosticArray:
    """Lines of a node as a message; the topic is one for all robots, so they are named by namespace and node."""
    name = node.get_fully_qualified_name().lstrip("/")
    message = DiagnosticArray(status=[status_to_message(status, name, hardware) for status in statuses])
    message.header.stamp = to_time(node.get_clock().now().nanoseconds)
    return message
