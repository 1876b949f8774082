"""The LIBERO node: its topics, its services, its end."""

import signal

import numpy as np
import pytest
from ros_system import Peer, System

pytest.importorskip("rclpy")

from a2c2_ros.srv import SetTask
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from a2c2_ros.nodes.conversions import image_to_array, joint_state_to_array, to_ns
from a2c2_ros.nodes.runtime import latched_qos, sensor_qos
from a2c2_ros.sim import conventions


@pytest.mark.timeout(250)
def test_topics_services_and_a_clean_end(tmp_path):
    system = System(tmp_path)
    peer = Peer(system)
    received = {}
    for name, kind, qos in (
        ("agentview/image", Image, sensor_qos(False)),
        ("wrist/image", Image, sensor_qos(False)),
        ("joint_states", JointState, sensor_qos(False)),
        ("ee_pose", PoseStamped, sensor_qos(False)),
        ("instruction", String, latched_qos(1)),
    ):
        received[name] = []
        peer.node.create_subscription(kind, name, received[name].append, qos)

    def call(kind, name, request):
        client = peer.node.create_client(kind, name)
        peer.spin_until(client.service_is_ready, f"service {name}")
        future = client.call_async(request)
        peer.spin_until(future.done, f"answer of {name}")
        return future.result()

    try:
        system.start("libero_sim", task=0, lockstep=False, episodes=0)
        peer.spin_until(lambda: all(received.values()), "a message on every topic")
        image = image_to_array(received["agentview/image"][-1], 128, 128)
        assert image.std() > 20
        assert image_to_array(received["wrist/image"][-1], 128, 128).std() > 20
        joints = joint_state_to_array(received["joint_states"][-1], conventions.JOINT_NAMES)
        assert np.abs(joints[:7]).max() < np.pi and 0.03 < joints[7] < 0.05
        assert received["ee_pose"][-1].header.frame_id == "world"
        assert to_ns(received["ee_pose"][-1].header.stamp) > 10**18, "the system clock"
        assert "between the plate and the ramekin" in received["instruction"][-1].data

        refused = call(SetTask, "libero_sim/set_task", SetTask.Request(task=10))
        assert (refused.success, refused.message) == (False, "task is 10, allowed are 0 to 9")
        assert not call(SetTask, "libero_sim/set_task", SetTask.Request(task=3, initial_state=50)).success
        assert call(SetTask, "libero_sim/set_task", SetTask.Request(task=3, initial_state=7)).success
        peer.spin_until(lambda: "on the cookie box" in received["instruction"][-1].data, "the other task's instruction")
        images = len(received["agentview/image"])
        peer.spin_until(lambda: len(received["agentview/image"]) > images + 3, "images of the other task")
        assert np.abs(image_to_array(received["agentview/image"][-1], 128, 128).astype(int) - image).max() > 50
        assert call(Trigger, "libero_sim/reset", Trigger.Request()).success
        assert system.stop("libero_sim", signal.SIGINT) == 0
        assert "Traceback" not in system.log("libero_sim")
    finally:
        system.close()
        peer.close()
