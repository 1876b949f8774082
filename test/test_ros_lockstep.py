"""The three real nodes over DDS execute what the evaluation in one process executes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ros_system import Peer, System

pytest.importorskip("rclpy")

from a2c2_ros.msg import ControlStep, PlannerTiming

from a2c2_ros.nodes.runtime import reliable_qos

TICKS = 60
TASK, STATE, SEED = 2, 3, 5
EXECUTION_HORIZON, DELAY, JITTER = 12, 5, 3

IN_PROCESS = f"""
import json, sys
import numpy as np
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.paths import model_path
from a2c2_ros.policies.base import PolicyOptions
from a2c2_ros.policies.registry import load_policy
from a2c2_ros.sim.libero_env import LiberoEnv

robot = load_profile("libero").robot
config = PlannerConfig(execution_horizon={EXECUTION_HORIZON}, inference_delay={DELAY},
                       inference_delay_jitter={JITTER}, seed={SEED})
policy = load_policy("flow", config.policy_path, PolicyOptions(threads=1))
controller = ControllerConfig(lockstep=True)  # no deadline of the head, as in the nodes
loop = CorrectionLoop(controller, robot, OnnxHead(model_path(controller.correction__model_path)))
rows = []
with LiberoEnv({TASK}) as env:
    run_episode(env, robot, policy, loop, config, initial_state={STATE}, seed={SEED}, max_steps={TICKS},
                on_step=lambda s, o: rows.append([s.command.tolist(), s.slot, s.state, s.residual.tolist()]))
json.dump(rows, open(sys.argv[1], "w"))
"""


@pytest.mark.timeout(280)
def test_nodes_over_dds_execute_what_the_evaluation_executes(tmp_path):
    reference = subprocess.Popen([sys.executable, "-c", IN_PROCESS, str(tmp_path / "rows.json")])
    system = System(tmp_path)
    peer = Peer(system)
    steps: list[ControlStep] = []
    peer.node.create_subscription(ControlStep, "control_step", steps.append, reliable_qos(1000))
    timings: list[PlannerTiming] = []
    peer.node.create_subscription(PlannerTiming, "planner_timing", timings.append, reliable_qos(100))
    mode = dict(lockstep=True, use_sim_time=True)
    try:
        system.start("libero_sim", task=TASK, episodes=1, initial_state=STATE, seed=SEED, max_steps=TICKS)
        system.start(
            "chunk_planner",
            execution_horizon=EXECUTION_HORIZON,
            inference_delay=DELAY,
            inference_delay_jitter=JITTER,
            seed=SEED,
            **mode,
        )
        system.start("correction_controller", **mode)

        peer.spin_until(lambda: len(steps) >= TICKS, f"{TICKS} control steps", timeout_s=200)
        codes = system.close()
        assert reference.wait(timeout=100) == 0
    finally:
        system.close()
        reference.kill()
        peer.close()
    delays = [t.delay_steps for t in timings]
    assert delays[0] == 0 and len(delays) >= 4, "the robot waits for its first chunk"
    assert all(DELAY - JITTER <= d <= DELAY + JITTER for d in delays[1:]) and len(set(delays[1:])) > 1
    last = timings[-1]
    assert (last.window_chunks, last.effective_delay_steps) == (len(delays) - 1, max(delays))
    assert (last.execution_horizon_min, last.execution_horizon_max) == (max(delays), 50 - max(delays))
    assert last.execution_horizon_proposed == EXECUTION_HORIZON and last.transport_time_s == 0.0 < last.inference_time_s
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == TICKS
    assert len({tuple(s.chunk_stamp.sec.__repr__() + str(s.chunk_stamp.nanosec)) for s in steps}) >= 4, "several chunks"
    for step, (command, slot, state, residual) in zip(steps, rows, strict=True):
        assert (step.slot, step.state) == (slot, state), f"tick {step.tick}"
        assert np.abs(np.array(step.command) - command).max() <= 1e-6, f"tick {step.tick}"
        assert np.abs(np.array(step.residual) - residual).max() <= 1e-6, f"tick {step.tick}"
    assert any(np.abs(np.array(s.residual)).max() > 1e-3 for s in steps), "the head does something"
    assert codes == {"libero_sim": 0, "chunk_planner": 0, "correction_controller": 0}
