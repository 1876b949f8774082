"""The evaluation's counts, intervals, resuming, and the jobs that run side by side."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from conftest import NAMES, make_robot
from evaluation_fakes import write_head, write_policy

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation import libero
from a2c2_ros.evaluation.cells import (
    EXPERT,
    METHOD_NAMES,
    EpisodeStore,
    outcomes,
    settings,
    summarise,
    write_result,
)
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.evaluation.statistics import Recovery, difference, holm, mcnemar_p, recovery, wilson_interval
from a2c2_ros.jobs import run_jobs
from a2c2_ros.policies.base import PolicyOutput
from a2c2_ros.sim.conventions import parse_numbers


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (100, 100, (0.9630, 1.0)), (0, 0, (0.0, 1.0))],
)
def test_wilson_interval(successes, trials, expected):
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="11"):
        wilson_interval(11, 10)


@pytest.mark.parametrize(("first", "second", "p"), [(0, 0, 1.0), (5, 0, 1 / 16), (6, 0, 1 / 32), (3, 9, 598 / 4096)])
def test_mcnemar_is_an_exact_binomial_test(first, second, p):
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == pytest.approx(p, abs=1e-12)


def test_holm_adjusts_for_the_number_of_tests():
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_difference_is_over_the_common_initial_states():
    first = {(0, n): True for n in range(8)} | {(1, 0): True}
    second = {(0, n): n < 2 for n in range(10)}
    found = difference(first, second)
    assert (found.pairs, found.points, found.only_first, found.only_second) == (8, 75.0, 6, 0)
    assert found.significant
    assert difference(first, {(7, 7): True}) is None


def test_recovery_and_its_interval():
    def of(successes):
        return {(task, n): n < successes for task in range(10) for n in range(10)}

    # Every task alike and sorted: what is won and lost in a resample varies only together with the drawn states.
    found = recovery(of(9), of(4), of(8))
    assert (found.value, found.states) == (1.25, 100)
    assert 1.1 < found.interval[0] < 1.25 < found.interval[1] < 1.5
    assert recovery(of(9), of(4), of(8)) == found
    assert recovery(of(9), of(8), of(8)) is None  # nothing was lost
    assert recovery(of(9), of(4), {}) is None
    few = {(0, n): n < 5 for n in range(10)}
    assert recovery(few, few, few | {(0, 7): True}).interval is None  # a third of the resamples has no loss


def test_resamples_of_the_recovery_keep_the_states_of_every_task():
    """In a task all states are alike, so that only other shares of the tasks could change the recovery."""
    delayed, undelayed = ({(task, n): won for task in (0, 1) for n in range(10)} for won in (False, True))
    corrected = {(task, n): task == 1 for task, n in delayed}
    assert recovery(corrected, delayed, undelayed) == Recovery(0.5, (0.5, 0.5), 20)


def test_the_interval_of_the_recovery_has_95_percent():
    """Half of 16 states are won back: of 16 tosses of a coin 4 to 12 are heads, in all but 1.1% on either side."""
    delayed, undelayed = ({(0, n): won for n in range(16)} for won in (False, True))
    assert recovery({(0, n): n < 8 for n in range(16)}, delayed, undelayed) == Recovery(0.5, (0.25, 0.75), 16)


def test_lists_of_numbers():
    assert parse_numbers("0-3,7") == [0, 1, 2, 3, 7]
    for text in ("", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ConfigError):
            parse_numbers(text)
    for text, words in (
        ("0-4,4-9", r"names \[4\] twice"),
        ("7,7", r"names \[7\] twice"),
        ("1,5-3", "has the range 5-3"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_numbers(text)


class CountingEnv:
    """The observation's joints tell the step; solved after 30 steps."""

    instruction = "count"

    def reset(self, initial_state, seed):
        self.n = 0
        return self._observe()

    def step(self, action, look=True):
        assert action.shape == (3,)
        self.n += 1
        return self._observe(), self.n == 30

    def _observe(self):
        return {"camera": np.zeros((4, 4, 3), np.uint8), "joints": np.array([self.n, 0.0])}


class EchoPolicy:
    """Action x of every slot is the step of the observation / 100."""

    policy_id, horizon = "echo", 8

    def predict(self, observation, instruction, *, seed, continuation=None):
        actions = np.zeros((8, len(NAMES)), np.float32)
        actions[:, 0] = observation["state"][0] / 100
        return PolicyOutput(actions, np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_rollout_hands_chunks_over_when_they_are_due():
    robot, steps = make_robot(), []
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), robot)
    config = PlannerConfig(horizon=8, execution_horizon=5, inference_delay=2)
    episode = run_episode(
        CountingEnv(),
        robot,
        EchoPolicy(),
        loop,
        config,
        initial_state=0,
        seed=0,
        max_steps=50,
        on_step=lambda step, observation: steps.append(step),
    )
    assert (episode.success, episode.steps, episode.states) == (True, 30, {"BASE_ONLY": 30})
    observed = [round(float(s.base_action[0]) * 100) for s in steps]
    assert observed[:14] == [0] * 7 + [5] * 5 + [10] * 2
    assert len(episode.inference_ms) == 6


