"""Real robots, played by mock_robot: its topics, and one policy and one head on two arms."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.launching import REAL_ROBOT_ARGUMENTS, parse_arguments, real_robot
from a2c2_ros.paths import model_path, robot_profile, share_directory
from a2c2_ros.sim.reach import TARGETS

ROBOTS = ("panda_servo", "so101_servo")
STOPPED = 4


def system(**given):
    return real_robot(parse_arguments(REAL_ROBOT_ARGUMENTS, given))


def test_a_robot_starts_disabled_with_its_driver_left_to_the_user():
    run = system(robot="panda_forward", head="mine.onnx")
    nodes = {process.name: process.parameters for process in run.processes}
    assert set(nodes) == {"chunk_planner", "correction_controller", "episode_monitor"}
    assert nodes["correction_controller"]["start_state"] == "disabled"
    assert nodes["correction_controller"]["correction.model_path"] == "mine.onnx"
    assert all(nodes[name]["robot"] == "panda_forward" and nodes[name]["use_sim_time"] is False for name in nodes)
    assert nodes["chunk_planner"]["control_rate_hz"] == nodes["correction_controller"]["control_rate_hz"] == 100.0
    assert nodes["chunk_planner"]["inference_delay"] == 0
    ControllerConfig().replaced(nodes["correction_controller"], running=False)


def test_a_robot_without_a_head_and_a_planner_elsewhere():
    nodes = {p.name: p.parameters for p in system(head="none", correction="false", planner="false").processes}
    assert set(nodes) == {"correction_controller", "episode_monitor"}
    assert nodes["correction_controller"]["correction.model_path"] == ""
    with pytest.raises(ConfigError, match="head is 'none' and correction is true"):
        system(head="none")


def test_the_rate_is_the_profile_s_and_another_is_refused():
    assert system(robot="bench_arm", control_rate_hz="50").processes[0].parameters["control_rate_hz"] == 50.0
    assert system(robot="bench_arm").processes[0].parameters["control_rate_hz"] == 20.0
    with pytest.raises(ConfigError, match="control_rate_hz is 20, allowed is 100"):
        system(robot="panda_forward", control_rate_hz="20")


def test_the_mock_takes_the_drivers_place_on_request():
    run = system(mock="true", enabled="true", episodes="3", seed="4", record="true")
    nodes = {process.name: process.parameters for process in run.processes}
    assert nodes["mock_robot"] == {"robot": "panda_servo", "use_sim_time": False, "episodes": 3, "seed": 4}
    assert nodes["correction_controller"]["start_state"] == "enabled"
    assert nodes["episode_recorder"]["robot"] == "panda_servo"
    assert run.ends == "episode_monitor"


def test_episodes_need_somebody_who_counts_them():
    with pytest.raises(ConfigError, match="episodes is 2.*mock:=true"):
        system(episodes="2")


def test_the_parameter_file_lists_every_parameter_with_its_default():
    pytest.importorskip("a2c2_ros.msg")
    from a2c2_ros.nodes.mock_robot import MockConfig

    path = share_directory() / "config" / "mock_robot.yaml"
    assert yaml.safe_load(path.read_text())["/**"]["ros__parameters"] == vars(MockConfig())


def test_the_launch_file_describes_the_same(monkeypatch):
    pytest.importorskip("launch_ros")
    import importlib.util

    path = share_directory() / "launch" / "real_robot.launch.py"
    spec = importlib.util.spec_from_file_location("real_robot_launch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    described = module.generate_launch_description().get_launch_arguments()
    assert [argument.name for argument in described] == [
        *(argument.name for argument in REAL_ROBOT_ARGUMENTS),
        "shutdown_on_exit",
    ]


def edited(tmp_path, robot, *changes):
    """A shipped profile with other texts in it."""
    text = robot_profile(robot).read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "edited.yaml").write_text(text)
    return load_profile(str(tmp_path / "edited.yaml"))


def test_poses_have_to_be_in_the_frame_of_the_twists_or_in_the_one_that_the_profile_names(tmp_path):
    assert [load_profile(robot).ee_pose_frame for robot in ROBOTS] == ["panda_link0", "base_link"]
    for robot, default in (("panda_servo", "panda_link0"), ("libero", "")):
        named = (("  topic: ee_pose", "  frame_id: base\n  topic: ee_pose"),)
        assert edited(tmp_path, robot, *named).ee_pose_frame == "base"
        assert edited(tmp_path, robot).ee_pose_frame == default
    with pytest.raises(ConfigError, match=r"entry 'ee_pose.frame_id' is 7, allowed is a text"):
        edited(tmp_path, "panda_servo", ("  topic: ee_pose", "  frame_id: 7\n  topic: ee_pose"))


def test_a_gripper_command_needs_its_effort(tmp_path):
    """What its goal does not say is 0 N to a driver that grasps with the force of the goal."""

    def effort(kind, *more):
        change = "\n".join((f"  kind: {kind}", *more))
        return edited(tmp_path, "panda", ("  kind: float64_multi_array", change)).gripper.max_effort

    with pytest.raises(
        ConfigError, match=r"entry 'gripper.max_effort' is None, allowed is a number above 0 \[N or N m\]"
    ):
        effort("gripper_command")
    with pytest.raises(ConfigError, match=r"entry 'gripper.max_effort' is 0, allowed is a number above 0"):
        effort("gripper_command", "  max_effort: 0")
    assert effort("gripper_command", "  max_effort: 20.0") == 20.0
    parallel = ("parallel_gripper_command", "  joint: finger")
    assert (effort(*parallel), effort(*parallel, "  max_effort: 5.0")) == (0.0, 5.0)


# --- the task without ROS --------------------------------------------------------------------------------------------


def test_demonstrations_are_the_experts_and_say_when_the_arm_was_pushed():
    reach = pytest.importorskip("a2c2_ros.training.reach")
    profile = load_profile("so101_servo")
    episodes = [reach.demonstrate(profile, target, seed) for target, seed in ((0, 1), (3, 2), (3, 2))]
    for name, values in episodes[1].items():
        np.testing.assert_array_equal(values, episodes[2][name])
    pushed = [(e["action"] != e["action.executed"]).any() for e in episodes]
    assert {e["action"].shape for e in episodes} == {(reach.STEPS, 7)} and len(set(pushed)) == 2
    corners = np.array(list(TARGETS.values()))[[0, 3]]
    calm = [
        int(np.argmin(np.linalg.norm(e["observation.state"][:, :3] - c, axis=1))) for e, c in zip(episodes, corners)
    ]
    assert all(np.linalg.norm(e["observation.state"][i, :3] - c) < 0.01 for e, i, c in zip(episodes, calm, corners))


def test_the_head_saves_what_the_policy_alone_loses_when_somebody_pushes(monkeypatch):
    """As results/reach.json has it, for one episode per cell."""
    reach = pytest.importorskip("a2c2_ros.training.reach")
    monkeypatch.setattr(reach, "PAIRS", ((40, 10),))
    result = reach.evaluate(model_path("reach"), ("panda_servo",), 1, seed=5)
    successes = {(cell["method"], cell["push_speed_m_s"]): cell["successes"] for cell in result["cells"]}
    assert successes["a2c2", 0.0] == successes["a2c2", 0.25] == 1 and successes["naive", 0.25] == 0
    committed = json.loads((Path(__file__).parents[1] / "results" / "reach.json").read_text())
    assert committed["policy_id"] == result["policy_id"]


# --- the node's topics -----------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path):
    """Starts mock_robot and keeps what it says."""
    pytest.importorskip("rclpy")
    from ros_system import Peer, System

    system = System(tmp_path)
    peer = Peer(system)

    class Driver:
        node, spin_until = peer.node, staticmethod(peer.spin_until)
        states, log = [], staticmethod(lambda: system.log("mock_robot"))

        def start(self, robot, **parameters):
            from sensor_msgs.msg import JointState

            self.states.clear()
            self.node.create_subscription(JointState, "joint_states", self.states.append, 10)
            system.start("mock_robot", robot=robot, noise_rad=0.0, **parameters)
            self.spin_until(lambda: self.states, "joint states")

        def position(self):
            newest = self.states[-1]
            return dict(zip(newest.name, newest.position, strict=True))

        def publish_until(self, condition, what, publisher, message, age_s=0.0):
            """Again and again: on a machine that is busy a command may be too old when it arrives."""
            from a2c2_ros.nodes.conversions import to_time

            def published():
                message.header.stamp = to_time(self.node.get_clock().now().nanoseconds - round(age_s * 1e9))
                publisher.publish(message)
                return condition()

            self.spin_until(published, what)

    yield Driver()
    codes = system.close()
    peer.close()
    assert set(codes.values()) <= {0}


def test_trajectories_move_the_arm_and_stale_or_wrong_ones_do_not(driver):
    from std_msgs.msg import Float64MultiArray
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from a2c2_ros.nodes.conversions import to_duration
    from a2c2_ros.nodes.runtime import reliable_qos

    driver.start("panda")
    arm = driver.node.create_publisher(JointTrajectory, "panda_arm_controller/joint_trajectory", reliable_qos(1))
    hand = driver.node.create_publisher(Float64MultiArray, "panda_hand_controller/commands", reliable_qos(1))
    names = [f"panda_joint{i}" for i in range(1, 8)]
    home = np.array([driver.position()[name] for name in names])

    def trajectory(*rows, joints=names):
        points = [
            JointTrajectoryPoint(positions=row, time_from_start=to_duration(round((i + 1) * 5e8)))
            for i, row in enumerate(np.array(rows).tolist())
        ]
        return JointTrajectory(joint_names=joints, points=points)

    refused = {"over": (trajectory(home + 0.3), 1.0), "not finite": (trajectory(home * np.nan), 0.0)}
    refused["panda_joint9"] = (trajectory(home + 0.3, joints=[*names[:6], "panda_joint9"]), 0.0)
    for words, (message, age_s) in refused.items():
        driver.publish_until(lambda words=words: words in driver.log(), f"a refusal: {words}", arm, message, age_s)
        fine = driver.log().count("fine again")
        stay = trajectory(home)  # the next problem is logged again
        driver.publish_until(lambda fine=fine: driver.log().count("fine again") > fine, "an end of it", arm, stay)
    np.testing.assert_allclose([driver.position()[name] for name in names], home, atol=0.005)

    goal, way = home + 0.1, trajectory(home + 0.1)
    there = lambda: np.allclose([driver.position()[n] for n in names], goal, atol=0.005)  # noqa: E731
    driver.publish_until(there, "the goal", arm, way)
    hand.publish(Float64MultiArray(data=[0.01]))
    driver.spin_until(lambda: abs(driver.position()["panda_finger_joint1"] - 0.01) < 0.003, "a closing gripper")
    assert driver.states[-1].velocity and driver.position()["panda_finger_joint2"] > 0.0


def test_the_mock_s_gripper_speaks_for_itself_where_the_profile_says_so(driver, tmp_path):
    from sensor_msgs.msg import JointState

    entries = yaml.safe_load(robot_profile("panda").read_text())
    arm = [name for name in entries["joint_states"]["names"] if "finger" not in name]
    entries["joint_states"]["names"] = arm
    entries["more_joint_states"] = {"hand": {"topic": "hand/joint_states", "names": ["panda_finger_joint1"]}}
    entries["max_age_s"]["hand"] = 0.5
    (tmp_path / "apart.yaml").write_text(yaml.safe_dump(entries))
    fingers = []
    driver.node.create_subscription(JointState, "hand/joint_states", fingers.append, 10)
    driver.start(str(tmp_path / "apart.yaml"))
    driver.spin_until(lambda: fingers, "the gripper's joint states")
    assert list(fingers[-1].name) == ["panda_finger_joint1"] and len(fingers[-1].velocity) == 1
    assert set(driver.position()) == {*arm, "panda_finger_joint2"}


def test_an_arm_with_a_camera_shows_what_it_does(driver, tmp_path):
    from sensor_msgs.msg import Image

    from a2c2_ros.nodes.conversions import image_to_array
    from a2c2_ros.nodes.runtime import sensor_qos

    text = robot_profile("so101").read_text().replace("height: 480, width: 640", "height: 48, width: 64")
    (tmp_path / "small.yaml").write_text(text)
    images = []
    driver.node.create_subscription(Image, "front_camera/image_raw", images.append, sensor_qos(False))
    driver.start(str(tmp_path / "small.yaml"), camera_rate_hz=5.0)
    driver.spin_until(lambda: len(images) >= 2, "images")
    assert image_to_array(images[-1], 48, 64).std() > 8.0  # something is to be seen


def test_twists_move_it_until_they_are_old_and_only_in_the_base_frame(driver):
    from geometry_msgs.msg import PoseStamped, TwistStamped

    from a2c2_ros.nodes.runtime import reliable_qos

    poses = []
    driver.node.create_subscription(PoseStamped, "ee_pose", poses.append, 10)
    driver.start("so101_servo")
    twists = driver.node.create_publisher(TwistStamped, "servo_node/delta_twist_cmds", reliable_qos(1))
    driver.spin_until(lambda: poses, "poses")
    start = poses[-1].pose.position.z
    assert poses[-1].header.frame_id == "base_link"

    def twist(frame="base_link", **linear):
        message = TwistStamped()
        message.header.frame_id = frame
        for axis, value in linear.items():
            setattr(message.twist.linear, axis, value)
        return message

    driver.publish_until(lambda: "frame" in driver.log(), "a refusal", twists, twist(frame="gripper", z=0.2))
    driver.publish_until(lambda: "fine again" in driver.log(), "the end of it", twists, twist())
    driver.publish_until(lambda: "s old" in driver.log(), "a refusal", twists, twist(z=0.2), age_s=0.5)
    assert poses[-1].pose.position.z == pytest.approx(start, abs=0.002)
    driver.publish_until(lambda: poses[-1].pose.position.z > start + 0.004, "motion", twists, twist(z=0.1))
    heights = []

    def stands_still():
        heights.append(poses[-1].pose.position.z)
        return len(heights) > 50 and max(heights[-25:]) - min(heights[-25:]) < 1e-5

    driver.spin_until(stands_still, "the end of the motion")
    assert heights[-1] < start + 0.05


# --- one policy and one head on two arms -----------------------------------------------------------------------------


@pytest.mark.parametrize("robot", ROBOTS)
def test_one_policy_and_one_head_reach_on_both_arms(robot, tmp_path):
    """The Panda is enabled by a person, after nothing has moved; the SO-101 from the start."""
    pytest.importorskip("rclpy")
    from a2c2_ros.msg import ActionChunk, ControlStep
    from ros_system import Peer, System
    from sensor_msgs.msg import JointState
    from std_srvs.srv import SetBool

    from a2c2_ros.nodes.runtime import latched_qos, reliable_qos

    person = robot == "panda_servo"
    nodes = System(tmp_path)
    peer = Peer(nodes)
    states, steps, chunks = [], [], []
    peer.node.create_subscription(JointState, "joint_states", states.append, 10)
    peer.node.create_subscription(ControlStep, "control_step", steps.append, reliable_qos(1000))
    peer.node.create_subscription(ActionChunk, "action_chunk", chunks.append, latched_qos(2))
    command = [sys.executable, "-m", "a2c2_ros.bringup", "real_robot", f"robot:={robot}", "mock:=true", "episodes:=2"]
    command += [f"enabled:={str(not person).lower()}", f"out:={tmp_path / 'run'}"]
    log = (tmp_path / "bringup.log").open("w+")
    environment = os.environ | {"ROS_DOMAIN_ID": str(nodes.domain_id), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:

        def until(condition, what):
            peer.spin_until(lambda: condition() or process.poll() is not None, what)
            log.seek(0)
            assert condition(), log.read()

        if person:
            until(
                lambda: chunks and len(states) > 20 and sum(s.state == STOPPED for s in steps) > 20,
                "a controller with chunks and joint states, disabled",
            )
            assert {step.state for step in steps} == {STOPPED} and not any(len(step.command) for step in steps)
            np.testing.assert_allclose(states[-1].position, states[0].position, atol=0.005)
            client = peer.node.create_client(SetBool, "correction_controller/enable")
            until(client.service_is_ready, "the service enable")
            answer = client.call_async(SetBool.Request(data=True))
            until(answer.done, "the answer of enable")
            assert answer.result().success
        until(lambda: states, "joint states")
        peer.spin_until(lambda: process.poll() is not None, "the end of the run")
        log.seek(0)
        assert process.returncode == 0, log.read()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=40)
        peer.close()
        log.close()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["episodes"] == 2 and summary["successes"] >= 1, summary
    assert summary["states"]["running"] > 20 and summary["head_ms_p50"] > 0.0, summary
    assert np.abs(np.array(states[-1].position) - states[0].position).max() > 0.02
