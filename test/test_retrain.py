"""Training on from a head, and the command that closes the loop."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("lerobot")
torch = pytest.importorskip("torch")

from bag_writer import make_head, record, write_profile

from a2c2_ros.core.errors import A2C2Error, ConfigError, SimulationError
from a2c2_ros.evaluation import libero as evaluation
from a2c2_ros.heads.base import load_head, manifest_of, save_head
from a2c2_ros.heads.export import to_onnx
from a2c2_ros.heads.onnx_head import OnnxHead, save_graph
from a2c2_ros.launching import SYSTEMS, parse_arguments
from a2c2_ros.sim.disturbance import Disturbed
from a2c2_ros.training import from_bag, libero, retrain, train_head
from a2c2_ros.training.train_head import check_free


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A head, and a data set of a run with it."""
    folder = tmp_path_factory.mktemp("recorded")
    head = make_head()
    head.action_mean.fill_(0.25)
    save_head(head, folder / "head.safetensors")
    save_graph(to_onnx(head), manifest_of(head), folder / "head.onnx")
    record(folder / "bag", write_profile(folder / "arm.yaml"), folder / "head.onnx")
    from_bag.build([folder / "bag"] * 2, folder / "data", "expert", parity=False)
    return folder


def command(folder, out, *options):
    return [*("--init", str(folder / "head.safetensors"), "--data", str(folder / "data"), "--out", str(out))] + [
        *("--steps", "3", "--batch-size", "4", "--draws", "2", "--no-bfloat16", "--holdout", "0.3", *options)
    ]


def test_a_trained_head_is_trained_on_and_exported(recorded, tmp_path, capsys):
    torch.set_num_threads(1)
    out = tmp_path / "head"
    assert train_head.main(command(recorded, out)) == 0
    before, after = load_head(recorded / "head.safetensors"), load_head(out / "head.safetensors")
    statistics = [name for name, _ in before.named_buffers() if name.endswith(("_mean", "_std"))]
    assert statistics and all(torch.equal(before.get_buffer(n), after.get_buffer(n)) for n in statistics)
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(changed)
    manifest = OnnxHead(out / "head.onnx").manifest
    assert 0.0 < manifest.parity_max_abs_error < 1e-4 and manifest.policy_id == before.config.policy_id
    told = json.loads((out / "training.json").read_text())
    assert told["hyper_parameters"]["learning_rate"] == pytest.approx(1e-4) and told["init_sha256"]

    assert train_head.main(command(recorded, out)) == 2
    assert "has head.safetensors and head.onnx already" in capsys.readouterr().err
    (out / "head.onnx").unlink()  # as if it was killed before the export
    assert train_head.main(command(recorded, out)) == 0 and (out / "head.onnx").exists()


def test_a_head_that_does_not_fit_is_refused_with_the_difference(recorded, tmp_path, capsys):
    assert train_head.main(command(recorded, tmp_path / "a", "--reactive", "--architecture", "mlp")) == 2
    error = capsys.readouterr().err
    assert "architecture: head 'compact', here 'mlp'" in error and "reactive: head False, here True" in error
    other = load_head(recorded / "head.safetensors")
    other.config = other.config.__class__(**{**vars(other.config), "policy_id": "other-1"})
    save_head(other, tmp_path / "head.safetensors")
    (tmp_path / "data").symlink_to(recorded / "data")
    assert train_head.main(command(tmp_path, tmp_path / "b")) == 2
    assert "other-1" in capsys.readouterr().err
    assert train_head.main(["--data", "x", "--out", str(tmp_path / "c"), "--steps", "1"]) == 2
    assert "--policy is not given" in capsys.readouterr().err


