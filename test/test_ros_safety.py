"""The controller process: who may move the robot, what its diagnostics say, and what a clock that stops does."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

pytest.importorskip("rclpy")

from a2c2_ros.msg import ControlConfiguration, ControlStep
from diagnostic_msgs.msg import DiagnosticArray
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import SetBool

from a2c2_ros.core.safety import Reason
from a2c2_ros.faults import heads
from a2c2_ros.nodes.conversions import array_to_joint_state, to_ns, to_time
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos
from a2c2_ros.sim import conventions


def enable(bench, value: bool) -> SetBool.Response:
    client = bench.node.create_client(SetBool, "correction_controller/enable")
    bench.spin_until(client.service_is_ready, "service enable")
    return bench.ask(lambda: client.call_async(SetBool.Request(data=value)), "answer of enable")


@pytest.mark.timeout(150)
def test_enable_emergency_stop_and_diagnostics(bench, manifest):
    bench.system.start("correction_controller", start_state="disabled", halt_steps=3)
    diagnostics = []
    bench.node.create_subscription(DiagnosticArray, "/diagnostics", diagnostics.append, reliable_qos(10))
    stop = bench.node.create_publisher(Bool, "emergency_stop", reliable_qos(10))
    stopped = bench.wait_for_state(ControlStep.STOPPED, Reason.DISABLED)
    bench.chunk(manifest)
    bench.spin_for(0.3, "ticks with a chunk")
    assert bench.steps[-1].state == ControlStep.STOPPED and len(stopped.command) == 0
    assert enable(bench, True).success
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)

    bench.spin_until(lambda: stop.get_subscription_count() == 2, "the controller's subscriptions")
    stop.publish(Bool(data=True))
    halted = bench.wait_for_state(ControlStep.STOPPED, Reason.EMERGENCY_STOP)
    assert not np.any(halted.command[:6]), "no motion"
    refused = enable(bench, True)
    assert not refused.success and "pressed" in refused.message
    stop.publish(Bool(data=False))
    bench.spin_until(lambda: len(bench.steps[-1].command) == 0, "silence")
    assert bench.steps[-1].state == ControlStep.STOPPED
    assert enable(bench, True).success
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    assert enable(bench, False).success
    bench.wait_for_state(ControlStep.STOPPED, Reason.DISABLED)

    before = len(diagnostics)
    bench.spin_until(lambda: len(diagnostics) > before + 1, "diagnostics")
    lines = {line.name: line for line in diagnostics[-1].status}
    assert set(lines) == {f"correction_controller: {n}" for n in ("timing", "observations", "chunk", "state")}
    values = {v.key: v.value for line in lines.values() for v in line.values}
    assert values["state"] == "STOPPED" and int(values["agentview.received"]) > 10
    assert float(values["rate [Hz]"]) > 0
    pairs = [(a, b) for a, b in itertools.pairwise(bench.steps) if b.tick == a.tick + 1]
    periods = [to_ns(b.header.stamp) - to_ns(a.header.stamp) for a, b in pairs]
    assert len(pairs) > 10 and periods == [(1 + b.missed_ticks) * 50_000_000 for _, b in pairs], "20 Hz"
    ticks = sum(int(v) for key, v in values.items() if key.startswith("ticks ") and key.split()[1].isupper())
    assert ticks == int(values["ticks since start"])
    assert bench.system.stop("correction_controller") == 0


@pytest.mark.timeout(150)
def test_a_simulated_clock_that_stops_holds_and_one_that_goes_back_starts_afresh(bench, manifest):
    clock = bench.node.create_publisher(Clock, "/clock", reliable_qos(10))
    simulated = {"now_ns": 100_000_000_000, "runs": True}

    def advance():
        if simulated["runs"]:
            simulated["now_ns"] += 20_000_000
            clock.publish(Clock(clock=to_time(simulated["now_ns"])))

    bench.node.create_timer(0.02, advance)
    bench.now_ns = lambda: simulated["now_ns"]
    bench.system.start("correction_controller", use_sim_time=True, clock_timeout_s=0.2, rearm_after_s=0.0)
    bench.wait_for_state(ControlStep.WAITING)
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    simulated["runs"] = False
    held = bench.wait_for_state(ControlStep.HOLDING, Reason.CLOCK_STOPPED)
    assert not np.any(held.command[:6])
    simulated["runs"] = True
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    simulated["now_ns"] -= 30_000_000_000
    bench.wait_for_state(ControlStep.HOLDING, Reason.CLOCK_JUMPED)
    bench.wait_for_log("correction_controller", "the clock jumped back by")
    bench.wait_for_state(ControlStep.HOLDING, Reason.NO_CHUNK)
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    assert bench.system.stop("correction_controller") == 0


@pytest.mark.timeout(150)
def test_an_emergency_stop_is_heard_while_a_head_is_loading(bench, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "SLOW_PRODUCTS", 60)  # warming up takes seconds
    slow = dataclasses.replace(manifest, cameras={}, tokens={}, latent_size=0, language_size=0)
    path = heads.write_head(tmp_path / "slow.onnx", "slow", slow)
    bench.system.start("correction_controller")
    stop = bench.node.create_publisher(Bool, "emergency_stop", reliable_qos(10))
    bench.wait_for_state(ControlStep.WAITING)
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    bench.spin_until(lambda: stop.get_subscription_count() == 2, "the controller's subscriptions")
    answer = bench.request_parameter("correction_controller", "correction.model_path", str(path))
    loads_ns = bench.now_ns() + 300_000_000  # later than the oldest observation that may be corrected
    bench.spin_until(
        lambda: any(s.state == ControlStep.RUNNING and to_ns(s.header.stamp) > loads_ns for s in bench.steps),
        "corrections with sensor data that came while the head was loading",
    )
    stop.publish(Bool(data=True))
    bench.wait_for_state(ControlStep.STOPPED, Reason.EMERGENCY_STOP)
    assert not answer.done(), "else the test shows nothing"
    bench.spin_until(answer.done, "the answer")
    assert answer.result().results[0].successful


@pytest.mark.timeout(150)
def test_a_person_takes_over_and_the_record_says_what_was_configured(bench, manifest):
    bench.system.start("correction_controller")
    configurations = []
    bench.node.create_subscription(
        ControlConfiguration, "control_configuration", configurations.append, latched_qos(10)
    )
    takeover = bench.node.create_publisher(JointState, "takeover", reliable_qos(1))
    bench.wait_for_state(ControlStep.WAITING)
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    bench.spin_until(lambda: takeover.get_subscription_count() == 1, "the controller's subscription")
    wanted = np.array([0.25, -0.5, 0.0, 0.0, 0.0, 0.0, 1.0])
    names = conventions.ACTION_NAMES[::-1]  # channels are found by name

    def drive(values=wanted[::-1]):
        takeover.publish(array_to_joint_state(values, names, bench.now_ns()))

    bench.chunk(manifest)
    person = bench.node.create_timer(0.02, drive)
    step = bench.wait_for_state(ControlStep.TAKEOVER)
    bench.spin_until(lambda: np.array_equal(bench.steps[-1].command, wanted.astype(np.float32)), "the person's command")
    assert step.chunk_id and not np.any(step.residual) and step.takeover_age_s < 0.2
    bench.chunk(manifest)
    person.cancel()
    bench.wait_for_state(ControlStep.HOLDING, Reason.TAKEOVER_ENDED)
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)
    drive([np.nan] * 7)
    bench.wait_for_log("correction_controller", "allowed are 7 finite values")
    takeover.publish(array_to_joint_state([1.0], ["x"], bench.now_ns()))
    bench.wait_for_log("correction_controller", "joint state lacks the joints")
    assert bench.steps[-1].state == ControlStep.RUNNING

    assert bench.set_parameter("correction_controller", "residual_limit", 0.75)[0]
    bench.spin_until(lambda: bench.steps[-1].configuration == 2, "steps of the second configuration")
    assert bench.set_parameter("correction_controller", "correction.enabled", False)[0]
    bench.spin_until(lambda: bench.steps[-1].configuration == 3, "steps of the new configuration")
    bench.spin_until(lambda: len(configurations) == 3, "the configurations")
    assert [c.revision for c in configurations] == [1, 2, 3] and {s.configuration for s in bench.steps} == {1, 2, 3}
    first, second, third = configurations
    assert json.loads(second.parameters) == json.loads(first.parameters) | {"residual_limit": 0.75}
    assert json.loads(first.head_manifest)["policy_id"] == manifest.policy_id and len(first.head_sha256) == 64
    assert "name: libero" in first.robot
    assert bench.system.stop("correction_controller") == 0
