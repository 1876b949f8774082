"""The bring-up as a supervisor of processes, with tiny stand-ins for the nodes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a2c2_ros import bringup
from a2c2_ros.core.errors import ConfigError

NODE = """
import pathlib, signal, subprocess, sys, time
folder, name, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def on_interrupt(*_):
    (folder / f"{name}.interrupted").touch()
    sys.exit(0)
signal.signal(signal.SIGINT, signal.SIG_IGN if behaviour.startswith("stubborn") else on_interrupt)
if behaviour == "stubborn to the end":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "parent":
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", deaf])
    (folder / f"{name}.child").write_text(str(child.pid))
(folder / f"{name}.ready").touch()
if behaviour.startswith("exit"):
    _, code, *awaited = behaviour.split()
    while len(list(folder.glob("*.ready"))) < int(sys.argv[4]) or not all((folder / file).exists() for file in awaited):
        time.sleep(0.01)
    sys.exit(int(code))
time.sleep(60)
"""
PATIENT = ((0.0, signal.SIGINT), (60.0, signal.SIGTERM), (120.0, signal.SIGKILL))


def commands(folder, **behaviours):
    return {
        name: [sys.executable, "-S", "-c", NODE, str(folder), name, behaviour, str(len(behaviours))]
        for name, behaviour in behaviours.items()
    }


def supervise(folder, escalation=PATIENT, **behaviours):
    return bringup.Supervisor(escalation).run(commands(folder, **behaviours), "monitor", os.environ)


def test_the_end_of_one_ends_all(tmp_path):
    assert supervise(tmp_path, sim="run", planner="run", monitor="exit 0") == 0
    assert {p.stem for p in tmp_path.glob("*.interrupted")} == {"sim", "planner"}


def test_a_clean_end_of_another_node_does_not_end_the_run(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(bringup, "_say", lambda text: said.append(text) or (tmp_path / "said").touch())
    assert supervise(tmp_path, sim="exit 0", planner="run", monitor="exit 0 said") == 0
    assert said == ["sim ended"]
    assert {p.stem for p in tmp_path.glob("*.interrupted")} == {"planner"}


@pytest.mark.parametrize("behaviours", [{"sim": "exit 3", "monitor": "run"}, {"sim": "run", "monitor": "exit 1"}])
def test_a_failure_ends_all_and_is_reported(tmp_path, behaviours, capfd):
    assert supervise(tmp_path, planner="run", **behaviours) == 1
    assert (tmp_path / "planner.interrupted").exists()
    assert "failed with exit code" in capfd.readouterr().err


def test_a_node_that_ignores_the_interrupt_is_terminated(tmp_path, capfd):
    soon = ((0.0, signal.SIGINT), (0.2, signal.SIGTERM), (60.0, signal.SIGKILL))
    assert supervise(tmp_path, soon, planner="stubborn", monitor="exit 0") == 0
    assert "SIGTERM" in capfd.readouterr().err


def test_a_node_that_ignores_everything_is_killed_and_counts_as_failed(tmp_path, capfd):
    soon = ((0.0, signal.SIGINT), (0.2, signal.SIGTERM), (0.4, signal.SIGKILL))
    assert supervise(tmp_path, soon, planner="stubborn to the end", monitor="exit 0") == 1
    assert "SIGKILL" in capfd.readouterr().err


def test_the_recorder_can_finish_its_bag_on_a_slow_disk():
    pytest.importorskip("rclpy")
    from a2c2_ros.nodes.episode_recorder import CLOSE_TIMEOUT_S

    (_, interrupt), (second_s, _), (kill_s, _) = bringup.ESCALATION
    assert interrupt == signal.SIGINT and CLOSE_TIMEOUT_S + 5.0 < second_s < kill_s


def test_what_a_node_left_behind_is_ended(tmp_path):
    assert supervise(tmp_path, sim="parent", monitor="exit 0") == 0
    child = Path("/proc") / (tmp_path / "sim.child").read_text()
    deadline_s = time.monotonic() + 5
    while child.exists() and "Z" not in child.joinpath("stat").read_text().split()[2]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A prefix whose executables are stand-ins: the monitor waits for the others, they wait for the interrupt."""
    folder = tmp_path / "lib" / "a2c2_ros"
    folder.mkdir(parents=True)
    for name in ("libero_sim", "chunk_planner", "correction_controller", "episode_monitor"):
        (folder / name).write_text(f"#!/bin/sh\necho \"$0 $ROS_DOMAIN_ID $@\" > {tmp_path}/{name}.txt\nexec sleep 60\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    monkeypatch.setenv("ROS_DOMAIN_ID", "7")
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_whole_command(installation, number):
    command = [sys.executable, "-m", "a2c2_ros.bringup", "libero_sim", "task:=1", f"out:={installation}/run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    deadline_s = time.monotonic() + 60
    while len(list(installation.glob("*.txt"))) < 4:
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "ROS_DOMAIN_ID=7" in errors and (installation / "run").is_dir()
    words = (installation / "libero_sim.txt").read_text().split()
    assert words[1] == "7" and {"__node:=libero_sim", "task:=1"} <= set(words)


def test_every_run_gets_a_domain_of_its_own(monkeypatch):
    monkeypatch.delenv("ROS_DOMAIN_ID", raising=False)
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)
    environments = [bringup.environment() for _ in range(20)]
    assert len({e["ROS_DOMAIN_ID"] for e in environments}) > 1
    assert all(e["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST" for e in environments)


def test_a_missing_executable_is_named(monkeypatch):
    monkeypatch.setenv("AMENT_PREFIX_PATH", "/nowhere")
    with pytest.raises(ConfigError, match="libero_sim.*nowhere"):
        bringup.find_executable("libero_sim")


@pytest.mark.parametrize("arguments", [["task:=11"], ["task"], ["tusk:=1"]])
def test_wrong_arguments_start_nothing(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        bringup.main(["libero_sim", *arguments])
    assert end.value.code == 2 and arguments[0].split(":=")[0] in capsys.readouterr().err


def test_the_arguments_are_listed(capsys):
    assert bringup.main(["libero_sim", "--show-args"]) == 0
    assert "execution_horizon:=40" in capsys.readouterr().out
