"""The plan of all trainings: order, commands, what is done and what is not."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import yaml
from test_flow import small_network

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation.grid import default_grid, load_grid
from a2c2_ros.paths import share_directory
from a2c2_ros.policies.flow import load_network, save_network
from a2c2_ros.training import (
    cache_chunks,
    demonstrations,
    libero,
    on_policy,
    smolvla,
    temperature,
    train_head,
    train_policy,
)

PLAN = {
    "data": "data/demos",
    "models": "models",
    "records": "records",
    "demonstrations": {"episodes-per-task": 2},
    "policies": {"base": {"steps": 1}, "other": {"steps": 1, "without-images": True, "bfloat16": False}},
    "heads": {
        "late": {"steps": 1, "visited": ["seen"], "slots": [2, 5]},
        "first": {"steps": 1, "policy": "other"},
        "big": {"steps": 1, "architecture": "transformer"},
    },
    "visited": {"seen": {"head": "first", "e": 4, "d": 1}},
}


@pytest.fixture
def plan_file(tmp_path):
    def write(**changes):
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
        return path

    return write


def test_every_step_comes_after_those_that_it_needs():
    names = [step.name for step in libero.steps(PLAN, 2)]
    assert names == [
        "demonstrations",
        *("base", "base: chunks", "other", "other: chunks"),
        *("first", "first: export", "seen", "late", "late: export"),
        *("big", "big: export"),
    ]


def test_commands_name_data_policy_and_options():
    commands = {step.name: " ".join(step.command) for step in libero.steps(PLAN, 2)}
    assert commands["other"] == (
        "training.train_policy --data data/demos --out models/other --workers 2 --steps 1 --without-images"
    )
    assert commands["late"] == (
        "training.train_head --data data/demos data/seen --policy models/base --out models/late --workers 2 --steps 1 "
        "--slots 2 5"
    )
    assert "--policy models/other --head models/first/head.onnx --out data/seen" in commands["seen"]
    assert "--workers 1" in commands["big"]


def test_a_policy_of_another_kind_has_its_trainer():
    plan = PLAN | {"policies": PLAN["policies"] | {"vla": {"kind": "smolvla", "size": "tiny"}}}
    commands = {step.name: " ".join(step.command) for step in libero.steps(plan, 2)}
    assert commands["vla"] == "training.smolvla --data data/demos --out models/vla --workers 2 --size tiny"
    assert commands["vla: chunks"].endswith("--policy models/vla --kind lerobot --views 1"), "it refuses workers"


def test_a_copy_with_another_temperature_is_made_and_has_chunks_of_its_own():
    copied = {"kind": "temperature", "policy": "base", "temperature": 1.0}
    plan = PLAN | {"policies": PLAN["policies"] | {"noisy": copied}}
    commands = {step.name: " ".join(step.command) for step in libero.steps(plan, 2)}
    assert commands["noisy"] == "training.temperature --policy models/base --temperature 1.0 --out models/noisy"
    assert commands["noisy: chunks"].endswith("--policy models/noisy --workers 2 --views 1")


def test_a_copy_has_the_weights_of_the_original_and_samples_otherwise(tmp_path, capsys):
    save_network(small_network(temperature=0.0), tmp_path / "base", "base")
    original = load_network(tmp_path / "base")
    (tmp_path / "base" / "training.json").write_text('{"policy_id": "base-1", "steps": 9}')
    arguments = ["--policy", str(tmp_path / "base"), "--out", str(tmp_path / "noisy"), "--temperature"]
    assert temperature.main([*arguments, "1.5"]) == 2 and "temperature is 1.5" in capsys.readouterr().err
    assert temperature.main([*arguments, "1"]) == 0
    copied = load_network(tmp_path / "noisy")
    assert copied.config.temperature == 1.0 and copied.config.policy_id.startswith("noisy-")
    assert all((value == copied.state_dict()[name]).all() for name, value in original.state_dict().items())
    record = json.loads((tmp_path / "noisy" / "training.json").read_text())
    assert (record["policy_id"], record["copy_of"]) == (copied.config.policy_id, original.config.policy_id)
    assert (record["temperature"], record["steps"]) == (1.0, 9)
    assert temperature.main([*arguments, "1"]) == 2, "it is kept"


def test_what_exists_is_kept_and_a_failure_ends_the_run(plan_file, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    products = {step.command: step.product for step in libero.steps(PLAN, 2)}
    ran, failing = [], {"other"}

    def run(command):
        module = tuple([command[2].removeprefix("a2c2_ros."), *command[3:]])
        product = products[module]
        ran.append(product)
        if product and product.parent.name in failing:
            return 3
        if product:
            product.parent.mkdir(parents=True, exist_ok=True)
            product.touch()
        return 0

    monkeypatch.setattr(libero, "run_job", run)
    arguments = ["--plan", str(plan_file()), "--workers", "2"]
    assert libero.main(arguments) == 3
    assert ran == [Path("data/demos/meta/info.json"), Path("models/base/training.json"), None, products_of("other")]
    assert "other ended with 3" in capsys.readouterr().err

    ran.clear()
    failing.clear()
    assert libero.main(arguments) == 0
    assert Path("data/demos/meta/info.json") not in ran and products_of("base") not in ran
    assert Path("models/late/head.onnx").exists()
    assert sorted(path.stem for path in Path("records").iterdir()) == ["base", "big", "first", "late", "other"]

    ran.clear()
    assert libero.main([*arguments, "--only", "first*"]) == 0
    assert ran == []
    assert libero.main([*arguments, "--list"]) == 0
    assert ran == [] and "done   late: export" in capsys.readouterr().out


def products_of(name: str) -> Path:
    return Path("models") / name / "training.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {"a": {"policy": "none"}}}, "a has the policy 'none'"),
        ({"heads": {"a": {"visited": ["none"]}}}, r"a has visited \['none'\]"),
        ({"visited": {"seen": {"head": "none"}}}, "seen has the head 'none'"),
        ({"policies": {"base": {"kind": "oracle"}}}, "base is of the kind 'oracle'.*smolvla"),
        ({"more": {}}, "needed are"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused(plan_file, changes, message):
    path = plan_file(**changes)
    with pytest.raises(ConfigError, match=message):
        libero.load_plan(path)
    assert libero.main(["--plan", str(path)]) == 2


def test_the_shipped_plan_is_accepted_by_the_commands():
    parsers = {
        "training.demonstrations": demonstrations.parser,
        "training.train_policy": train_policy.parser,
        "training.smolvla": smolvla.parser,
        "training.temperature": temperature.parser,
        "training.cache_chunks": cache_chunks.parser,
        "training.train_head": train_head.parser,
        "training.on_policy": on_policy.parser,
    }
    plan = libero.load_plan(share_directory() / "config" / libero.PLAN_FILE)
    for step in libero.steps(plan, 2):
        module, *arguments = step.command
        if module in parsers:
            parsers[module]().parse_args(arguments)


def test_the_shipped_grid_has_no_weights_that_nobody_trains():
    plan = libero.load_plan(share_directory() / "config" / libero.PLAN_FILE)
    grid = load_grid(default_grid())
    trained = {**plan["policies"], **plan["heads"]}
    for row in grid.rows:
        for path in filter(None, (row.policy, row.head)):
            assert Path(path.removesuffix("/head.onnx")).name in trained, row.label


def test_demonstrations_of_another_seed_are_not_continued(tmp_path, capsys):
    parts = tmp_path / "demos.parts"
    parts.mkdir()
    (parts / "settings.json").write_text('{"seed": 3}')
    assert demonstrations.main(["--out", str(tmp_path / "demos"), "--tasks", "0", "--seed", "4"]) == 2
    assert "seed: there 3, here 4" in capsys.readouterr().err
    assert [path.name for path in parts.iterdir()] == ["settings.json"]


@pytest.fixture
def smolvla_training(tmp_path, monkeypatch):
    """``main`` with these options; what is made by LeRobot and transformers is not."""
    data = SimpleNamespace(
        data_hash="hash", instructions=("open it",), episode=np.arange(2), split=lambda share: (np.arange(2), None)
    )
    monkeypatch.setattr(smolvla, "load_demonstrations", lambda path, cameras: data)
    monkeypatch.setattr(smolvla, "save_vlm", lambda folder, size, words: folder.mkdir())
    monkeypatch.setattr(smolvla, "run_job", lambda command, environment: 3)

    def run(*options):
        return smolvla.main(["--data", "demos", "--out", str(tmp_path / "out"), *options])

    return SimpleNamespace(run=run, data=data, vlm=tmp_path / "out" / "vlm")


def test_a_smolvla_is_not_trained_on_with_other_settings(smolvla_training, capsys):
    with pytest.raises(SystemExit, match="ended with 3"):
        smolvla_training.run()
    for name, value in (("size", "tiny"), ("batch-size", 8), ("learning-rate", 1.0), ("seed", 1), ("holdout", 0.5)):
        assert smolvla_training.run(f"--{name}", str(value)) == 2
        assert re.search(f"{name.replace('-', '_')}: there .*, here .*{value}", capsys.readouterr().err)
    smolvla_training.data.data_hash = "other"
    assert smolvla_training.run() == 2
    assert "data_hash: there 'hash', here 'other'" in capsys.readouterr().err
    smolvla_training.data.data_hash = "hash"
    with pytest.raises(SystemExit, match="ended with 3"):
        smolvla_training.run("--steps", "9")


def test_a_vlm_that_was_not_written_to_its_end_is_written_again(smolvla_training, monkeypatch):
    def killed(folder, size, words):
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smolvla, "save_vlm", killed)
        with pytest.raises(KeyboardInterrupt):
            smolvla_training.run()
    assert not smolvla_training.vlm.exists()
    with pytest.raises(SystemExit):
        smolvla_training.run()
    assert smolvla_training.vlm.is_dir()


MAIN = """
import importlib, sys
module, sys.executable, *arguments = sys.argv[1:]
importlib.import_module(f"a2c2_ros.training.{module}").main(arguments)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("module", ["demonstrations", "on_policy", "retrain"])
def test_jobs_end_with_their_command(tmp_path, module, number):
    """A restarted command would meet them at the same files."""
    job = tmp_path / "job"
    job.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/pid\nexec sleep 60\n")
    job.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps({"policy_id": "p", "horizon": 50}))
    for name in ("head.onnx", "head.safetensors"):
        (tmp_path / name).touch()
    arguments = [f"--out={tmp_path}/out", "--tasks=0"]
    arguments += {"on_policy": [f"--policy={tmp_path}"], "retrain": [f"--policy={tmp_path}", f"--head={tmp_path}"]}.get(
        module, []
    )
    command = [sys.executable, "-c", MAIN, module, str(job), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: (tmp_path / "pid").exists() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        assert process.wait(60) != 0
    child = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"

    def over() -> bool:
        try:
            return child.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    until(over)


def until(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