def test_a_head_is_not_overwritten(tmp_path):
    check_free(tmp_path)
    (tmp_path / "head.safetensors").touch()
    with pytest.raises(ConfigError, match="already"):
        check_free(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest.safetensors").touch()
    check_free(tmp_path)  # killed before its record
    (tmp_path / "training.json").touch()
    with pytest.raises(ConfigError, match="already"):
        check_free(tmp_path)
    check_free(tmp_path, exports=True)  # killed before the export


class Still:
    """An environment that only tells what it is asked to execute."""

    motion = "none"

    def reset(self, initial_state, seed):
        return {"initial_state": initial_state}

    def step(self, action, look=True):
        self.action = action
        return {}, False


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_pushes_are_seeded_and_leave_the_gripper_alone(strength):
    def executed(seed):
        env = Disturbed(Still(), strength)
        assert env.reset(3, seed) == {"initial_state": 3} and env.motion == "none"
        return np.array([(env.step(np.full(7, 0.1)), env.action)[1] for _ in range(200)])

    first = executed(1)
    assert np.array_equal(first, executed(1)) and (first[:, 6] == 0.1).all() and np.abs(first).max() <= 1.0
    pushed = (first != 0.1).any(axis=1)
    assert pushed.any() == (strength > 0.0) and pushed.mean() < 0.5
    assert strength == 0.0 or not np.array_equal(first, executed(2))
    with pytest.raises(SimulationError, match="disturbance is 1.5"):
        Disturbed(Still(), 1.5)


def test_the_steps_are_commands_that_exist(tmp_path, monkeypatch):
    argv = ["--out", str(tmp_path / "out"), "--tasks", "0,3", "--disturbance", "0.5", "--steps", "7", "--old", "none"]
    args = retrain.parser().parse_args(argv)
    steps = {step.name: step for step in retrain.commands(args, argv)}
    rounds = [f"{name}_{number}" for number in (1, 2) for name in ("record", "convert", "train", "after")]
    assert list(steps) == ["before", *rounds, "swap", "static_before", "static_after"]
    names = ("before", "after_1", "after_2", "static_before", "static_after")
    evaluated = {name: evaluation.parser().parse_args(steps[name].command[1:]) for name in names}
    assert [e.variant for e in evaluated.values()] == ["swap+0.5"] * 3 + ["static"] * 2
    first, second, third, *unchanged = (e.head for e in evaluated.values())
    assert len({first, second, third}) == 3 and unchanged == [first, third]
    converted = from_bag.parser().parse_args(steps["convert_1"].command[1:])
    assert [bag.parent.name for bag in converted.bags] == ["task00", "task03"] and converted.label == "expert"
    trained = [train_head.parser().parse_known_args(steps[f"train_{n}"].command[1:])[0] for n in (1, 2)]
    data = [tmp_path / "out" / f"round{n}" / "data" for n in (1, 2)]
    assert trained[0].data == data[:1] and trained[1].data == data, "there is no old data"
    assert trained[0].init.name == "head.safetensors" and trained[1].init.parent == trained[0].out
    assert [each.out / "head.onnx" for each in trained] == [Path(second), Path(third)]
    table, _ = SYSTEMS["libero_sim"]
    values = {}
    for key in itertools.product((1, 2), (3, 4)):
        texts = retrain.arguments_of(args, *key, tmp_path, record="true", expert="true")[1:]
        values[key] = parse_arguments(table, dict(text.split(":=", 1) for text in texts))
    value = values[1, 3]
    assert value["expert"] and value["initial_state"] == -2 and value["disturbance"] == 0.5
    assert value["suite"] == "libero_spatial_swap" and value["motion"] == "none"
    assert Path(values[2, 3]["head"]) == Path(second), "a round records with the head of the last one"
    seeds = sorted(value["seed"] for value in values.values())
    assert seeds[0] >= retrain.FIRST_SEED, "not the placements of an evaluation"
    assert all(b - a >= retrain.MAX_EPISODES for a, b in itertools.pairwise(seeds)), "each placement is recorded once"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (("--disturbance", "2"), "variant is 'swap+2', allowed is a strength of 0 to 1"),
        (("--rounds", "policy,person"), "--rounds is 'policy,person', allowed is a list of up to 10 of"),
        (("--episodes", "1001"), "--episodes is 1001, allowed is 1 to 1000"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(given, error, tmp_path, capsys):
    assert retrain.main(["--out", str(tmp_path / "out"), *given]) == 2
    assert error in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "steps", "takeover"), [(1, 120, -1), (2, 160, 40)])
