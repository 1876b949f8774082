"""Robot profiles: every one that is shipped, and every way to get one wrong."""

import copy
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.state import state_vector
from a2c2_ros.drivers.mapping import ChannelMap, GripperMap
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.drivers.urdf import joint_limits
from a2c2_ros.paths import share_directory

ROBOTS = share_directory() / "config" / "robots"
SHIPPED = sorted(path.stem for path in ROBOTS.glob("*.yaml"))
GONE = object()


@functools.cache
def shipped(name: str) -> dict:
    return yaml.safe_load((ROBOTS / f"{name}.yaml").read_text())


def changed(name: str, changes: dict) -> dict:
    """A shipped profile's entries with others at dotted paths; GONE takes one away."""
    data = copy.deepcopy(shipped(name))
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is GONE:
            del section[key]
        else:
            section[key] = value
    return data


@pytest.fixture
def load(tmp_path):
    (tmp_path / "mock.urdf").write_text((ROBOTS / "mock.urdf").read_text())

    def load(name: str, changes: dict):
        path = tmp_path / "robot.yaml"
        path.write_text(yaml.dump(changed(name, changes), sort_keys=False))
        return load_profile(str(path))

    return load


# --- shipped profiles ------------------------------------------------------------------------------------------------


def test_what_is_shipped():
    arms = {"fr3", "panda", "panda_forward", "panda_servo", "so101", "so101_servo", "ur5e"}
    assert arms | {"libero", "bench_arm", "mock"} == {*SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_complete_and_safe(name):
    profile = load_profile(name)
    robot, size = profile.robot, len(profile.robot.action_names)
    assert robot.name == name and profile.text == (ROBOTS / f"{name}.yaml").read_text()
    assert robot.simulated == (name in ("libero", "bench_arm", "mock")), "hardware starts disabled"
    values = {stream: np.zeros(spec.shape, spec.dtype) for stream, spec in robot.streams.items()}
    if "ee_pose" in values:
        values["ee_pose"][6] = 1.0
    assert robot.state_of(values).shape == (len(robot.state_names),)
    middle = (robot.limits.lower + robot.limits.upper) / 2
    measured = robot.measured_of(values)
    assert (measured is not None) == (robot.hold.kind == "position")
    assert robot.hold.target(middle, measured).shape == (size,)
    driver = profile.command.mapping.to_driver(middle)
    assert driver.shape == (len(profile.command.joints),) and np.isfinite(driver).all()
    if profile.gripper is not None:
        assert profile.gripper.mapping.channel not in profile.command.mapping.channels
    topics = [profile.command.topic, *(topic.topic for topic in (*profile.joint_topics, *profile.cameras))]
    assert not any(topic.startswith("/") for topic in topics), "relative, so that a namespace holds"


def test_the_profiles_of_before_mean_the_same():
    libero, arm = load_profile("libero"), load_profile("bench_arm")
    assert libero.command.joints == libero.robot.action_names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert (libero.command_topic, libero.command_kind, libero.gripper) == ("joint_command", "joint_state", None)
    action = np.linspace(-1, 1, 7, dtype=np.float32)
    np.testing.assert_array_equal(libero.command.mapping.to_driver(action), action.astype(np.float64))
    pose, joints = np.array([0.1, -0.2, 0.3, 0.9, 0.1, 0.2, 0.3]), np.arange(9.0)
    np.testing.assert_array_equal(
        libero.robot.state_of({"ee_pose": pose, "joint_position": joints}),
        state_vector(pose, joints[7:], np.array([1.0, 0.0, 0.0, 0.0])),
    )
    assert libero.robot.limits.step is None and libero.robot.limits.velocity is None
    assert arm.robot.limits.step is None and arm.robot.limits.velocity.tolist() == [2.0] * 7
    np.testing.assert_array_equal(arm.robot.measured_of({"joint_position": joints[:7]}), joints[:7])
    assert arm.camera_shapes() == {"front": (128, 128, 3), "wrist": (128, 128, 3)}
    assert [camera.transport for camera in arm.cameras] == ["raw", "raw"]


def test_one_policy_and_head_fit_both_servo_arms():
    panda, so101 = load_profile("panda_servo"), load_profile("so101_servo")
    for name in ("action_names", "action_space", "state_names"):
        assert getattr(panda.robot, name) == getattr(so101.robot, name)
    full = np.ones(7, np.float32)
    np.testing.assert_array_equal(panda.command.mapping.to_driver(full), so101.command.mapping.to_driver(full))
    assert panda.control_rate_hz == so101.control_rate_hz == 20.0


def test_another_control_rate_is_refused():
    profile = load_profile("panda_servo")
    profile.check_rate(20.0)
    load_profile("libero").check_rate(33.0)
    with pytest.raises(ConfigError, match=r"control_rate_hz is 10, allowed is 20: .* 'panda_servo'"):
        profile.check_rate(10.0)


def test_the_template_names_every_entry_of_the_others():
    template = (ROBOTS / "mock.yaml").read_text()

    def keys(data: dict):
        for key, value in data.items():
            yield key
            if isinstance(value, dict) and key not in ("cameras",):
                yield from keys(value)

    for name in SHIPPED:
        for key in keys(shipped(name)):
            assert f"{key}:" in template, f"{key} of {name}"


def test_the_panda_s_limits_lie_inside_its_urdf():
    spec = importlib.util.find_spec("robosuite")
    if spec is None:
        pytest.skip("robosuite has the URDF")
    urdf = Path(spec.origin).parent / "models/assets/bullet_data/panda_description/urdf/panda_arm_hand.urdf"
    published = joint_limits(urdf)
    for name in ("panda", "panda_forward"):
        limits = load_profile(name).robot.limits
        for i, joint in enumerate(load_profile(name).command.joints):
            assert published[joint].lower < limits.lower[i] < limits.upper[i] < published[joint].upper
            assert limits.velocity[i] < published[joint].velocity


# --- errors ----------------------------------------------------------------------------------------------------------

HAND = {"topic": "hand", "names": ["finger"]}
ERRORS = [  # profile, changes, path of the entry, words of the reason
    ("mock", {"name": GONE}, "name", "missing"),
    ("mock", {"name": 3}, "name", "3"),
    ("mock", {"nmae": "x"}, "nmae", "not known"),
    ("mock", {"simulated": "yes"}, "simulated", "true or false"),
    ("mock", {"cameras.front.height": GONE}, "cameras.front.height", "missing"),
    ("mock", {"cameras.front.height": -1}, "cameras.front.height", "-1"),
    ("mock", {"cameras.front.width": 320.0}, "cameras.front.width", "whole number"),
    ("mock", {"cameras.front.hight": 240}, "cameras.front.hight", "not known"),
    ("mock", {"cameras.front.resize": [128]}, "cameras.front.resize", "[128]"),
    ("mock", {"cameras.front.transport": "theora"}, "cameras.front.transport", "'raw', 'compressed'"),
    ("mock", {"cameras.front.topic": "front image"}, "cameras.front.topic", "topic"),
    ("mock", {"cameras.front.topic": "joint_states"}, "joint_states.topic", "cameras.front.topic"),
    ("mock", {"command.topic": "joint_states"}, "command.topic", "joint_states.topic"),
    ("mock", {"cameras.front": 7}, "cameras.front", "named entries"),
    ("mock", {"cameras.ee_pose": {}}, "cameras.ee_pose", "another name"),
    ("mock", {"cameras": GONE}, "max_age_s.camera", "not used"),
    ("mock", {"joint_states": GONE}, "joint_states.names", "missing"),
    ("mock", {"joint_states.names": "joint1"}, "joint_states.names", "a list"),
    ("mock", {"joint_states.names": ["joint1", 2]}, "joint_states.names[1]", "2"),
    ("mock", {"joint_states.names": ["joint1", "joint1"]}, "joint_states.names[1]", "not there yet"),
    ("mock", {"joint_states.gripper": ["finger"]}, "joint_states.gripper", "not used"),
    ("mock", {"more_joint_states.hand": {"topic": "hand"}}, "more_joint_states.hand.names", "missing"),
    ("mock", {"more_joint_states.hand": {"names": ["a"]}}, "more_joint_states.hand.topic", "missing"),
    ("mock", {"more_joint_states.ee_pose": HAND}, "more_joint_states.ee_pose", "another name"),
    ("mock", {"more_joint_states.front": HAND}, "more_joint_states.front", "another name"),
    ("mock", {"more_joint_states.hand": HAND}, "more_joint_states.hand.names[0]", "no other topic"),
    ("fr3", {"max_age_s.gripper": GONE}, "max_age_s.gripper", "missing"),
    ("fr3", {"more_joint_states": GONE}, "max_age_s.gripper", "not used"),
    ("fr3", {"command.topic": "franka_gripper/joint_states"}, "command.topic", "more_joint_states.gripper.topic"),
    ("mock", {"state": "pose"}, "state", "'joint_position'"),
    ("mock", {"ee_pose": {"topic": "ee_pose"}}, "ee_pose", "not used"),
    ("mock", {"action.names": ["joint1", "joint2", "joint3", "joint3"]}, "action.names[3]", "not there yet"),
    ("mock", {"action.space": ""}, "action.space", "a text"),
    ("mock", {"action.measured": GONE}, "action.measured", "missing"),
    ("mock", {"action.measured": ["joint1"]}, "action.measured", "for each of"),
    ("mock", {"action.measured": ["joint1", None, "joint3", None]}, "action.measured[1]", "hold.keep"),
    ("mock", {"action.measured": ["joint1", "joint2", "joint2", None]}, "action.measured[2]", "once"),
    ("mock", {"action.measured": ["joint1", "joint2", "elbow", None]}, "action.measured[2]", "'elbow'"),
    ("mock", {"action.measured": ["joint1", "joint2", "joint3", "finger"]}, "action.measured[3]", "gripper"),
    ("mock", {"rates": GONE}, "rates.control_rate_hz", "missing"),
    ("mock", {"rates.control_rate_hz": 0}, "rates.control_rate_hz", "above 0"),
    ("mock", {"rates.camera_hz": 30}, "rates.camera_hz", "not known"),
    ("mock", {"command.kind": "twist"}, "command.kind", "twist_stamped"),
    ("mock", {"command.joints": ["a", "b"], "command.channels": ["joint1", "joint2"]}, "command.channels", "joint3"),
    ("mock", {"command.channels": ["joint1", "joint2", "gripper"]}, "command.channels[2]", "'gripper'"),
    ("mock", {"command.channels": GONE}, "command.channels[0]", "'arm_joint3'"),
    ("mock", {"command.scale": [1.0, 0.0, 1.0]}, "command.scale", "other than 0"),
    ("mock", {"command.scale": [1.0, "x", 1.0]}, "command.scale[1]", "'x'"),
    ("mock", {"command.scale": 2.0}, "command.scale", "a list"),
    ("mock", {"command.offset": [0.0]}, "command.offset", "3 numbers"),
    ("mock", {"command.points": "two"}, "command.points", "'chunk'"),
    ("mock", {"command.time_from_start_s": -0.1}, "command.time_from_start_s", "above 0"),
    ("mock", {"command.stamp": "now"}, "command.stamp", "'zero'"),
    ("mock", {"command.frame_id": "base"}, "command.frame_id", "not used"),
    ("mock", {"command.kind": "float64_multi_array"}, "command.points", "not used"),
    ("mock", {"gripper.kind": "robotiq"}, "gripper.kind", "'none'"),
    ("mock", {"gripper.kind": "none"}, "command.channels", "'gripper'"),
    ("ur5e", {"gripper.topic": "gripper/commands"}, "gripper.topic", "not used"),
    ("mock", {"gripper.channel": "hand"}, "gripper.channel", "'gripper'"),
    ("mock", {"gripper.channel": "joint3"}, "gripper.channel", "hold.keep"),
    ("mock", {"gripper.open": GONE}, "gripper.open.action", "missing"),
    ("mock", {"gripper.open.driver": 0.0}, "gripper.closed.driver", "gripper.open.driver"),
    ("mock", {"gripper.tolerance": 0}, "gripper.tolerance", "above 0"),
    ("mock", {"gripper.joint": "finger"}, "gripper.joint", "not used"),
    ("mock", {"gripper.kind": "joint_trajectory"}, "gripper.joint", "missing"),
    ("mock", {"gripper.kind": "joint_trajectory", "gripper.joint": "f"}, "gripper.time_from_start_s", "missing"),
    ("mock", {"limits.urdf": "other.urdf"}, "limits.urdf", "other.urdf"),
    ("mock", {"limits.urdf": "package://no_such/arm.urdf"}, "limits.urdf", "no_such"),
    ("mock", {"limits.urdf": "robot.yaml"}, "limits.urdf", "cannot be read"),
    ("mock", {"limits.urdf": GONE}, "limits.lower.joint1", "missing"),
    ("mock", {"command.joints": ["a", "b", "c"]}, "limits.urdf", "'a'"),
    ("mock", {"limits.velocity.joint9": 1.0}, "limits.velocity.joint9", "not known"),
    ("mock", {"limits.velocity.joint1": "fast"}, "limits.velocity.joint1", "'fast'"),
    ("mock", {"limits.velocity.joint1": None}, "limits.velocity.joint1", "missing"),
    ("mock", {"limits.velocity.joint1": -1}, "limits.velocity", "0 or more"),
    ("mock", {"limits.lower": {"joint1": 3.0}}, "limits.lower", "'joint1'"),
    ("mock", {"limits.lower": [0.0, None, 0.0, 0.0]}, "limits.lower[1]", "None"),
    ("mock", {"limits.upper": [1.0]}, "limits.upper", "one number for each"),
    ("mock", {"limits.upper": 1.0}, "limits.upper", "named entries"),
    ("mock", {"limits.following": {"joint1": 0}}, "limits.following", "above 0, or null for none; 'joint1' has 0"),
    ("mock", {"limits.following": {"joint1": "x"}}, "limits.following.joint1", "or null"),
    ("mock", {"limits.following": {"joint9": 1.0}}, "limits.following.joint9", "not known"),
    ("mock", {"limits.following": {"gripper": 0.1}}, "limits.following", "null for 'gripper', which is not measured"),
    ("panda_servo", {"limits.following": {"x": 0.1}}, "limits.following", "not used"),
    ("mock", {"hold.kind": "stop"}, "hold.kind", "'delta'"),
    ("mock", {"hold.kind": "delta"}, "hold.kind", "'position' with command.kind 'joint_trajectory'"),
    ("mock", {"hold.keep": ["hand"]}, "hold.keep[0]", "'hand'"),
    ("mock", {"hold.keep_default": [0.0, 0.0]}, "hold.keep_default", "1 numbers"),
    ("mock", {"hold.keep_default": GONE}, "hold.keep_default", "missing"),
    ("mock", {"max_age_s.joint_states": GONE}, "max_age_s.joint_states", "missing"),
    ("mock", {"max_age_s.joint_states": float("inf")}, "max_age_s.joint_states", "inf"),
    ("mock", {"max_age_s.ee_pose": 0.1}, "max_age_s.ee_pose", "not used"),
    ("mock", {"hold.keep": ["gripper", "joint2"], "hold.keep_default": [-1, 0]}, "hold.keep", "'joint2' has 'joint2'"),
    ("panda_servo", {"hold.keep": ["gripper", "x"], "hold.keep_default": [-1, 0]}, "hold.keep", "['gripper'], the"),
    ("panda_servo", {"hold.kind": "position"}, "hold.kind", "'delta' with command.kind 'twist_stamped'"),
    ("panda_servo", {"command.frame_id": GONE}, "command.frame_id", "missing"),
    ("panda_servo", {"command.joints": ["a"]}, "command.joints", "not used"),
    ("panda_servo", {"command.channels": ["x", "y", "z"]}, "command.channels", "linear_x"),
    ("panda_servo", {"command.offset": [0.1] + [0.0] * 5}, "command.offset", "no motion"),
    ("panda_servo", {"limits.urdf": "mock.urdf"}, "limits.urdf", "positions"),
    ("panda_servo", {"limits.lower": [0.1] + [-1.0] * 6}, "limits.lower", "'x'"),
    ("panda_servo", {"joint_states.gripper": ["finger"]}, "joint_states.gripper[0]", "'finger'"),
    ("panda_servo", {"joint_states.gripper": []}, "joint_states.gripper", "one joint or two"),
    ("panda_servo", {"ee_pose.origin_xyz": [0, 0]}, "ee_pose.origin_xyz", "3 numbers"),
    ("panda_servo", {"ee_pose.nominal_orientation_xyzw": [0, 0, 0, 0]}, "ee_pose.nominal_orientation_xyzw", "quat"),
    ("panda_servo", {"ee_pose.topic": GONE}, "ee_pose.topic", "missing"),
    ("libero", {"limits.lower": ["a"] * 7}, "limits.lower[0]", "'a'"),
]


@pytest.mark.parametrize(
    ("name", "changes", "entry", "words"), ERRORS, ids=[f"{e[2]}-{i}" for i, e in enumerate(ERRORS)]
)
def test_a_wrong_entry_is_refused_with_its_path(load, tmp_path, name, changes, entry, words):
    with pytest.raises(ConfigError) as caught:
        load(name, changes)
    assert str(caught.value).startswith(f"{tmp_path / 'robot.yaml'}: entry {entry!r} is")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("name: again", "name"),
        ("max_age_s: {joint_states: 1.0, joint_states: 2.0}", "max_age_s"),
    ],
)
def test_an_entry_that_is_given_twice_is_refused(tmp_path, line, entry):
    path = tmp_path / "robot.yaml"
    path.write_text((ROBOTS / "libero.yaml").read_text() + line + "\n")
    with pytest.raises(ConfigError, match=f"robot.yaml: entry '{entry}' is given twice"):
        load_profile(str(path))
    path.write_text("cameras:\n  front: {height: 1, width: 2, height: 3}\n")
    with pytest.raises(ConfigError, match=r"entry 'cameras\.front\.height' is given twice"):
        load_profile(str(path))


