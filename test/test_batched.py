"""Episodes of many (e, d) cells at a time: schedule, execution and real-time chunking of batches. No simulator."""

import dataclasses

import numpy as np
import pytest
from evaluation_fakes import write_profile

torch = pytest.importorskip("torch")

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import PolicyError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.schedule import admissible_execution_horizons
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation.batched import CellSchedule, run_method
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.heads.base import manifest_of
from a2c2_ros.heads.export import export
from a2c2_ros.heads.mlp import MlpConfig, MlpHead
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.heads.samples import random_samples
from a2c2_ros.policies.base import Continuation
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, FlowPolicy, load_network, save_network
from a2c2_ros.policies.language import InstructionEncoder

HORIZON, STEP_NS = 8, 16_666_667
GRID = [(e, d) for d in range(5) for e in admissible_execution_horizons(HORIZON, d)]
WORDS = torch.zeros(4)


def make_policy(**changes):
    torch.manual_seed(0)
    config = FlowConfig(
        action_names=("motor0", "thruster0"),
        state_names=("x", "step"),
        cameras=(),
        image_size=0,
        step_ns=STEP_NS,
        action_space="kinetix",
        horizon=HORIZON,
        language_dim=4,
        latent_dim=8,
        width=16,
        decoder_width=16,
        decoder_blocks=1,
        temperature=0.0,
        prefix_slots=4,
    )
    return FlowNetwork(dataclasses.replace(config, **changes)).eval()


class Counting:
    """A world whose state is its step and the row; an episode ends after as many steps as its row says, if at all."""

    max_steps = 40
    action_names = ("motor0", "thruster0")

    def __init__(self, ending=False):
        self.actions, self._ending = [], ending

    def reset(self, count):
        self._rows = np.arange(count, dtype=np.float32)
        return 0, self._state(0)

    def _state(self, step):
        return np.stack([np.sin(self._rows), np.full(len(self._rows), step / 10, np.float32)], axis=1)

    def step(self, batch, action, seed, going):
        self.actions.append(action)
        step = batch + 1
        ended = np.full(len(action), step >= self.max_steps) | (self._ending & (self._rows == step))

        class Stepped:
            pass

        Stepped.batch, Stepped.state = step, self._state(step)
        Stepped.ended, Stepped.solved = ended, ended & (self._rows % 2 == 0)
        return Stepped


def test_the_grid_is_the_papers():
    assert len(GRID) == 24 and (1, 0) in GRID and (4, 4) in GRID and (5, 4) not in GRID


@pytest.mark.parametrize(("e", "d"), GRID)
def test_every_step_executes_the_newest_chunk_that_is_there(e, d):
    schedule = CellSchedule(METHODS["naive"], e, d, HORIZON, STEP_NS, seed=0)
    asked = []
    for step in range(30):
        if schedule.begin(step * STEP_NS) is not None:
            asked.append(step)
        # The first chunk is waited for, every other one comes d steps after its observation.
        there = [n for n, begun in enumerate(asked) if begun + (d if n else 0) <= step]
        assert schedule.select(step * STEP_NS) == (there[-1] + 1, step - asked[there[-1]])
    assert asked == list(range(0, 30, e))


@pytest.mark.parametrize("method", ["naive", "rtc", "tt_rtc"])
def test_a_batch_executes_what_single_episodes_execute(method):
    """The chunks of one row, computed one at a time, as the planner does it."""
    policy, pairs, rows = make_policy(), [(1, 1), (3, 2), (4, 4)], 2
    env = Counting()
    run_method(env, policy, None, METHODS[method], pairs, rows, seed=0, language=WORDS)
    for cell, (e, d) in enumerate(pairs):
        row = cell * rows + 1
        schedule, chunks = CellSchedule(METHODS[method], e, d, HORIZON, STEP_NS, seed=0), {}
        for step in range(12):
            request = schedule.begin((step + 1) * STEP_NS)
            if request is not None:
                state = torch.tensor(np.array([[np.sin(row), step / 10]], np.float32))
                continuation = None
                if len(request.known):
                    known = chunks[schedule.newest - 1][request.known[:, 0].astype(int)]
                    continuation = Continuation(known, min(d, len(known)), method)
                with torch.inference_mode():
                    latent = policy.encode({}, state, WORDS[None])
                    chunk = policy.sample(latent, torch.zeros(1, HORIZON * 2), continuation)
                chunks[schedule.newest] = chunk[0].numpy()
            number, slot = schedule.select((step + 1) * STEP_NS)
            assert np.allclose(env.actions[step][row], chunks[number][slot], atol=1e-5)


