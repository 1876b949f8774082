"""The simulated arms and the node that offers them as a robot's driver would."""

import numpy as np
import pytest

from a2c2_ros.core.errors import ConfigError, SimulationError
from a2c2_ros.core.state import rotation_vector
from a2c2_ros.drivers.profile import load_profile

pytest.importorskip("mujoco")

from a2c2_ros.sim.arms import ARMS, PHYSICS_STEP_NS, Arm, arm_of, load_spec
from a2c2_ros.sim.reach import HOLD_STEPS, INSTRUCTIONS, TARGETS, ReachTask, expert_action

STEP_NS = 50_000_000
PROFILES = {"panda": "panda_servo", "so101": "so101_servo"}
pytestmark = pytest.mark.parametrize("name", ARMS)


def run_for(arm, seconds):
    """Positions and velocities at every physics step."""
    samples = []
    for _ in range(round(seconds * 1e9) // PHYSICS_STEP_NS):
        arm.advance(arm.time_ns + PHYSICS_STEP_NS)
        samples.append((arm.position, arm.velocity))
    positions, velocities = map(np.array, zip(*samples, strict=True))
    return positions, velocities


def test_the_arm_is_found_by_its_joints_and_starts_in_the_middle_of_the_workspace(name):
    profile = load_profile(PROFILES[name])
    assert arm_of(profile.joint_names) == name
    arm = Arm(name)
    rows = [arm.joint_names.index(joint) for joint in profile.joint_names]
    state = profile.robot.state_of({"ee_pose": arm.centre, "joint_position": arm.position[rows]})
    assert np.abs(state[:3]).max() < 0.01 and np.abs(state[3:6]).max() < 0.1
    with pytest.raises(ConfigError, match="elbow_7.*panda.*so101"):
        arm_of(["elbow_7"])


def test_joints_arrive_and_stay_within_their_velocity_limit(name):
    arm = Arm(name)
    size = len(arm.arm_joints)
    goal = arm.position[:size] + np.where(arm.position[:size] > 0.5, -0.4, 0.4)
    arm.move(goal)
    _, velocities = run_for(arm, 1.5)
    assert np.abs(arm.position[:size] - goal).max() < 0.005
    fastest = np.abs(velocities).max(axis=0)[:size] / arm.velocity_limit[:size]
    assert (fastest < 1.05).all() and fastest.max() > 0.8


def test_joints_stay_within_their_range(name):
    arm = Arm(name)
    arm.move(np.full(len(arm.arm_joints), 10.0))
    arm.grip(10.0)
    positions, _ = run_for(arm, 4.0)
    size = len(arm.arm_joints)
    assert (positions[:, :size] < arm.upper[:size] + 0.01).all()
    assert np.abs(arm.position[:size] - arm.upper[:size]).max() < 0.01
    assert arm.position[size] == pytest.approx(max(arm.upper[size:]), abs=0.02)


def test_a_command_takes_effect_after_the_latency_to_the_step(name):
    arms = {latency: Arm(name, latency_s=latency) for latency in (0.0, 0.03)}
    first = {}
    for latency, arm in arms.items():
        before = arm.position
        arm.move(before[: len(arm.arm_joints)] + 0.3)
        positions, _ = run_for(arm, 0.1)
        first[latency] = int(np.argmax(np.abs(positions[:, 0] - before[0]) > 1e-6))
    assert first[0.03] - first[0.0] == 0.03e9 / PHYSICS_STEP_NS


def test_a_trajectory_is_followed_in_time_and_what_is_over_is_skipped(name):
    arm = Arm(name, start_ns=1_000_000_000)
    start = arm.position[: len(arm.arm_joints)]
    way = np.linspace(0.0, -0.2, 5)[:, None] + start
    times = arm.time_ns + np.arange(-1, 4) * 200_000_000
    arm.move(way, times)
    positions, _ = run_for(arm, 0.4)
    # The servo follows with a lag; half of the way is left.
    assert np.abs(positions[-1, 0] - way[3, 0]) < 0.05 < np.abs(positions[-1, 0] - start[0]) + 0.01
    run_for(arm, 0.6)
    assert np.abs(arm.position[: len(start)] - way[-1]).max() < 0.005


def test_the_same_seed_gives_the_same_motion_bit_for_bit_and_another_other_noise(name):
    def episode(seed):
        arm = Arm(name, latency_s=0.02, noise_rad=0.001, seed=seed)
        seen = []
        for step in range(10):
            arm.twist(np.array([0.1, -0.05, 0.02 * step, 0.0, 0.1, 0.0]))
            arm.advance(arm.time_ns + STEP_NS)
            seen.append(np.concatenate(arm.measure()))
        return np.array(seen)

    np.testing.assert_array_equal(episode(1), episode(1))
    assert np.abs(episode(1) - episode(2)).max() > 1e-4


def test_measurements_are_noisy_and_the_pose_follows_from_them(name):
    arm = Arm(name, noise_rad=0.002, seed=3)
    measured = np.array([arm.measure()[0] for _ in range(300)])
    assert measured.std(axis=0)[:3] == pytest.approx(0.002, rel=0.3)
    poses = np.array([arm.measure()[1][:3] for _ in range(50)])
    assert 1e-5 < np.abs(poses - arm.centre[:3]).max() < 0.02


def test_without_twists_the_arm_stops(name):
    arm = Arm(name, servo_timeout_s=0.1)
    arm.twist(np.array([0.0, 0.1, 0.0, 0.0, 0.0, 0.0]))
    run_for(arm, 0.1)
    moving = arm.centre[1]
    assert moving > 0.002
    run_for(arm, 0.3)
    stopped = arm.centre
    run_for(arm, 0.5)
    np.testing.assert_allclose(arm.centre, stopped, atol=5e-4)
    assert stopped[1] - moving < 0.015  # the servo's lag, no more motion
    np.testing.assert_allclose(arm.velocity, 0.0, atol=1e-3)


@pytest.mark.parametrize("instruction", INSTRUCTIONS[:2])
def test_twists_bring_the_gripper_to_every_corner(name, instruction):
    """By the expert, whose actions are the twists of the profile."""
    profile = load_profile(PROFILES[name])
    arm = Arm(name, latency_s=0.04)
    rows = [arm.joint_names.index(joint) for joint in profile.joint_names]
    task = ReachTask()
    task.start(INSTRUCTIONS.index(instruction))
    for step in range(60):  # noqa: B007, used below
        state = profile.robot.state_of({"ee_pose": arm.centre, "joint_position": arm.position[rows]})
        if task.update(state[:3]):
            break
        arm.twist(profile.command.mapping.to_driver(expert_action(state, TARGETS[instruction])))
        arm.advance(arm.time_ns + STEP_NS)
    assert HOLD_STEPS < step < 50
    assert np.linalg.norm(state[:3] - TARGETS[instruction]) < 0.005


def test_a_twist_beyond_a_limit_keeps_the_joints_in_their_range(name):
    arm = Arm(name)
    for _ in range(60):
        arm.twist(np.array([1.0, 0.0, -0.5, 0.0, 0.0, 0.0]))
        arm.advance(arm.time_ns + STEP_NS)
        size = len(arm.arm_joints)
        assert (arm.position[:size] > arm.lower[:size] - 0.02).all()
        assert (arm.position[:size] < arm.upper[:size] + 0.02).all()
        assert np.isfinite(arm.centre).all()


def test_pushed_aside_it_stays_there(name):
    arm = Arm(name)
    before = arm.centre
    arm.push(np.array([0.0, 0.2, 0.0]), 0.25)
    run_for(arm, 1.0)
    assert arm.centre[1] - before[1] == pytest.approx(0.05, abs=0.01)
    assert np.linalg.norm(rotation_vector(arm.centre[3:], before[3:])) < 0.4


@pytest.mark.parametrize("wrong", ["shape", "nan", "order"])
def test_a_wrong_command_is_refused_and_changes_nothing(name, wrong):
    arm = Arm(name)
    size = len(arm.arm_joints)
    points = {"shape": np.zeros(size + 1), "nan": np.full(size, np.nan), "order": np.zeros((2, size))}[wrong]
    with pytest.raises(SimulationError):
        arm.move(points, [20_000_000, 10_000_000] if wrong == "order" else None)
    with pytest.raises(SimulationError):
        arm.twist([np.nan] * 6)
    before = arm.position
    run_for(arm, 0.1)
    np.testing.assert_allclose(arm.position, before, atol=1e-4)


def test_the_model_comes_without_importing_its_package(name):
    import subprocess
    import sys

    code = (
        f"import sys; from a2c2_ros.sim.arms import Arm; Arm({name!r}); print([m for m in sys.modules if 'robosuite' "
    )
    code += "in m or 'nexus' in m or m == 'torch'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert load_spec(name).compile().nu == len(ARMS[name].joints)
