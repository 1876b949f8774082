"""The evaluation's counts, intervals, resuming, and the jobs that run side by side."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NAMES, make_robot

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation import libero
from a2c2_ros.evaluation.report import success_table
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.evaluation.statistics import wilson_interval
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


def test_lists_of_numbers():
    assert parse_numbers("0-3,7") == [0, 1, 2, 3, 7]
    for text in ("", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ConfigError):
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


def make_args(out, *extra):
    policy = out.parent / "policy"
    policy.mkdir(exist_ok=True)
    (policy / "config.json").write_text('{"policy_id": "p1", "horizon": 50}')
    (out.parent / "head.onnx").write_bytes(b"weights")
    files = ["--policy", str(policy), "--head", str(out.parent / "head.onnx")]
    return libero.parser().parse_args(["--out", str(out), "--episodes", "2", *files, *extra])


def test_exceptions_are_counted_apart_from_failures(tmp_path):
    def episode(task, state, success, error=None):
        measured = (
            {}
            if error
            else {"success": success, "steps": 9, "inference_ms": [1.0], "head_ms": [], "states": {"BASE_ONLY": 9}}
        )
        return {"task": task, "initial_state": state, "error": error} | measured

    episodes = [
        episode(0, 0, True),
        episode(0, 1, False),
        episode(3, 0, None, "SimulationError: x"),
        episode(3, 1, True),
    ]
    result = libero.summarise(make_args(tmp_path / "r.json"), [0, 3], episodes, 1.0)
    assert (result["total"]["successes"], result["total"]["exceptions"]) == (2, 1)
    assert result["per_task"]["3"]["episodes"] == 1
    assert result["total"]["wilson_95"] == wilson_interval(2, 3)
    assert result["states"] == {"BASE_ONLY": 27}
    json.dumps(result)


def test_an_evaluation_of_other_settings_is_not_continued(tmp_path):
    out = tmp_path / "r.json"
    libero.check_settings(make_args(out))
    libero.check_settings(make_args(out))
    with pytest.raises(ConfigError, match="delay: there 10, here 5"):
        libero.check_settings(make_args(out, "--delay", "5"))
    args = make_args(out)
    args.head = str(tmp_path / "other.onnx")
    Path(args.head).write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="head_sha256"):
        libero.check_settings(args)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "0-12"], "10, 11, 12"),
        (["--horizon", "45"], "e=45"),
        (["--episodes", "51"], "51"),
        (["--head", "nowhere.onnx"], "nowhere.onnx"),
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


def test_report_lists_cells_in_order():
    def result(method, horizon, delay, successes):
        counts = {"successes": successes, "episodes": 10, "exceptions": 0, "wilson_95": wilson_interval(successes, 10)}
        return {"method": method, "horizon": horizon, "delay": delay, "total": counts, "per_task": {"0": counts}}

    lines = success_table([result("a2c2", 40, 10, 8), result("naive", 40, 10, 0), result("naive", 10, 0, 9)]).split(
        "\n"
    )
    assert lines[2:] == [
        "| naive | 10 | 0 | 9/10 | 60% to 98% | 9/10 |",
        "| naive | 40 | 10 | 0/10 | 0% to 28% | 0/10 |",
        "| a2c2 | 40 | 10 | 8/10 | 49% to 94% | 8/10 |",
    ]