@pytest.mark.parametrize("text", ["", "- a list", "name: [", "a: &a {b: *a}", "\0"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="robot.yaml"):
        load_profile(str(path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('<robot name="mock">', '<rob name="mock">', "cannot be read"),
        ('lower="-2.9"', 'lower="low"', "limit lower of joint 'arm_joint1' is 'low'"),
        ('velocity="1.0"', 'velocity="nan"', "nan"),
        ('type="revolute"', 'type="continuous"', "entry 'limits.lower.joint1' is missing"),
        (' upper="2.9"', "", "entry 'limits.lower.joint1' is missing"),
        ('name="arm_joint1" type="revolute"', 'name="arm_joint1" type="fixed"', "'arm_joint1'"),
    ],
)
def test_a_wrong_urdf_is_refused(load, tmp_path, old, new, words):
    urdf = tmp_path / "mock.urdf"
    urdf.write_text(urdf.read_text().replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load("mock", {})
    assert words in str(caught.value) and "entry 'limits." in str(caught.value)


def test_a_urdf_of_a_package(load, tmp_path, monkeypatch):
    folder = tmp_path / "prefix" / "share" / "arm_description"
    folder.mkdir(parents=True)
    (tmp_path / "mock.urdf").rename(folder / "arm.urdf")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/nowhere:{tmp_path / 'prefix'}")
    limits = load("mock", {"limits.urdf": "package://arm_description/arm.urdf"}).robot.limits
    assert limits.upper.tolist() == np.array([2.9, 1.5, 2.0, 1.0], np.float32).tolist()


# --- mapping ---------------------------------------------------------------------------------------------------------

numbers = st.floats(-100, 100)
scales = st.floats(0.01, 100).flatmap(lambda scale: st.sampled_from([scale, -scale]))


@given(st.permutations(range(5)), st.lists(scales, min_size=3, max_size=3), st.data())
def test_mapping_there_and_back(order, scale, data):
    offset = data.draw(st.lists(numbers, min_size=3, max_size=3))
    actions = np.array(data.draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=3)))
    mapping = ChannelMap(np.array(order[:3]), np.array(scale), np.array(offset))
    driver = mapping.to_driver(actions)
    for j, channel in enumerate(order[:3]):
        np.testing.assert_allclose(driver[:, j], scale[j] * actions[:, channel] + offset[j])
    blank = np.where(np.isin(np.arange(5), order[:3]), np.nan, actions)
    np.testing.assert_allclose(mapping.to_action(driver, blank), actions, atol=1e-6)
    np.testing.assert_array_equal(mapping.to_driver(actions[0]), driver[0])


