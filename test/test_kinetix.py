"""Kinetix for real: levels, physics, expert, and the training and evaluation of a level. Levels are Kinetix's own."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

kinetix = pytest.importorskip("kinetix", reason="KINETIX=1 make setup installs it")
torch = pytest.importorskip("torch")
import jax
from PIL import Image, ImageSequence

from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation import kinetix as command
from a2c2_ros.evaluation import kinetix_film
from a2c2_ros.sim import kinetix_env
from a2c2_ros.sim.kinetix_env import KinetixEnv, Stepped
from a2c2_ros.sim.kinetix_level import load_level
from a2c2_ros.training import kinetix as training
from a2c2_ros.training.dataset import load_demonstrations
from a2c2_ros.training.kinetix_budget import Budget
from a2c2_ros.training.kinetix_expert import Expert, ExpertConfig, advantages, load_expert, train_expert

pytestmark = pytest.mark.timeout(600)  # the first test that asks for what is trained waits for it

LEVELS = Path(kinetix.__path__[0]) / "levels"
LEVEL = LEVELS / "s" / "h5_rotate_fall.json"
TINY = Budget(
    experts=1,
    envs=24 * 4,
    expert_steps=65_536,
    data_steps=3_000,
    policy_steps=60,
    head_steps=60,
    batch_size=64,
    width=32,
    rollouts=4,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Each program is compiled once, which takes 15 s; there is one for every number of environments."""
    cache = "jax_compilation_cache_dir"
    before = getattr(jax.config, cache)
    jax.config.update(cache, str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update(cache, before)


@pytest.fixture(scope="module")
def env():
    return KinetixEnv(load_level(LEVEL), noise=0.0, distance_reward=0.5)


@pytest.fixture
def noisy(env, monkeypatch):
    """The same environment, so that it is traced once."""
    monkeypatch.setattr(env, "_noise", 0.1)
    return env


def push(env, batch, steps, value=1.0):
    """Step with one action; the last step, and all states."""
    action = np.full((len(batch.rows), len(env.action_names)), value, np.float32)
    states = []
    for step in range(steps):
        stepped = env.step(batch, action, (0, step))
        batch = stepped.batch
        states.append(stepped.state)
    return stepped, np.stack(states)


@pytest.mark.parametrize("name", ["l/h17_unicycle", "l/hard_lunar_lander", "m/h14_thrustblock"])
def test_state_and_action_do_not_depend_on_the_variant(name):
    level = load_level(LEVELS / f"{name}.json")
    envs = [KinetixEnv(level, variant=variant) for variant in ("stock", "shrunk", "pruned")]
    names = {(env.state_names, env.action_names) for env in envs}
    assert len(names) == 1 and all(names.pop())
    starts = [env.reset(2)[1] for env in envs]
    assert starts[0].shape == (2, len(envs[0].state_names)) and np.isfinite(starts[0]).all()
    assert np.array_equal(starts[0], starts[1]) and np.array_equal(starts[0], starts[2])


def test_small_physics_does_what_the_stock_physics_does(env):
    """Not bit for bit, because contacts are resolved in another order; so before anything can touch by chance."""
    stock = KinetixEnv(load_level(LEVEL), variant="stock", noise=0.0)
    _, mine = push(env, env.reset(TINY.envs)[0], 12)
    _, theirs = push(stock, stock.reset(TINY.envs)[0], 12)
    assert np.abs(mine[:, :1] - theirs[:, :1]).max() < 1e-3
    assert np.abs(mine - mine[0]).max() > 0.01  # something moves


def test_an_environment_starts_again_where_its_episode_ended(env):
    batch, start = env.reset(TINY.envs)
    action = np.zeros((TINY.envs, len(env.action_names)), np.float32)
    for step in range(env.max_steps):
        stepped = env.step(batch, action, (0, step), restart=True)
        batch = stepped.batch
        if stepped.ended.any():
            assert np.array_equal(stepped.state[stepped.ended], start[stepped.ended])
            break
    else:
        pytest.fail("no episode ended within the step limit")


def test_noise_follows_from_the_seed(noisy):
    batch, _ = noisy.reset(TINY.envs)
    action = np.full((TINY.envs, len(noisy.action_names)), 0.5, np.float32)
    first, again, other = (noisy.step(batch, action, seed).state for seed in ((1, 0), (1, 0), (1, 1)))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_an_action_is_limited_before_the_noise(noisy):
    batch, _ = noisy.reset(TINY.envs)
    states = []
    for value in (1.0, 5.0):
        action = np.full((TINY.envs, len(noisy.action_names)), value, np.float32)
        states.append(noisy.step(batch, action, (0, 0)).state)
    assert np.array_equal(*states) and np.abs(states[0] - states[0][0]).max() > 0


def test_what_is_left_of_a_batch_goes_on_as_before(noisy, monkeypatch):
    monkeypatch.setattr(kinetix_env, "LEAST_PART", 1)
    batch, _ = noisy.reset(TINY.envs)
    action = np.full((TINY.envs, len(noisy.action_names)), 0.5, np.float32)
    batch = noisy.step(batch, action, (0, 0)).batch
    going = np.arange(TINY.envs) % 3 == 0
    whole, part = noisy.step(batch, action, (0, 1)), noisy.step(batch, action, (0, 1), going=going)
    assert len(part.batch.rows) == TINY.envs // 2 and set(np.flatnonzero(going)) <= set(part.batch.rows)
    assert np.allclose(part.state[going], whole.state[going], atol=1e-5)
    dropped = np.setdiff1d(np.arange(TINY.envs), part.batch.rows)
    assert np.isnan(part.state[dropped]).all() and not part.ended[dropped].any()
    row = int(np.flatnonzero(going)[-1])
    assert np.array_equal(noisy.picture(part.batch, row), noisy.picture(whole.batch, row))
    with pytest.raises(ValueError, match="unpack"):
        noisy.picture(part.batch, int(dropped[0]))


def test_a_wrong_level_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.json is not a file"):
        load_level(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text('{"env_state": {}}')
    with pytest.raises(ConfigError, match=r"bad\.json is not a level"):
        load_level(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="variant is 'small'"):
        KinetixEnv(load_level(LEVEL), variant="small")


def test_advantages_are_discounted_sums_of_errors():
    config = ExpertConfig(discount=0.9, trace=0.8)
    rng = np.random.default_rng(0)
    reward, value = (torch.tensor(rng.standard_normal((5, 1)), dtype=torch.float32) for _ in range(2))
    ended, last = torch.tensor([[False], [False], [True], [False], [False]]), torch.tensor([0.7])
    found = advantages(reward, value, ended, last, config)
    following = torch.cat([value[1:], last[None]])
    error = reward + 0.9 * following * (~ended) - value
    expected = [error[0] + 0.72 * error[1] + 0.72**2 * error[2], error[1] + 0.72 * error[2], error[2]]
    expected += [error[3] + 0.72 * error[4], error[4]]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


class Ending:
    """Every episode ends after four steps, as it is told."""

    name, max_steps, state_names, action_names = "ending", 4, ("x",), ("motor0",)

    def __init__(self, solved):
        self._solved, self.actions = solved, []

    def reset(self, count):
        return 0, np.zeros((count, 1), np.float32)

    def step(self, batch, action, seed, restart=False):
        self.actions.append(action)
        ended = np.full(len(action), batch % 4 == 3)
        return Stepped(batch + 1, np.zeros((len(action), 1), np.float32), None, ended, ended & self._solved)


class Staggered(Ending):
    """Every step, one of eight environments ends its episode."""

    action_low = np.array([-1.0], np.float32)

    def step(self, batch, action, seed, restart):
        ended = (batch + np.arange(len(action))) % 8 == 7
        zeros = np.zeros(len(action), np.float32)
        return Stepped(batch + 1, zeros[:, None], zeros, ended, ended & self._solved)


def test_few_episodes_are_no_success_rate(tmp_path):
    config = ExpertConfig(steps=3 * 8, envs=8, rollout=3, good_enough=2.0, minibatches=1, epochs=1, width=8)
    assert train_expert(Staggered(True), config, tmp_path) == 3 / 8  # as many episodes ended, all with success
    assert train_expert(Staggered(True), dataclasses.replace(config, steps=3 * 3 * 8), tmp_path) == 1.0


def test_an_expert_that_solves_nothing_gives_no_demonstrations(tmp_path):
    expert = Expert(1, np.array([-1.0], np.float32), 8)
    with pytest.raises(A2C2Error, match="0 episodes solved"):
        training.record(Ending(False), [expert], tmp_path / "data", 10, 3, 0)
    assert not (tmp_path / "data").exists()


def test_an_expert_that_succeeds_by_chance_alone_is_refused(tmp_path):
    expert = Expert(1, np.array([-1.0], np.float32), 8)
    training.check_expert(Ending(True), expert, tmp_path, 4, 0)
    with pytest.raises(A2C2Error, match="solves 0 of 4 episodes"):
        training.check_expert(Ending(False), expert, tmp_path, 4, 0)


def test_the_label_is_what_was_executed(tmp_path):
    world = Ending(True)
    training.record(world, [Expert(1, np.array([-1.0], np.float32), 8)], tmp_path / "data", 10, 3, 0)
    data = load_demonstrations(tmp_path / "data")
    executed = np.stack(world.actions)  # (steps, environments, 1)
    assert np.array_equal(data.action, executed[:4].transpose(1, 0, 2).reshape(-1, 1)) and executed.std() > 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinetix")
    arguments = [f"--levels={LEVEL.parent}", "--tasks", LEVEL.stem, "--methods", "naive", "rtc+a2c2", "--workers=1"]
    arguments += [f"--{name}={folder / name}" for name in ("work", "results")] + [f"--page={folder / 'page.md'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.BUDGETS, "quick", TINY)
        patch.setattr(command, "EXPERT_ROLLOUTS", dict.fromkeys(("pruned", "shrunk", "stock"), TINY.envs))
        assert command.main([*arguments, "--budget=quick"]) == 0
        file = folder / "results" / f"{LEVEL.stem}.json"
        before = file.stat().st_mtime_ns
        assert command.main([*arguments, "--budget=quick"]) == 0
        assert file.stat().st_mtime_ns == before  # nothing was missing
    return folder


def test_one_command_makes_the_results_of_a_level(trained):
    result = json.loads((trained / "results" / f"{LEVEL.stem}.json").read_text())
    assert set(result["methods"]) == {"naive", "rtc+a2c2"}
    for found in result["methods"].values():
        assert len(found["cells"]) == 24 and all(cell["episodes"] == TINY.rollouts for cell in found["cells"])
    assert result["versions"]["kinetix-env"]
    assert all("LIBERO" not in text for lines in result["facts"]["departures"].values() for text in lines)
    page = (trained / "page.md").read_text()
    assert "not run" in page and "rtc+a2c2" in page  # a2c2 and rtc were not asked for


def test_film(trained, tmp_path):
    arguments = [f"--levels={LEVEL.parent}", f"--task={LEVEL.stem}", f"--work={trained / 'work'}"]
    out = tmp_path / "film.gif"
    assert (
        kinetix_film.main([*arguments, "--methods", "naive", "a2c2", "--episodes=2", "--size=80", f"--out={out}"]) == 0
    )
    with Image.open(out) as picture:
        assert picture.size == (2 * 80, 2 * (80 + kinetix_film.HEADING)) and picture.n_frames > 5
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
    inside = np.stack(frames)[:, kinetix_film.HEADING + 10 : kinetix_film.HEADING + 70, 10:70]
    assert (inside[0] != inside[3]).any()  # something moves


def test_an_expert_succeeds_alike_in_every_variant(trained):
    """The condition for a smaller physics."""
    experts = json.loads((trained / "results" / f"{LEVEL.stem}.json").read_text())["expert"]
    assert set(experts) == {"pruned", "shrunk", "stock"}
    for variant in ("pruned", "shrunk"):
        assert experts[variant]["successes"] >= 0.5 * TINY.envs  # what fails everywhere would tell nothing
        (low, high), (stock_low, stock_high) = (experts[name]["wilson_95"] for name in (variant, "stock"))
        assert low <= stock_high and stock_low <= high


def test_results_of_other_settings_are_kept(trained, capsys):
    file = trained / "results" / f"{LEVEL.stem}.json"
    before = file.read_bytes()
    arguments = [f"--levels={LEVEL.parent}", "--tasks", LEVEL.stem, "--budget=quick", "--rollouts=5", "--workers=1"]
    arguments += [f"--{name}={trained / name}" for name in ("work", "results")] + [f"--page={trained / 'page.md'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.BUDGETS, "quick", TINY)
        assert command.main(arguments) == 2
    assert "rollouts 4, not 5" in capsys.readouterr().err and file.read_bytes() == before


def test_a_level_has_a_robot_profile(trained, env):
    profile = load_profile(str(trained / "work" / LEVEL.stem / "robot.yaml"))
    assert profile.joint_names == env.state_names and profile.robot.action_names == env.action_names
    assert profile.control_rate_hz == 60.0


def test_a_level_runs_in_the_nodes(trained, tmp_path):
    """Simulator, planner, controller and monitor over DDS, in lockstep, with what was trained."""
    pytest.importorskip("rclpy")
    command = [sys.executable, "-m", "a2c2_ros.bringup", "kinetix_sim", f"level:={LEVEL}", "episodes:=2"]
    command += ["execution_horizon:=3", "inference_delay:=2", f"out:={tmp_path / 'run'}"]
    command += [f"models:={trained / 'work' / LEVEL.stem}"]
    environment = os.environ | {"ROS_DOMAIN_ID": str(random.SystemRandom().randrange(1, 100)), "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **output) as run:
        try:
            text, _ = run.communicate(timeout=180)
        finally:
            run.terminate()  # which ends its nodes, too
    assert run.returncode == 0, text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["episodes"] == 2 and summary["states"]["running"] > 10 and summary["head_ms_p50"] > 0.0, summary
    assert "fault" not in summary["states"], summary


def test_a_folder_of_another_budget_is_refused(trained, capsys):
    arguments = [f"--levels={LEVEL.parent}", "--tasks", LEVEL.stem, f"--work={trained / 'work'}"]
    arguments += [f"--results={trained / 'results'}", f"--page={trained / 'page.md'}"]
    assert command.main([*arguments, "--budget=small"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_missing_level_is_named(tmp_path, capsys):
    assert command.main([f"--levels={tmp_path}", "--tasks", "nowhere", f"--results={tmp_path}"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_an_expert_is_read_for_its_level_alone(trained, env):
    folder = trained / "work" / LEVEL.stem / "expert0"
    expert = load_expert(folder, env)
    action = expert.squash(expert.mean(torch.tensor(env.reset(1)[1])))
    assert action.shape == (1, len(env.action_names))
    other = KinetixEnv(load_level(LEVELS / "s" / "h0_weak_thrust.json"))
    with pytest.raises(A2C2Error, match="state_names"):
        load_expert(folder, other)
    with pytest.raises(ConfigError, match="no expert"):
        load_expert(folder.parent, env)


def test_training_keeps_its_history(env, tmp_path):
    config = ExpertConfig(steps=2 * TINY.envs * 32, envs=TINY.envs, rollout=32, good_enough=2.0)
    rate = train_expert(env, config, tmp_path)
    record = json.loads((tmp_path / "expert.json").read_text())
    assert record["success_rate"] == rate and record["steps"] == config.steps and len(record["history"]) == 2