def test_a_chunk_that_may_not_move_the_robot_is_refused_as_in_the_node():
    class Wild(EchoPolicy):
        def predict(self, observation, instruction, *, seed, continuation=None):
            output = super().predict(observation, instruction, seed=seed)
            return dataclasses.replace(output, actions=output.actions * (1000 if observation["state"][0] == 5 else 1))

    loop = CorrectionLoop(ControllerConfig(correction__enabled=False, lockstep=True), make_robot())
    config = PlannerConfig(horizon=8, execution_horizon=5, inference_delay=2)
    episode = run_episode(CountingEnv(), make_robot(), Wild(), loop, config, initial_state=0, seed=0, max_steps=50)
    assert episode.refused_chunks == loop.chunks["implausible"] == 1
    assert episode.states == {"BASE_ONLY": 26, "HOLDING": 4}, "the old chunk has 8 slots, the next comes after 12"


@pytest.mark.parametrize(("chunking", "horizon"), [("synchronous", 5), ("rtc", 8)])
def test_methods_that_the_grid_takes_for_naive_execute_the_same(chunking, horizon):
    def actions(config):
        steps = []
        loop = CorrectionLoop(ControllerConfig(correction__enabled=False, lockstep=True), make_robot())
        run_episode(
            CountingEnv(),
            make_robot(),
            EchoPolicy(),
            loop,
            config,
            initial_state=0,
            seed=0,
            max_steps=50,
            on_step=lambda step, observation: steps.append(step.command),
        )
        return np.array(steps)

    naive = PlannerConfig(horizon=8, execution_horizon=horizon, inference_delay=0)
    other = PlannerConfig(horizon=8, execution_horizon=horizon, inference_delay=0, chunking=chunking)
    assert np.array_equal(actions(naive), actions(other))


def make_args(out, *extra):
    write_policy(out.parent / "policy", "p1")
    write_head(out.parent / "head.onnx", "p1")
    files = ["--policy", str(out.parent / "policy"), "--head", str(out.parent / "head.onnx")]
    return libero.parser().parse_args(["--out", str(out), "--episodes", "2", *files, *extra])


def test_exceptions_are_counted_apart_from_failures(tmp_path):
    def episode(task, state, success, error=None):
        measured = {"success": success, "steps": 9, "seconds": 0.5, "inference_ms": [100.0], "head_ms": []}
        measured["states"] = {"BASE_ONLY": 9}
        return {"task": task, "initial_state": state, "error": error} | ({} if error else measured)

    episodes = [
        episode(0, 0, True),
        episode(0, 1, False),
        episode(3, 0, None, "SimulationError: x"),
        episode(3, 1, True),
    ]
    cell = libero.make_cell(make_args(tmp_path / "r.json"))
    result = summarise(cell, settings(cell), [0, 3], episodes)
    assert (result["total"]["successes"], result["total"]["exceptions"]) == (2, 1)
    assert result["per_task"]["3"]["episodes"] == 1
    assert result["total"]["wilson_95"] == wilson_interval(2, 3)
    assert result["states"] == {"BASE_ONLY": 27}
    assert result["speed"]["control_steps_per_s"] == 18.0
    assert result["speed"]["inference_share"] == pytest.approx(0.2)
    assert outcomes(result) == {(0, 0): True, (0, 1): False, (3, 1): True}
    write_result(tmp_path / "r.json", result)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))


def test_an_evaluation_of_other_settings_is_not_continued(tmp_path):
    def store(*extra):
        return EpisodeStore(tmp_path / "r.parts", libero.make_cell(make_args(tmp_path / "r.json", *extra)))

    store().write(0, 0, {"error": None})
    assert store().missing(0, 2) == (1,)
    with pytest.raises(ConfigError, match="inference_delay: there 10, here 5"):
        store("--inference-delay", "5")
    write_head(tmp_path / "other.onnx", "p1", parameters=1)
    with pytest.raises(ConfigError, match="head_sha256"):
        store("--head", str(tmp_path / "other.onnx"))
    running = store()
    write_head(tmp_path / "head.onnx", "p1", parameters=1)
    with pytest.raises(ConfigError, match="were changed while it was run: head_sha256"):
        running.write(0, 1, {"error": None})
    assert running.missing(0, 2) == (1,)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_single_cell_front_end_takes_every_method(tmp_path, method):
    cell = libero.make_cell(make_args(tmp_path / "r.json", "--method", method))
    assert (cell.execution_horizon is None, bool(cell.head)) == (method == EXPERT, "a2c2" in method)
    assert cell.method == method


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "0-12"], "10, 11, 12"),
        (["--execution-horizon", "45"], "e=45"),
        (["--episodes", "51"], "51"),
        (["--head", "nowhere.onnx"], "nowhere.onnx"),
        (["--method", "expert", "--videos"], "--videos"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(tmp_path, capsys, arguments, words):
    assert libero.main(["--out", str(tmp_path / "r.json"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_jobs_that_fail_do_not_stop_the_others(tmp_path):
    jobs = {
        name: [sys.executable, "-c", f"print('{name}'); raise SystemExit({code})"]
        for name, code in (("a", 0), ("b", 3), ("c", 0))
    }
    polls = []
    assert run_jobs(jobs, 2, tmp_path, lambda: polls.append(1)) == ["b"]
    assert (tmp_path / "c.log").read_text() == "c\n"
    assert polls