@given(numbers, numbers, numbers, numbers, st.floats(-1, 2))
def test_a_gripper_goes_from_end_to_end_and_no_further(open_action, closed_action, open_driver, closed_driver, part):
    if abs(closed_action - open_action) < 1e-3:
        return
    mapping = GripperMap(0, open_action, closed_action, open_driver, closed_driver)
    assert mapping.to_driver(open_action) == open_driver and mapping.to_driver(closed_action) == closed_driver
    value = mapping.to_driver(open_action + part * (closed_action - open_action))
    kept = min(max(part, 0.0), 1.0)
    assert value == pytest.approx(open_driver + kept * (closed_driver - open_driver), abs=1e-6)


def test_the_measured_position_and_the_urdf_s_limits_are_in_action_units(load):
    """A driver in another unit, order and direction: a hold must command what the joints are measured at."""
    scale, offset = [2.0, -4.0, 1.0], [0.5, 0.0, 0.0]  # of joint3, joint2, joint1
    profile = load("mock", {"command.scale": scale, "command.offset": offset, "limits.velocity": GONE})
    joints = {"joint_position": np.array([0.1, 0.2, 0.3, 0.04])}
    measured = profile.robot.measured_of(joints)
    np.testing.assert_allclose(measured, [0.1, 0.2 / -4.0, (0.3 - 0.5) / 2.0, np.nan])
    np.testing.assert_allclose(profile.command.mapping.to_driver(measured), [0.3, 0.2, 0.1], atol=1e-12)
    limits = profile.robot.limits
    np.testing.assert_allclose(limits.lower, [-2.9, -1.5 / 4, -2.5 / 2, -1.0])
    np.testing.assert_allclose(limits.upper, [2.9, 1.5 / 4, 1.5 / 2, 1.0])
    np.testing.assert_allclose(limits.velocity, [1.0, 0.25, 0.5, np.inf])


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_a_continuous_joint_has_less_than_a_turn(load, tmp_path, scale):
    """An angle that the driver wraps is never inside: a hold at a measurement inside would turn the joint back."""
    urdf = tmp_path / "mock.urdf"
    urdf.write_text(urdf.read_text().replace('"arm_joint1" type="revolute"', '"arm_joint1" type="continuous"'))
    changes = {"command.scale": [1.0, 1.0, scale], "limits.lower": {"joint1": -1.0}}  # the driver's order
    step = 0.5 / 20  # the velocity limit and the control rate: what lies outside by less is still believed
    widest = (2 * np.pi - 0.5) / abs(scale) - step
    upper = widest - 1.0
    assert load("mock", changes | {"limits.upper": {"joint1": upper - 1e-6}}).robot.limits.lower[0] == -1.0
    with pytest.raises(ConfigError) as caught:
        load("mock", changes | {"limits.upper": {"joint1": upper + 1e-3}})
    text = str(caught.value)
    assert "entry 'limits.upper' is" in text and "joint 'arm_joint1' is continuous" in text
    assert f"at most lower + {widest:.3f} for 'joint1', which has -1 to {upper + 1e-3:g} and steps of {step:g}" in text
    with pytest.raises(ConfigError, match="entry 'limits.upper' is"):
        load("mock", changes | {"limits.upper": {"joint1": upper - 1e-6}, "limits.velocity.joint1": 1.0})
    changes |= {"limits.velocity.joint1": 9.0, "limits.step": {"joint1": step}}
    load("mock", changes | {"limits.upper": {"joint1": upper - 1e-6}})