def test_real_time_chunking_changes_what_is_executed():
    policy, executed = make_policy(), {}
    for method in ("naive", "rtc", "tt_rtc"):
        env = Counting()
        run_method(env, policy, None, METHODS[method], [(4, 2)], 2, seed=0, language=WORDS)
        executed[method] = np.stack(env.actions)
    assert np.array_equal(executed["naive"][:4], executed["rtc"][:4])  # nothing to go on from yet
    assert not np.allclose(executed["naive"][6:], executed["rtc"][6:])
    assert not np.allclose(executed["naive"][6:], executed["tt_rtc"][6:])


def make_head(policy, policy_id="tiny"):
    facts = {name: getattr(policy.config, name) for name in ("horizon", "step_ns", "action_names", "action_space")}
    head = MlpHead(MlpConfig(policy_id=policy_id, state_names=policy.config.state_names, hidden=8, **facts)).eval()
    torch.nn.init.normal_(head.output[-1].weight)
    return head


def test_the_head_sees_the_newest_state_and_the_slot():
    policy = make_policy()
    head = make_head(policy)
    env, corrected = Counting(), Counting()
    pairs, rows = [(5, 3), (2, 1)], 2
    run_method(env, policy, None, METHODS["naive"], pairs, rows, seed=0, language=WORDS)
    run_method(corrected, policy, head, METHODS["a2c2"], pairs, rows, seed=0, language=WORDS)
    schedules = [CellSchedule(METHODS["a2c2"], e, d, HORIZON, STEP_NS, seed=0) for e, d in pairs]
    for step in range(20):
        for cell, schedule in enumerate(schedules):
            schedule.begin((step + 1) * STEP_NS)
            _, slot = schedule.select((step + 1) * STEP_NS)
            row = cell * rows
            state = torch.tensor(np.array([[np.sin(row), step / 10]], np.float32))
            base = torch.tensor(env.actions[step][row : row + 1])
            tau = torch.tensor(time_feature(slot, HORIZON))[None]
            with torch.inference_mode():
                residual = head.fuse({}, state, base, tau, torch.zeros(1, 0), torch.zeros(1, 0))
            assert np.allclose(corrected.actions[step][row], (base + residual)[0].numpy(), atol=1e-5)


def test_an_episode_counts_once():
    outcome = run_method(Counting(ending=True), make_policy(), None, METHODS["naive"], [(8, 0), (4, 4)], 3, 0, WORDS)
    # Row 0 never ends before the limit; rows 1 to 5 end after as many steps, those of even numbers with success.
    assert outcome.steps[8, 0].tolist() == [40, 1, 2] and outcome.steps[4, 4].tolist() == [3, 4, 5]
    assert outcome.solved[8, 0].tolist() == [True, False, True]
    assert outcome.solved[4, 4].tolist() == [False, True, False]


@pytest.mark.parametrize("method", ["naive", "rtc", "a2c2"])
def test_episodes_that_are_over_do_not_change_the_others(method):
    policy = make_policy(temperature=1.0)
    worlds = Counting(), Counting(ending=True)
    arguments = (policy, make_head(policy), METHODS[method], [(3, 2), (4, 4)], 4, 0, WORDS)
    whole, outcome = (run_method(world, *arguments) for world in worlds)
    over = np.concatenate(list(outcome.steps.values()))
    for step, (all_, left) in enumerate(zip(*(world.actions for world in worlds), strict=True)):
        assert np.allclose(all_[step < over], left[step < over], atol=1e-5)
    assert outcome.counts["steps"] == over.sum() < whole.counts["steps"]


