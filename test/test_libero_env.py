"""The LIBERO environment: repeatable to the bit, images as a person sees them, clear errors."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest

from a2c2_ros.core.errors import SimulationError
from a2c2_ros.core.state import state_vector
from a2c2_ros.sim import conventions, libero_env
from a2c2_ros.sim.libero_env import LiberoEnv

# Mean grey level of a 4 x 4 grid of patches: task 0, official initial state 0, seed 0.
GOLDEN_GREY = {
    "agentview": [[108, 108, 111, 109], [66, 75, 114, 124], [30, 126, 142, 151], [129, 169, 171, 175]],
    "wrist": [[178, 150, 177, 36], [154, 176, 170, 129], [159, 170, 111, 112], [68, 87, 62, 60]],
}


@pytest.fixture(scope="module")
def env():
    with LiberoEnv(0) as env:
        yield env


def rollout(env: LiberoEnv, initial_state: int | None, seed: int) -> list[np.ndarray]:
    observation = env.reset(initial_state, seed)
    arrays = list(observation.values())
    for action in np.random.default_rng(5).uniform(-1, 1, (4, 7)):
        arrays += env.step(action)[0].values()
    return arrays


def test_same_seed_repeats_bit_for_bit_after_another_episode(env):
    first = rollout(env, 3, 7)
    sampled = rollout(env, None, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, rollout(env, 3, 7)))
    assert all(np.array_equal(a, b) for a, b in zip(sampled, rollout(env, None, 7)))


def test_seed_moves_the_fixtures_and_the_sampled_objects_within_their_regions(env):
    poses = []
    random_state = np.random.get_state()[1].copy()
    for seed in range(4):
        env.reset(0, seed)
        poses.append((env.object_pose("wooden_cabinet_1")[:2], env.object_pose("akita_black_bowl_1")[:2]))
    cabinet, bowl = np.array([p[0] for p in poses]), np.array([p[1] for p in poses])
    assert len(np.unique(cabinet[:, 0])) == 4
    assert (np.abs(cabinet - (0.03, -0.27)) <= 0.0101).all()
    assert np.ptp(bowl, axis=0).max() < 1e-6  # the official initial state says where the bowl is
    env.reset(None, 0)
    assert np.abs(env.object_pose("akita_black_bowl_1")[:2] - bowl[0]).max() > 1e-4
    assert np.array_equal(random_state, np.random.get_state()[1])  # the caller's generator is not touched


def test_images_are_upright_in_colour_and_without_collision_shapes(env):
    observation = env.reset(0, 0)
    for name in conventions.CAMERAS:
        image = observation[name]
        assert image.shape == (conventions.IMAGE_SIZE, conventions.IMAGE_SIZE, 3)
        assert image.dtype == np.uint8
        grey = image.mean(axis=2).reshape(4, 32, 4, 32).mean(axis=(1, 3))
        np.testing.assert_allclose(grey, GOLDEN_GREY[name], atol=4, err_msg=name)
    table = observation["agentview"][96:].reshape(-1, 3).mean(axis=0)
    assert table[0] - table[2] > 15  # red first: the table is of wood


def test_observation_gives_the_paper_state(env):
    observation = env.reset(0, 0)
    assert observation["ee_pose"].shape == (7,)
    assert observation["joint_position"].shape == (len(conventions.JOINT_NAMES),)
    state = state_vector(observation["ee_pose"], observation["joint_position"][-2:], conventions.NOMINAL_EE_QUAT_XYZW)
    assert state.shape == (conventions.STATE_DIM,)
    assert np.abs(state[3:6]).max() < 0.15  # the arm starts near the nominal orientation
    np.testing.assert_allclose(state[6:], [0.039, -0.039], atol=0.002)  # and with an open gripper


def test_action_moves_the_named_axis(env):
    for axis, sign in ((0, 1.0), (1, -1.0), (2, 1.0)):
        start = env.reset(0, 0)["ee_pose"][:3]
        action = np.zeros(7)
        action[axis] = sign
        for _ in range(5):
            observation, success = env.step(action)
        moved = observation["ee_pose"][:3] - start
        assert sign * moved[axis] > 0.03
        assert np.abs(np.delete(moved, axis)).max() < 0.01
        assert not success


def test_failed_render_is_an_error(env, monkeypatch):
    monkeypatch.setattr(env._renderer, "render", lambda: np.full((128, 128, 3), 90, np.uint8))
    with pytest.raises(SimulationError, match="agentview.*contrast 0.0"):
        env.reset(0, 0)


@pytest.mark.parametrize("task", [-1, 10, 1.5, "0", True, None])
def test_unknown_task(task):
    with pytest.raises(SimulationError, match="unknown task .* allowed"):
        LiberoEnv(task)


def test_bad_calls(env):
    env.reset(0, 0)
    with pytest.raises(SimulationError, match=r"shape \(6,\), allowed is \(7,\)"):
        env.step(np.zeros(6))
    with pytest.raises(SimulationError, match="not finite"):
        env.step(np.full(7, np.nan))
    with pytest.raises(SimulationError, match="initial state 50"):
        env.reset(50, 0)
    with pytest.raises(SimulationError, match="seed is -1"):
        env.reset(0, -1)
    with pytest.raises(SimulationError, match="no object 'cup'"):
        env.object_pose("cup")


FULL_MESHES = """
import sys
import numpy as np
from a2c2_ros.sim.libero_env import LiberoEnv
with LiberoEnv(0, full_meshes=True) as env:
    observation = env.reset(0, 0)
    np.savez(sys.argv[1], faces=env._model.mesh_facenum.sum(), **observation)