def test_a_joint_with_ends_does_not_wrap(load):
    changes = {"limits.lower": {"joint2": -9.0}, "limits.upper": {"joint2": 9.0}}
    assert load("mock", changes).robot.limits.upper[1] == 9.0


def test_the_range_of_a_continuous_joint_needs_the_control_rate(load, tmp_path):
    urdf = tmp_path / "mock.urdf"
    urdf.write_text(urdf.read_text().replace('"arm_joint1" type="revolute"', '"arm_joint1" type="continuous"'))
    gone = ("points", "time_from_start_s", "stamp")
    changes = {"command.kind": "float64_multi_array"} | {f"command.{key}": GONE for key in gone}
    changes |= {"limits.lower": {"joint1": -1.0}, "limits.upper": {"joint1": 1.0}}
    load("mock", changes)
    with pytest.raises(ConfigError, match="entry 'rates.control_rate_hz' is missing"):
        load("mock", changes | {"rates": GONE})


def test_how_far_an_arm_may_be_from_its_command(load):
    limits = load("mock", {}).robot.limits.at(50_000_000)
    np.testing.assert_allclose(limits.following, [0.3, 0.5, 0.5, np.inf])
    limits = load("mock", {"limits.following": {"joint2": None, "joint3": 0.7}}).robot.limits.at(50_000_000)
    np.testing.assert_allclose(limits.following, [0.25, np.inf, 0.7, np.inf])
    assert np.isinf(load_profile("bench_arm").robot.limits.at(50_000_000).following).all()