def test_a_person_takes_over_in_the_rounds_that_say_so(number, steps, takeover, tmp_path, monkeypatch):
    argv = ["--out", str(tmp_path), "--internal-round", str(number)]
    given = []
    monkeypatch.setattr(retrain.bringup, "main", lambda texts: given.extend(texts) or 1)
    monkeypatch.setenv("ROS_DOMAIN_ID", "7")
    with pytest.raises(A2C2Error, match="task 5 ended with 1"):
        retrain.record_task(retrain.parser().parse_args(argv), 5)
    table, _ = SYSTEMS["libero_sim"]
    values = parse_arguments(table, dict(text.split(":=", 1) for text in given[1:]))
    assert (values["max_steps"], values["takeover_after_steps"]) == (steps, takeover) and values["record"]


def test_what_is_done_is_kept_and_the_result_has_both_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--tasks", "0", "--evaluations", "4", "--rounds", "takeover", "--old", "none"]
    total = {"wilson_95": [0.1, 0.9], "episodes": 4}

    def evaluated(successes):
        rollouts = [{"task": 0, "initial_state": i, "success": i < successes, "error": None} for i in range(4)]
        cell = {"cell": "a2c2", "variant": "drift", "execution_horizon": 40, "inference_delay": 10}
        cell |= {"head_sha256": "", "failures": {}}
        return cell | {"total": total | {"successes": successes}, "per_task": {}, "rollouts": rollouts}

    content = {
        "before": evaluated(1),
        "after_1": evaluated(3),
        "static_before": evaluated(4),
        "static_after": evaluated(3),
        "record_1": [{"result": "success"}, {"result": "failure"}],
        "train_1": {
            "steps": 1,
            "seconds": 1,
            "data_sets": [],
            "hyper_parameters": {},
            "history": [{"error_data0": 0.5}],
        },
        "swap": {"while_loading": {"missed_ticks": 0}},
    }
    ran = []

    def run(command):
        steps = retrain.commands(retrain.parser().parse_args(argv), argv)
        step = next(step for step in steps if step.command[1:] == tuple(command[3:]))
        ran.append(name := step.name)
        if name == "swap" and ran.count("swap") == 1:
            return 1
        step.product.parent.mkdir(parents=True, exist_ok=True)
        step.product.write_text(json.dumps(content.get(name, {})))
        if name == "train_1":
            (step.product.parent / "training.json").write_text(json.dumps(content[name]))
        if name == "convert_1":
            numbers = dict.fromkeys(("frames", "seconds_recorded", "seconds", "times_real_time"), 1)
            bags = [{"parity": {"compared": 9, "differing": []}}]
            (step.product.parents[1] / "from_bag.json").write_text(json.dumps(numbers | {"bags": bags}))
        return 0

    monkeypatch.setattr(libero, "run_job", run)
    assert retrain.main(argv) == 1 and ran[-1] == "swap"
    assert retrain.main(argv) == 0 and ran.count("before") == 1
    assert ran[-3:] == ["swap", "static_before", "static_after"]
    result = json.loads(Path("results/retrain.json").read_text())
    (only,) = result["rounds"]
    assert only["difference"]["points"] == 50.0 and only["recorded"] == {
        "acting": "takeover",
        "episodes": 2,
        "successes": 1,
    }
    assert only["training"]["history"] == [{"error_data0": 0.5}]  # how far the old data is forgotten
    assert result["static"]["difference"]["points"] == -25.0  # and what it costs
    assert not result["with_old_data"] and "alone" in capsys.readouterr().out
    assert retrain.main([*argv, "--evaluations", "5"]) == 2
    assert "evaluations: there 4, here 5" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "policy_facts", lambda path: {"policy_id": "other-1"})
        assert retrain.main(argv) == 2
    assert "policy_id: there 'flow_libero_spatial-" in (error := capsys.readouterr().err) and "here 'other-1'" in error
    Path("none/meta").mkdir(parents=True)
    Path("none/meta/info.json").touch()
    assert retrain.main(argv) == 2
    assert "old_data: there 'none', here '" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--task", "--round", "--round=3", "--episode"])
def test_an_option_that_is_almost_one_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retrain, "commands", lambda args, argv: [])
    monkeypatch.setattr(retrain, "report", lambda args: None)
    with pytest.raises(SystemExit, match="2"):
        retrain.main([option, "3"])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err
