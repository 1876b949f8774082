"""The description of a system: arguments, parameters, and that the launch file starts the same."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.launching import LIBERO_SIM_ARGUMENTS, libero_sim, parse_arguments
from a2c2_ros.paths import share_directory

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


def test_the_recorder_runs_only_on_request():
    assert "episode_recorder" not in [p.name for p in system().processes]
    assert "episode_recorder" in [p.name for p in system(record="true").processes]


def test_a_text_stays_a_text_for_ros():
    monitor = system(out="/tmp/123").processes[-1]
    assert {'out:="/tmp/123"', "lockstep:=true", "task:=0"} <= set(monitor.ros_arguments())


def sim_config():
    pytest.importorskip("a2c2_ros.msg")
    from a2c2_ros.nodes.libero_sim import SimConfig

    return SimConfig()


@pytest.mark.parametrize(
    ("name", "make"),
    [("chunk_planner", PlannerConfig), ("correction_controller", ControllerConfig), ("libero_sim", sim_config)],
)
def test_parameter_files_list_every_parameter_with_its_default(name, make):
    config = make()
    defaults = {config.ros_name(field): value for field, value in vars(config).items()}
    assert file_parameters(ROOT / "config" / f"{name}.yaml") == defaults


def launch_description():
    spec = importlib.util.spec_from_file_location("libero_sim_launch", ROOT / "launch" / "libero_sim.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


def test_the_launch_file_starts_what_the_bring_up_starts():
    pytest.importorskip("launch_ros")
    from launch import LaunchContext
    from launch.actions import DeclareLaunchArgument, OpaqueFunction
    from launch.utilities import perform_substitutions
    from launch_ros.actions import Node

    given = {"task": "4", "correction": "false", "record": "true", "out": "/tmp/parity"}
    context = LaunchContext()
    context.launch_configurations.update(given)
    entities = launch_description().entities
    declared = [entity for entity in entities if isinstance(entity, DeclareLaunchArgument)]
    assert [argument.name for argument in declared] == [argument.name for argument in LIBERO_SIM_ARGUMENTS]
    for argument in declared:
        argument.visit(context)
    (opaque,) = [entity for entity in entities if isinstance(entity, OpaqueFunction)]
    nodes = [action for action in opaque.execute(context) if isinstance(action, Node)]

    expected = system(**given).processes
    assert len(nodes) == len(expected)
    for node, process in zip(nodes, expected, strict=True):
        node._perform_substitutions(context)
        command = [perform_substitutions(context, words) for words in node.cmd]
        assert Path(command[0]).name == process.executable
        assert f"__node:={process.name}" in command
        files = [Path(after) for word, after in zip(command, command[1:], strict=False) if word == "--params-file"]
        assert tuple(files[:-1]) == process.parameter_files
        overrides = yaml.safe_load(files[-1].read_text())
        assert flatten(next(iter(overrides.values()))["ros__parameters"]) == process.parameters
