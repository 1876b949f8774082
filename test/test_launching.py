"""The description of a system: arguments, parameters, and that the launch file starts the same."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from evaluation_fakes import write_profile

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.launching import (
    KINETIX_SIM_ARGUMENTS,
    LIBERO_SIM_ARGUMENTS,
    kinetix_sim,
    libero_sim,
    parse_arguments,
)
from a2c2_ros.paths import share_directory
from a2c2_ros.sim.parameters import KinetixSimConfig, LiberoSimConfig

ROOT = share_directory()


def system(**given):
    return libero_sim(parse_arguments(LIBERO_SIM_ARGUMENTS, given))


def flatten(tree, prefix=""):
    values = {}
    for name, value in tree.items():
        values |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def file_parameters(path):
    return flatten(yaml.safe_load(Path(path).read_text())["/**"]["ros__parameters"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "11"}, ["task", "'11'", "[0, 9]"]),
        ({"task": "one"}, ["task", "'one'", "int"]),
        ({"episodes": "2.5"}, ["episodes", "'2.5'", "int"]),
        ({"correction": "yes"}, ["correction", "'yes'", "true or false"]),
        ({"tusk": "1"}, ["tusk", "task, episodes"]),
        ({"execution_horizon": "45"}, ["e=45", "d=10", "H=50"]),
        ({"inference_delay": "2", "inference_delay_jitter": "3"}, ["inference_delay_jitter", "3", "2"]),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_allowed(given, words):
    with pytest.raises(ConfigError) as error:
        system(**given)
    assert [word for word in words if word not in str(error.value)] == []


def test_arguments_reach_the_nodes_that_they_are_for():
    run = system(task="3", seed="7", inference_delay="4", correction="false", lockstep="false", out="somewhere")
    nodes = {process.name: process.parameters for process in run.processes}
    assert (nodes["libero_sim"]["task"], nodes["libero_sim"]["seed"], nodes["chunk_planner"]["seed"]) == (3, 7, 7)
    assert nodes["chunk_planner"]["inference_delay"] == 4
    assert nodes["correction_controller"]["correction.enabled"] is False
    assert all(nodes[name]["use_sim_time"] is False for name in nodes if name != "libero_sim")
    assert nodes["episode_monitor"]["out"] == str(Path("somewhere").resolve()) == str(run.out)
    assert set(nodes["episode_monitor"]) >= {a.name for a in LIBERO_SIM_ARGUMENTS}


def another_text(argument):
    """A value of an argument that is not its default."""
    texts = argument.choices or [str(type(argument.default)(limit)) for limit in (argument.low, argument.high)]
    return next(text for text in texts if text != argument.default_text)


def test_every_argument_that_is_a_parameter_of_the_simulator_reaches_it():
    fields = {field.name for field in dataclasses.fields(LiberoSimConfig)}
    shared = [argument for argument in LIBERO_SIM_ARGUMENTS if argument.name in fields]
    assert {"task", "motion", "takeover_after_steps"} < {argument.name for argument in shared}
    given = {argument.name: another_text(argument) for argument in shared}
    simulator = system(**given).processes[0]
    assert simulator.name == "libero_sim"
    assert simulator.parameters == {argument.name: argument.parse(given[argument.name]) for argument in shared}


def test_a_head_runs_where_it_is_told_to():
    nodes = {process.name: process.parameters for process in system(head_device="cuda").processes}
    assert nodes["correction_controller"]["correction.device"] == "cuda"


def test_a_head_replaces_that_of_the_parameter_file():
    nodes = {process.name: process.parameters for process in system(head="mine.onnx", max_steps="9").processes}
    assert nodes["correction_controller"]["correction.model_path"] == "mine.onnx"
    assert nodes["libero_sim"]["max_steps"] == 9
    nodes = {process.name: process.parameters for process in system().processes}
    assert "correction.model_path" not in nodes["correction_controller"]
    nodes = {process.name: process.parameters for process in system(head="none", correction="false").processes}
    assert nodes["correction_controller"]["correction.model_path"] == ""


def test_the_recorder_runs_only_on_request():
    assert "episode_recorder" not in [p.name for p in system().processes]
    assert "episode_recorder" in [p.name for p in system(record="true").processes]


def test_a_text_stays_a_text_for_ros():
    monitor = system(out="/tmp/123").processes[-1]
    assert {'out:="/tmp/123"', "lockstep:=true", "task:=0"} <= set(monitor.ros_arguments())


def test_a_kinetix_level_runs_with_what_was_trained_for_it(tmp_path):
    level, models = tmp_path / "lander.json", tmp_path / "models"
    given = {"level": str(level), "models": str(models), "inference_delay": "3", "correction": "false"}
    models.mkdir()
    level.touch()
    with pytest.raises(ConfigError, match=r"robot\.yaml is not a file"):
        kinetix_sim(parse_arguments(KINETIX_SIM_ARGUMENTS, given))
    write_profile(models / "robot.yaml", ("x",), ("motor0",), (-1.0,), 60)
    run = kinetix_sim(parse_arguments(KINETIX_SIM_ARGUMENTS, given))
    nodes = {process.name: process.parameters for process in run.processes}
    assert nodes["kinetix_sim"]["level"] == str(level)
    assert {node["robot"] for node in nodes.values()} == {str(models / "robot.yaml")}
    assert nodes["chunk_planner"]["policy_path"] == str(models / "flow_lander")
    assert nodes["chunk_planner"]["inference_delay"] == 3 and nodes["chunk_planner"]["control_rate_hz"] == 60.0
    assert nodes["correction_controller"]["correction.model_path"] == str(models / "mlp_lander" / "head.onnx")
    with pytest.raises(ConfigError, match="H=8"):
        kinetix_sim(parse_arguments(KINETIX_SIM_ARGUMENTS, given | {"execution_horizon": "7"}))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("chunk_planner", PlannerConfig),
        ("correction_controller", ControllerConfig),
        ("libero_sim", LiberoSimConfig),
        ("kinetix_sim", KinetixSimConfig),
    ],
)
def test_parameter_files_list_every_parameter_with_its_default(name, make):
    config = make()
    defaults = {config.ros_name(field): value for field, value in vars(config).items()}
    assert file_parameters(ROOT / "config" / f"{name}.yaml") == defaults


NODE = """#!{python} -S
import json, os, pathlib, sys, time
folder, words = pathlib.Path("{folder}"), sys.argv
files = [after for word, after in zip(words, words[1:]) if word == "--params-file"]
texts = [pathlib.Path(file).read_text() for file in files]
discovery = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE")
report = {{"words": words, "files": files, "texts": texts, "discovery": discovery}}
(folder / "new").mkdir(exist_ok=True)
new = folder / "new" / pathlib.Path(words[0]).name
new.write_text(json.dumps(report))
new.rename(folder / f"{{new.name}}.json")
while new.name != "episode_monitor" or len(list(folder.glob("*.json"))) < 5:
    time.sleep(0.05)