"""


def test_simplified_meshes_look_as_the_full_ones(env, tmp_path):
    out = tmp_path / "full.npz"
    subprocess.run([sys.executable, "-c", FULL_MESHES, str(out)], check=True)  # one renderer per process
    observation = env.reset(0, 0)
    with np.load(out) as full:
        assert full["faces"] > 2 * env._model.mesh_facenum.sum()
        for name in ("ee_pose", "joint_position"):  # the physics has its own shapes
            assert np.array_equal(full[name], observation[name])
        for name in conventions.CAMERAS:
            difference = np.abs(full[name].astype(float) - observation[name])
            assert 0.0 < difference.mean() < 1.5
            patches = full[name].reshape(16, 8, 16, 8, 3).mean(axis=(1, 3))
            ours = observation[name].reshape(16, 8, 16, 8, 3).mean(axis=(1, 3))
            assert np.abs(patches - ours).max() < 30


def test_what_is_left_out_of_physics_and_drawing_changes_no_bit(env, monkeypatch):
    def seen():
        env.reset(5, 2)
        rng, action, arrays = np.random.default_rng(0), np.zeros(7), []
        for step in range(48):  # down to the table, the wrist turned, the fingers opened and closed
            action = 0.7 * action + rng.normal(0.0, 0.4, 7)
            action[2] -= 0.3 if step < 24 else 0.0
            observation, _ = env.step(action, look=step % 6 == 5)
            arrays += [*observation.values(), env._data.qpos.copy(), env._data.qvel.copy()]
        return arrays

    ours = seen()
    drawn = env._renderer.scene.ngeom
    monkeypatch.setattr(libero_env, "SinglePass", lambda sim: contextlib.nullcontext())
    monkeypatch.setattr(env._culling, "apply", lambda data, camera: None)
    env._model.geom_group[env._culling._geoms] = env._culling._groups
    assert all(np.array_equal(a, b) for a, b in zip(ours, seen(), strict=True))
    assert drawn < 0.5 * env._renderer.scene.ngeom, "the wrist sees less than half of the scene"


def test_a_step_without_a_look_has_the_images_of_the_last(env):
    looked = rollout(env, 0, 0)
    first = env.reset(0, 0)
    for i, action in enumerate(np.random.default_rng(5).uniform(-1, 1, (4, 7))):
        observation, _ = env.step(action, look=i == 3)
        if i < 3:
            assert all(observation[name] is first[name] for name in conventions.CAMERAS)
    assert all(np.array_equal(a, b) for a, b in zip(looked[-4:], observation.values()))


@pytest.mark.parametrize("kind", ["drift", "push"])
def test_the_plate_moves_where_there_is_room(env, monkeypatch, kind):
    length_m = {"drift": libero_env.DRIFT_LIMIT_M, "push": libero_env.PUSH_LENGTH_M}[kind]
    monkeypatch.setattr(env, "motion", kind)
    ways = []
    for seed in (1, 1, 2):
        env.reset(0, seed)
        poses = [env.object_pose(conventions.PLATE)]
        others = env.object_pose("cookies_1")
        for _ in range(120):
            env.step(conventions.IDLE_ACTION, look=False)
            poses.append(env.object_pose(conventions.PLATE))
        ways.append(np.array(poses)[:, :2] - poses[0][:2])
        assert np.abs(env.object_pose("cookies_1") - others).max() < 0.002  # nothing is hit
        assert abs(poses[-1][2] - poses[0][2]) < 0.002  # it stays on the table
    assert np.array_equal(ways[0], ways[1])
    assert np.abs(ways[0] - ways[2]).max() > 0.01
    distance = np.linalg.norm(ways[0], axis=1)
    assert distance.max() == pytest.approx(length_m, abs=0.012)
    if kind == "push":
        assert distance[: libero_env.PUSH_STEPS[0]].max() < 0.002
        assert np.ptp(distance[-20:]) < 0.002


def test_unknown_motion():
    with pytest.raises(SimulationError, match="'roll'.*'none', 'drift', 'push'"):
        LiberoEnv(0, motion="roll")
    with pytest.raises(SimulationError, match="suite is 'libero_90'"):
        LiberoEnv(0, suite="libero_90")


def test_in_the_swap_suite_two_objects_have_changed_places():
    plate, bowl, places = conventions.PLATE, conventions.TARGET_BOWL, []
    for suite in (conventions.SUITE, conventions.SWAP_SUITE):
        with LiberoEnv(0, render=False, suite=suite) as env:
            env.reset(0, 0)
            places.append({name: env.object_pose(name)[:2] for name in (plate, "cookies_1", bowl)})
    for name, other in ((plate, "cookies_1"), ("cookies_1", plate), (bowl, bowl)):
        assert np.linalg.norm(places[1][name] - places[0][other]) < 0.06
