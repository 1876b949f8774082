"""A policy folder and a head file that only say whose they are, and workers without a simulator."""

import json
import threading
import time
from pathlib import Path

import onnx
import yaml

from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.evaluation.worker import WorkerError
from a2c2_ros.heads.onnx_head import save_graph


def write_profile(path, state_names, action_names, lower, rate_hz):
    """Robot profile of a simulated thing whose state is its joints' positions, like that of a Kinetix level."""
    profile = {
        "name": "point",
        "simulated": True,
        "joint_states": {"topic": "joint_states", "names": list(state_names)},
        "state": "joint_position",
        "action": {"space": "kinetix", "names": list(action_names)},
        "rates": {"control_rate_hz": rate_hz},
        "command": {"topic": "joint_command", "kind": "joint_state"},
        "limits": {"lower": list(lower), "upper": [1.0] * len(action_names)},
        "hold": {"kind": "delta"},
        "max_age_s": {"joint_states": 0.1},
    }
    path.write_text(yaml.safe_dump(profile))


def write_policy(folder, policy_id, horizon=50, prefix_slots=0):
    folder.mkdir(exist_ok=True)
    facts = {"policy_id": policy_id, "horizon": horizon, "prefix_slots": prefix_slots}
    (folder / "config.json").write_text(json.dumps(facts))


def write_head(path, policy_id, parameters=0):
    manifest = HeadManifest(
        architecture="test",
        policy_id=policy_id,
        horizon=50,
        step_ns=50_000_000,
        action_names=("x",),
        action_space="test",
        cameras={},
        state_names=(),
        latent_size=0,
        language_size=0,
        parameters=parameters,
    )
    save_graph(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), manifest, path)


def fake_record(cell, task, number):
    """Success depends on everything that identifies an episode but the time; one in seven raises."""
    seen = f"{cell.label}{cell.execution_horizon}{cell.inference_delay}{Path(cell.policy).name}"
    value = sum(map(ord, seen)) + 13 * task + 7 * number
    if value % 7 == 0:
        return {"error": f"SimulationError: {task} {number}"}
    record = {"success": value % 3 > 0, "steps": 10, "seconds": 0.5, "inference_ms": [1.0], "head_ms": [], "states": {}}
    return {"error": None, **record}


class FakeWorkers:
    """Starts workers that answer with ``fake_record`` and keeps what they were asked for."""

    def __init__(self, delay_s=0.0, dies=lambda cell, task, number: False):
        self.delay_s, self.dies = delay_s, dies
        self.ran, self.started, self.alive, self.most_alive = [], [], 0, 0
        self.lock = threading.Lock()

    def __call__(self, task, variant):
        with self.lock:
            self.started.append((task, variant))
            self.alive += 1
            self.most_alive = max(self.alive, self.most_alive)
        return FakeWorker(self, task, variant)


class FakeWorker:
    def __init__(self, pool, task, variant):
        self.pool, self.task, self.variant, self.open = pool, task, variant, True
        self.running = False

    def run(self, cell, number):
        assert self.open and not self.running and cell.variant == self.variant
        self.running = True
        time.sleep(self.pool.delay_s)
        self.running = False
        if self.pool.dies(cell, self.task, number):
            raise WorkerError(f"{cell.name} task {self.task} died")
        with self.pool.lock:
            self.pool.ran.append((cell.name, self.task, number))
        return fake_record(cell, self.task, number)

    def close(self):
        with self.pool.lock:
            self.pool.alive -= self.open
        self.open = False