def test_typed_limits_go_before_the_urdf(load):
    limits = load("mock", {"limits.lower": {"joint2": -0.5}, "limits.velocity": [0.1, 0.2, 0.3, None]}).robot.limits
    np.testing.assert_allclose(limits.lower, [-2.9, -0.5, -2.0, -1.0])
    np.testing.assert_allclose(limits.velocity, [0.1, 0.2, 0.3, np.inf])


def test_the_state_is_relative_to_the_origin_and_one_finger_stands_for_two(load):
    origin = np.array([0.45, 0.0, 0.30])
    profile = load("panda_servo", {"ee_pose.origin_xyz": origin.tolist()})
    pose = np.array([0.5, 0.1, 0.2, 1.0, 0.0, 0.0, 0.0])
    state = profile.robot.state_of({"ee_pose": pose, "joint_position": np.arange(8.0)})
    np.testing.assert_allclose(state, [0.05, 0.1, -0.1, 0, 0, 0, 7, 7], atol=1e-7)
    both = load("libero", {"ee_pose.origin_xyz": [0.1, 0.0, 0.0]})
    state = both.robot.state_of({"ee_pose": pose, "joint_position": np.arange(9.0)})
    np.testing.assert_allclose(state[[0, 6, 7]], [0.4, 7, 8], atol=1e-7)