class Pushed:
    """A point that an action pushes, so that what is executed decides what is seen; rows start at different places."""

    max_steps = 30
    action_names = ("motor0", "thruster0")
    low, high = np.array([-1.0, 0.0], np.float32), np.float32(1.0)

    def reset(self, count):
        start = np.stack([np.linspace(-1.0, 1.0, count), np.zeros(count)], axis=1).astype(np.float32)
        self.seen = [start]
        return start, start

    def step(self, batch, action, seed, going):
        x = 0.9 * batch + 0.2 * np.clip(action, self.low, self.high) * (1.5 + np.cos(3.0 * batch))

        class Stepped:
            pass

        Stepped.batch = Stepped.state = x
        self.seen.append(x)
        Stepped.ended = Stepped.solved = np.full(len(x), len(self.seen) > self.max_steps)
        return Stepped


class Alone:
    """One row of the world above, as a simulator of the loop in one process."""

    instruction = ""

    def __init__(self, row, count):
        self._world, self._row, self._count = Pushed(), row, count

    def reset(self, initial_state, seed):
        self._batch, _ = self._world.reset(self._count)
        return {"joint_position": self._batch[self._row].astype(float)}

    def step(self, action, look=True):
        actions = np.zeros((self._count, 2), np.float32)
        actions[self._row] = action
        stepped = self._world.step(self._batch, actions, None, None)
        self._batch = stepped.batch
        return {"joint_position": self._batch[self._row].astype(float)}, False


@pytest.mark.parametrize("method", ["naive", "a2c2", "rtc+a2c2", "tt_rtc"])
def test_a_batch_sees_what_planner_and_control_loop_would_see(method, tmp_path):
    """The whole loop in one process, which is what the nodes execute: slots, delays, limits, ONNX head."""
    method, pairs, rows = METHODS[method], [(1, 1), (3, 2), (4, 4)], 2
    config = save_network(make_policy(language_dim=len(InstructionEncoder().embed(""))), tmp_path / "policy", "tiny")
    policy = FlowPolicy(tmp_path / "policy")
    head = make_head(load_network(tmp_path / "policy"), config.policy_id)
    torch.nn.init.normal_(head.output[-1].weight, std=0.3)
    export(head, random_samples(manifest_of(head), 2), tmp_path / "head.onnx")
    write_profile(tmp_path / "robot.yaml", config.state_names, config.action_names, (-1.0, 0.0), 1e9 / STEP_NS)
    robot = load_profile(str(tmp_path / "robot.yaml")).robot
    world = Pushed()
    words = torch.tensor(InstructionEncoder().embed(""))
    run_method(world, load_network(tmp_path / "policy"), head, method, pairs, rows, seed=0, language=words)
    for cell, (e, d) in enumerate(pairs):
        row, seen = cell * rows + 1, []
        planner = {"horizon": HORIZON, "execution_horizon": e, "inference_delay": d, "chunking": method.chunking}
        controller = ControllerConfig(
            control_rate_hz=1e9 / STEP_NS, correction__enabled=method.corrected, lockstep=True
        )
        run_episode(
            Alone(row, len(pairs) * rows),
            robot,
            policy,
            CorrectionLoop(controller, robot, OnnxHead(tmp_path / "head.onnx") if method.corrected else None),
            PlannerConfig(control_rate_hz=1e9 / STEP_NS, **planner),
            initial_state=None,
            seed=0,
            max_steps=Pushed.max_steps,
            on_step=lambda _, observation, seen=seen: seen.append(observation["joint_position"]),
        )
        there = np.stack(world.seen[: Pushed.max_steps])[:, row]
        assert np.allclose(np.stack(seen), there, atol=1e-3), (e, d)
        assert np.ptp(there, axis=0).max() > 0.1  # it was pushed


def test_a_continuation_may_be_one_for_each():
    policy = make_policy(temperature=1.0)
    rng = np.random.default_rng(0)
    known = rng.standard_normal((3, 5, 2)).astype(np.float32)
    latent, noise = torch.tensor(rng.standard_normal((3, 8), np.float32)), torch.randn(3, HORIZON * 2)
    for mode in ("rtc", "tt_rtc"):
        together = policy.sample(latent, noise, Continuation(known, 2, mode))
        for row in range(3):
            part = slice(row, row + 1)
            alone = policy.sample(latent[part], noise[part], Continuation(known[row], 2, mode))
            assert torch.allclose(together[part], alone, atol=1e-5)
    with pytest.raises(PolicyError, match="delay_steps is 6"):
        Continuation(known, 6, "rtc")
