"""A controller or planner process, and a node of the test that plays the robot's drivers."""

import contextlib
import random
import time

import numpy as np
import rclpy
from a2c2_ros.msg import ActionChunk, ControlStep
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import ParameterType
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from ros_system import Peer, System
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from a2c2_ros.nodes.conversions import array_to_image, array_to_joint_state, array_to_pose, to_duration, to_time
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos, sensor_qos
from a2c2_ros.sim import conventions

HEAD = "compact_libero_spatial/head.onnx"


@contextlib.contextmanager
def ros(namespace="/", **parameters):
    """ROS in this process, with a node's parameters."""
    arguments = [text for name, value in parameters.items() for text in ("-p", f"{name.replace('__', '.')}:={value}")]
    arguments += ["-r", f"__ns:={namespace}"]
    rclpy.init(args=["--ros-args", *arguments], domain_id=random.SystemRandom().randrange(1, 100))
    try:
        yield
    finally:
        rclpy.shutdown()


class Bench:
    """A system, and a node of the test on its domain that plays the robot's drivers."""

    def __init__(self, folder):
        self.system = System(folder)
        self._peer = Peer(self.system)
        self.node = self._peer.node
        qos = sensor_qos(lockstep=False)
        self.cameras = {n: self.node.create_publisher(Image, f"{n}/image", qos) for n in conventions.CAMERAS}
        self.joints = self.node.create_publisher(JointState, "joint_states", qos)
        self.pose = self.node.create_publisher(PoseStamped, "ee_pose", qos)
        self.chunks = self.node.create_publisher(ActionChunk, "action_chunk", latched_qos(2))
        self.instruction = self.node.create_publisher(String, "instruction", latched_qos(1))
        self._chunk_id = 0
        self._clients = {}
        self.steps = []
        self.node.create_subscription(ControlStep, "control_step", self.steps.append, reliable_qos(1000))
        self.image = np.zeros((128, 128, 3), np.uint8)
        self.node.create_timer(0.04, self.publish_sensors)

    def publish_sensors(self):
        now = self.now_ns()
        for name, publisher in self.cameras.items():
            publisher.publish(array_to_image(self.image, now, name))
        self.joints.publish(array_to_joint_state(np.zeros(9), conventions.JOINT_NAMES, now))
        self.pose.publish(array_to_pose(np.array([0, 0, 1.0, 1, 0, 0, 0]), now, "world"))

    def now_ns(self):
        return self.node.get_clock().now().nanoseconds

    def chunk(self, manifest, **changes):
        self._chunk_id += 1
        message = ActionChunk(
            chunk_id=self._chunk_id,
            step=to_duration(50_000_000),
            horizon=50,
            policy_id=manifest.policy_id,
            action_names=list(conventions.ACTION_NAMES),
        )
        message.header.stamp = to_time(self.now_ns())
        message.actions = [0.1] * 350
        message.latent = [0.0] * manifest.latent_size
        message.language = [0.0] * manifest.language_size
        for name, value in changes.items():
            setattr(message, name, value)
        self.chunks.publish(message)

    def spin_until(self, condition, what, timeout_s=60.0):
        self._peer.spin_until(condition, what, timeout_s)

    def spin_for(self, duration_s, what):
        end = self.now_ns() + round(duration_s * 1e9)
        self.spin_until(lambda: self.now_ns() > end, what)

    def ask(self, call, what):
        """The answer of a service whose request may come twice.

        An answer is lost if the server has not yet found the client's reader; then it is asked again.
        """
        futures, again_s = [], 0.0

        def answered():
            nonlocal again_s
            if time.monotonic() > again_s:
                futures.append(call())
                again_s = time.monotonic() + 20.0
            return any(future.done() for future in futures)

        self.spin_until(answered, what)
        return next(future.result() for future in futures if future.done())

    def parameters(self, node):
        """A client whose services are there."""
        if node not in self._clients:
            self._clients[node] = AsyncParameterClient(self.node, node)
            self.spin_until(self._clients[node].services_are_ready, f"parameter services of {node}")
        return self._clients[node]

    def request_parameter(self, node, name, value):
        return self.parameters(node).set_parameters([Parameter(name, value=value)])

    def set_parameter(self, node, name, value):
        """(accepted, reason)"""
        answer = self.ask(lambda: self.request_parameter(node, name, value), f"{name} of {node}")
        return answer.results[0].successful, answer.results[0].reason

    def get_parameter(self, node, name):
        value = self.ask(lambda: self.parameters(node).get_parameters([name]), f"{name} of {node}").values[0]
        return {
            ParameterType.PARAMETER_INTEGER: value.integer_value,
            ParameterType.PARAMETER_BOOL: value.bool_value,
            ParameterType.PARAMETER_STRING: value.string_value,
        }[value.type]

    def wait_for_log(self, node, text):
        self.spin_until(lambda: text in self.system.log(node), f"{text!r} in the log of {node}")

    def wait_for_state(self, state, reason=None):
        """The next step in this state, for this reason if one is given."""
        since = len(self.steps)

        def found():
            return next((s for s in self.steps[since:] if s.state == state and reason in (None, s.reason)), None)

        self.spin_until(lambda: found() is not None, f"state {state}")
        return found()

    def close(self):
        codes = self.system.close()
        self._peer.close()
        return codes