def test_joints_of_several_drivers_are_one_state_and_what_is_not_measured_is_not_asked_for(load):
    arm = ["joint1", "joint2", "joint3"]
    apart = {"joint_states.names": arm, "more_joint_states.hand": HAND, "max_age_s.hand": 0.5}
    profile = load("mock", apart)
    robot = profile.robot
    assert robot.state_names == profile.joint_names == (*arm, "finger")
    assert robot.streams["joint_position"].shape == (3,) and robot.streams["hand"].shape == (1,)
    assert robot.streams["hand"].max_age_ns == 500_000_000
    values = {"joint_position": np.array([0.1, 0.2, 0.3]), "hand": np.array([0.04])}
    state = robot.state_of(values)
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, [0.1, 0.2, 0.3, 0.04])
    assert robot.measured_streams == ("joint_position",) and robot.undated_streams == ("hand",)
    np.testing.assert_allclose(robot.measured_of({"joint_position": np.arange(3.0)}), [0, 1, 2, np.nan])

    apart |= {"joint_states.names": arm[2:], "more_joint_states.hand.names": ["joint2", "joint1"]}
    two_arms = load("mock", apart)
    assert two_arms.robot.measured_streams == ("joint_position", "hand") and two_arms.robot.undated_streams == ()
    values = {"joint_position": np.array([0.3]), "hand": np.array([0.2, 0.1])}
    np.testing.assert_allclose(two_arms.robot.measured_of(values), [0.1, 0.2, 0.3, np.nan])
    del values["joint_position"]
    np.testing.assert_allclose(two_arms.robot.measured_of(values), [0.1, 0.2, np.nan, np.nan])


def test_the_gripper_of_a_pose_may_have_a_topic_of_its_own(load):
    names = shipped("panda_servo")["joint_states"]["names"]
    hand = {"topic": "hand/joint_states", "names": names[7:]}
    changes = {"joint_states.names": names[:7], "more_joint_states.hand": hand, "max_age_s.hand": 0.5}
    robot = load("panda_servo", changes).robot
    values = {"ee_pose": np.array([0.0, 0, 0, 1, 0, 0, 0]), "joint_position": np.arange(8.0)}
    expected = load_profile("panda_servo").robot.state_of(values)
    values |= {"joint_position": np.arange(7.0), "hand": np.array([7.0])}
    np.testing.assert_array_equal(robot.state_of(values), expected)
