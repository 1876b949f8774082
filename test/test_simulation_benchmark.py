"""The comparison of control steps: what is made of the durations, and that a failure is one."""

import json

import pytest

pytest.importorskip("mujoco")

from a2c2_ros.benchmark import simulation


def test_ratios_are_of_mean_durations_of_all_rounds(monkeypatch, tmp_path, capsys):
    durations = {"stock": [100.0, 140.0], "full meshes": [80.0], "ours": [20.0, 40.0], "ours, no look": [10.0]}
    monkeypatch.setattr(simulation, "run", lambda way, task, steps: durations[way])
    out = tmp_path / "new" / "simulation.json"
    assert simulation.main(["--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    ways = {way["way"]: way for way in result["ways"]}
    assert ways["stock"]["speedup"] == 1.0 and ways["stock"]["n"] == 4
    assert ways["ours"]["speedup"] == 4.0 and ways["ours"]["steps_per_second"] == pytest.approx(33.3)
    assert result["machine"] and "4.0x" in capsys.readouterr().out


def test_a_run_that_fails_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(simulation.sys, "executable", "false")
    out = tmp_path / "simulation.json"
    assert simulation.main(["--out", str(out)]) == 2
    assert "stock ended with 1" in capsys.readouterr().err and not out.exists()
