"""A robot that says whether it executes commands: a stop of its own is never ended by itself."""

import pytest
import yaml

from a2c2_ros.core.errors import StateError
from a2c2_ros.core.safety import Latch, Reason, State
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.paths import robot_profile

TOPIC = "robot/executes"


def outcome(latch):
    verdict = latch.verdict
    return None if verdict is None else (verdict.state, verdict.reason)


STOPPED = (State.STOPPED, Reason.ROBOT_STOPPED)
DISABLED = (State.STOPPED, Reason.DISABLED)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_robot_that_was_not_heard_yet_is_not_enabled(enabled):
    latch = Latch(enabled, ready=False)
    assert outcome(latch) == STOPPED and "not said yet" in latch.verdict.detail
    with pytest.raises(StateError, match="has not said yet that it executes commands"):
        latch.enable()
    latch.robot_ready(True)
    assert outcome(latch) == DISABLED, "that it is ready does not enable"
    latch.enable()
    assert outcome(latch) is None


def test_a_stop_by_the_robot_itself_ends_with_a_person():
    latch = Latch(True)
    latch.robot_ready(False)
    assert outcome(latch) == STOPPED
    with pytest.raises(StateError, match="executes no commands"):
        latch.enable()
    latch.robot_ready(True)
    latch.robot_ready(True)
    assert outcome(latch) == DISABLED and "not enabled since" in latch.verdict.detail
    latch.enable()
    assert outcome(latch) is None


def test_the_reason_that_asks_for_more_is_shown():
    latch = Latch(True)
    latch.disable()
    latch.robot_ready(False)
    assert outcome(latch) == STOPPED
    latch.emergency_stop(True, 0)
    latch.robot_ready(True)
    assert outcome(latch) == (State.STOPPED, Reason.EMERGENCY_STOP)
    latch.emergency_stop(False, 0)
    latch.enable()
    latch.not_following("joint1")
    latch.robot_ready(False)
    assert outcome(latch) == (State.STOPPED, Reason.NOT_FOLLOWING)
    with pytest.raises(StateError, match="executes no commands"):
        latch.enable()


@pytest.fixture
def profile(tmp_path):
    """Path of a Panda that says whether it executes commands."""
    path = tmp_path / "robot.yaml"
    path.write_text(robot_profile("panda").read_text() + f"\nready: {{topic: {TOPIC}}}\n")
    return path


def test_a_profile_names_the_topic(profile):
    loaded = load_profile(str(profile))
    assert loaded.ready_topic == TOPIC and loaded.robot.reports_ready
    panda = load_profile("panda")
    assert panda.ready_topic is None and not panda.robot.reports_ready


def test_the_ur_s_program_has_to_run():
    assert load_profile("ur5e").ready_topic == "io_and_status_controller/robot_program_running"


# --- the node --------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(profile):
    pytest.importorskip("rclpy")
    from test_controller_node import controller

    with controller(robot=str(profile)) as node:
        yield node


@pytest.mark.parametrize("latched", [True, False])
def test_the_driver_is_heard_whether_it_keeps_what_it_said_or_not(node, latched):
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from std_msgs.msg import Bool
    from test_controller_node import enable, peer_of

    from a2c2_ros.nodes.runtime import latched_qos

    with peer_of(node) as (peer, until):
        qos = latched_qos(1) if latched else QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        publisher = peer.create_publisher(Bool, TOPIC, qos)
        assert enable(node) == (False, "the robot has not said yet that it executes commands, allowed is to enable "
                                       "when it does")  # fmt: skip
        if latched:
            publisher.publish(Bool(data=True))
        else:
            until(lambda: publisher.get_subscription_count())
            until(lambda: publisher.publish(Bool(data=True)) or node._permission._said_ready)
        until(lambda: outcome(node._permission.latch) == DISABLED)
        assert enable(node)[0]
        until(lambda: publisher.publish(Bool(data=False)) or outcome(node._permission.latch) == STOPPED)
        accepted, text = enable(node)
        assert not accepted and "executes no commands" in text
        until(lambda: publisher.publish(Bool(data=True)) or outcome(node._permission.latch) == DISABLED)
        assert enable(node)[0]


def test_what_the_robot_said_survives_a_configuration_and_another_profile_s_topic_counts_from_then_on(node, profile):
    from rclpy.qos import ReliabilityPolicy
    from std_msgs.msg import Bool
    from test_controller_node import configured_anew, enable

    node._permission.on_ready(Bool(data=True), ReliabilityPolicy.RELIABLE)
    assert enable(node)[0] and configured_anew(node) is None
    entries = yaml.safe_load(profile.read_text())
    profile.write_text(yaml.dump(entries | {"ready": {"topic": "another"}}, sort_keys=False))
    assert configured_anew(node) == STOPPED
    assert [subscription.topic_name for subscription in node._permission._ready_subscriptions] == ["/another"] * 2
    profile.write_text(yaml.dump({k: v for k, v in entries.items() if k != "ready"}, sort_keys=False))
    assert configured_anew(node) == DISABLED and enable(node)[0]


def test_a_reliable_copy_counts_and_a_best_effort_one_alone_can_only_stop(node):
    from rclpy.qos import ReliabilityPolicy
    from std_msgs.msg import Bool
    from test_controller_node import enable

    def says(ready, heard_by):
        node._permission.on_ready(Bool(data=ready), heard_by)

    reliable, best_effort = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
    says(True, reliable)
    says(True, best_effort)
    assert enable(node)[0]
    says(False, reliable)
    says(True, best_effort)  # the late copy of an older message
    assert outcome(node._permission.latch) == STOPPED
    says(False, best_effort)
    says(True, reliable)  # the other copy of this one is lost
    assert outcome(node._permission.latch) == DISABLED and enable(node)[0]
    says(False, best_effort)  # of another publisher
    assert outcome(node._permission.latch) == STOPPED and not enable(node)[0]
    says(True, best_effort)
    assert outcome(node._permission.latch) == DISABLED


def test_the_rehearsal_of_a_tick_does_not_wait_for_the_robot(node):
    assert not node._rehearsal.latched