"""


def test_the_launch_file_starts_what_the_bring_up_starts(tmp_path, monkeypatch):
    pytest.importorskip("launch_ros")
    from launch import LaunchDescription, LaunchService
    from launch.actions import IncludeLaunchDescription
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    expected = system(task="4", correction="false", record="true", out=str(tmp_path / "run")).processes
    (tmp_path / "share/ament_index/resource_index/packages").mkdir(parents=True)
    (tmp_path / "share/ament_index/resource_index/packages/a2c2_ros").touch()
    (tmp_path / "lib/a2c2_ros").mkdir(parents=True)
    for process in expected:
        path = tmp_path / "lib/a2c2_ros" / process.executable
        path.write_text(NODE.format(python=sys.executable, folder=tmp_path))
        path.chmod(0o755)
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)

    source = PythonLaunchDescriptionSource(str(ROOT / "launch" / "libero_sim.launch.py"))
    given = {"task": "4", "correction": "false", "record": "true", "out": str(tmp_path / "run")}
    service = LaunchService(noninteractive=True)
    service.include_launch_description(
        LaunchDescription([IncludeLaunchDescription(source, launch_arguments=given.items())])
    )
    assert service.run() == 0
    reports = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(reports) == {process.executable for process in expected}
    for process in expected:
        report = reports[process.executable]
        assert f"__node:={process.name}" in report["words"]
        assert report["discovery"] == "LOCALHOST"
        assert tuple(map(Path, report["files"][:-1])) == process.parameter_files
        (overrides,) = yaml.safe_load(report["texts"][-1]).values()
        assert flatten(overrides["ros__parameters"]) == process.parameters


ON_A_ROBOT = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"{name} is not in the lock file of a robot")

absent = set(sys.argv[1].split())
sys.meta_path.insert(0, Absent())
nodes = "correction_controller chunk_planner episode_recorder episode_monitor operate".split()
for name in [f"nodes.{n}" for n in nodes] + ["policies.remote", "recording.repair", "recording.topics", "bringup"]:
    importlib.import_module(f"a2c2_ros.{name}")

from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.paths import model_path

OnnxHead(model_path("compact_libero_spatial") / "head.onnx").warm_up()
"""


def locked(name):
    lines = (Path(__file__).resolve().parents[1] / name).read_text().splitlines()
    return {line.split("==")[0] for line in lines if "==" in line}


def test_a_robot_needs_no_more_than_its_lock_file():
    pytest.importorskip("a2c2_ros.msg")
    robot, everything = locked("requirements-robot.lock"), locked("requirements.lock")
    assert robot < everything and {"torch", "mujoco", "lerobot"} <= everything - robot
    owners = {m: {d.lower().replace("_", "-") for d in names} for m, names in packages_distributions().items()}
    absent = [module for module, names in owners.items() if names & everything and not names & robot]
    assert {"torch", "mujoco", "lerobot"} <= set(absent)
    done = subprocess.run([sys.executable, "-c", ON_A_ROBOT, " ".join(absent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
