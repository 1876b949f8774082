"""Planner and controller as real processes: parameters over their services, bad input, clean end."""

import signal

import numpy as np
import pytest

pytest.importorskip("rclpy")

from a2c2_ros.msg import ActionChunk, ControlStep
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.parameter import Parameter
from ros_bench import HEAD
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from a2c2_ros.core.manifest import MANIFEST_KEY
from a2c2_ros.core.safety import Reason
from a2c2_ros.nodes.conversions import to_ns
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos
from a2c2_ros.paths import model_path


@pytest.mark.timeout(200)
def test_planner_parameters_over_the_services(bench):
    bench.system.start("chunk_planner")
    bench.wait_for_log("chunk_planner", "configured")
    assert bench.set_parameter("chunk_planner", "inference_delay", 5) == (True, "")
    assert bench.get_parameter("chunk_planner", "inference_delay") == 5
    for name, value, words in (
        ("inference_delay", 41, ("H=50", "e=40", "d=41", "d <= e")),
        ("execution_horizon", 46, ("H=50", "e=46", "d=5", "e + d <= H")),
        ("execution_horizon", 0, ("execution_horizon", "0")),
        ("execution_horizon", "ten", ("execution_horizon", "'ten'", "int")),
        ("policy_path", "elsewhere", ("policy_path", "cannot change while the node runs")),
    ):
        accepted, reason = bench.set_parameter("chunk_planner", name, value)
        assert not accepted
        assert all(word in reason for word in words), reason
    assert bench.get_parameter("chunk_planner", "execution_horizon") == 40
    client = bench.parameters("chunk_planner")
    for e, d in ((40, 10), (5, 5), (40, 10)):  # of the first two, (5, 10) between them would be refused
        pair = [Parameter("execution_horizon", value=e), Parameter("inference_delay", value=d)]
        answer = bench.ask(lambda pair=pair: client.set_parameters_atomically(pair), "both at once")
        assert answer.result.successful, answer.result.reason
    received = []
    bench.node.create_subscription(ActionChunk, "action_chunk", received.append, latched_qos(2))
    bench.instruction.publish(String(data="pick up the black bowl"))
    bench.spin_until(lambda: len(received) >= 2, "two chunks")
    assert received[0].horizon == 50 and len(received[0].actions) == 350
    stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in received]
    assert 40 <= (stamps[1] - stamps[0]) / 50e6 < 50, "the next observation is the first after e steps"
    assert bench.system.stop("chunk_planner", signal.SIGINT) == 0


@pytest.mark.timeout(200)
def test_controller_parameters_and_bad_data(bench, manifest, tmp_path):
    bench.system.start("correction_controller")
    bench.wait_for_log("correction_controller", "configured")
    waiting = bench.wait_for_state(ControlStep.WAITING)
    assert len(waiting.command) == 0, "nothing is commanded before the first chunk"

    bench.chunk(manifest, actions=[float("nan")] * 350)
    bench.wait_for_log("correction_controller", "not finite")
    bench.chunk(manifest, actions=[0.1] * 349)
    assert bench.wait_for_state(ControlStep.WAITING)

    bench.chunk(manifest)
    running = bench.wait_for_state(ControlStep.RUNNING)
    assert np.allclose(running.command, np.clip(np.array(running.base_action) + running.residual, -1, 1), atol=1e-6)

    bench.chunk(manifest)
    assert bench.set_parameter("correction_controller", "correction.enabled", False) == (True, "")
    base_only = bench.wait_for_state(ControlStep.BASE_ONLY)
    assert np.array_equal(base_only.command, base_only.base_action)
    assert bench.set_parameter("correction_controller", "correction.enabled", True) == (True, "")

    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no graph")
    for name, value, words in (
        ("correction.model_path", str(tmp_path / "missing.onnx"), ("missing.onnx", "does not exist")),
        ("correction.model_path", str(garbage), ("garbage.onnx", "cannot be loaded")),
        ("correction.enabled", "yes", ("correction.enabled", "'yes'", "bool")),
        ("residual_limit", -1.0, ("residual_limit", "-1")),
    ):
        accepted, reason = bench.set_parameter("correction_controller", name, value)
        assert not accepted
        assert all(word in reason for word in words), reason
    assert bench.get_parameter("correction_controller", "correction.model_path") == HEAD
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)

    swapped = tmp_path / "swapped.onnx"
    swapped.write_bytes(model_path(HEAD).read_bytes())
    assert bench.set_parameter("correction_controller", "correction.model_path", str(swapped)) == (True, "")
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)

    bench.chunk(manifest, policy_id="another-policy")
    mismatch = bench.wait_for_state(ControlStep.HOLDING, Reason.HEAD_MISMATCH)
    assert "policy_id" in mismatch.detail and "another-policy" in mismatch.detail

    since = len(bench.steps)
    bench.image = np.zeros((64, 64, 3), np.uint8)
    bench.wait_for_log("correction_controller", "image is 64 x 64 pixels, allowed is 128 x 128")
    bench.chunk(manifest)
    bench.spin_until(lambda: any("agentview" in s.detail for s in bench.steps[since:]), "hold for the stale camera")
    assert bench.system.stop("correction_controller", signal.SIGTERM) == 0


@pytest.mark.timeout(150)
def test_life_cycle_starts_stops_and_starts_again(bench, manifest):
    bench.system.start("correction_controller", autostart=False)
    client = bench.node.create_client(ChangeState, "correction_controller/change_state")
    commands = []
    bench.node.create_subscription(JointState, "joint_command", commands.append, reliable_qos(10))

    def change(transition):
        bench.spin_until(client.service_is_ready, "service change_state")
        future = client.call_async(ChangeState.Request(transition=Transition(id=transition)))
        bench.spin_until(future.done, "change of state")
        return future.result().success

    assert change(Transition.TRANSITION_CONFIGURE)
    for _ in range(2):
        assert change(Transition.TRANSITION_ACTIVATE)
        bench.chunk(manifest)
        bench.wait_for_state(ControlStep.RUNNING)
        assert change(Transition.TRANSITION_DEACTIVATE)
        bench.spin_until(lambda: commands and not np.any(commands[-1].position[:6]), "a last command without motion")
        ended_ns = bench.now_ns()
        bench.spin_for(0.8, "what is under way, and more")
        assert not [s for s in bench.steps if to_ns(s.header.stamp) > ended_ns + 100_000_000], "no tick while inactive"
    assert change(Transition.TRANSITION_CLEANUP)
    assert change(Transition.TRANSITION_CONFIGURE)
    seen = len(bench.steps)
    assert change(Transition.TRANSITION_ACTIVATE)
    bench.spin_until(lambda: len(bench.steps) > seen, "ticks of the new configuration")


@pytest.mark.timeout(100)
def test_recorder_writes_a_bag_that_others_read(bench, manifest, tmp_path):
    from rosbags.highlevel import AnyReader

    bench.system.start("episode_recorder", out=tmp_path / "run")
    bench.wait_for_log("episode_recorder", "recording")
    recorded = [bench.chunks, *bench.cameras.values()]
    bench.spin_until(lambda: all(p.get_subscription_count() == 1 for p in recorded), "the recorder's subscriptions")
    bench.chunk(manifest, chunk_id=7)
    bench.spin_for(1.5, "a second of sensor data")
    assert bench.system.stop("episode_recorder") == 0
    with AnyReader([tmp_path / "run" / "bag"]) as bag:
        messages = [(c.topic, bag.deserialize(data, c.msgtype)) for c, _, data in bag.messages()]
    chunks = [message for topic, message in messages if topic == "/action_chunk"]
    assert [(c.chunk_id, c.horizon, len(c.actions)) for c in chunks] == [(7, 50, 350)]
    images = [message for topic, message in messages if topic == "/agentview/image"]
    assert len(images) > 10 and images[-1].data.size == 128 * 128 * 3
    process = bench.system.start("episode_recorder", out=tmp_path / "run")
    assert process.wait(timeout=30) == 1
    assert "is not overwritten" in bench.system.log("episode_recorder")


@pytest.mark.timeout(100)
def test_a_head_that_cannot_be_used_stops_the_start(bench, tmp_path, manifest):
    onnx = pytest.importorskip("onnx")
    import dataclasses

    model = onnx.load(str(model_path(HEAD)))
    other = dataclasses.replace(manifest, action_space="joint_position")
    next(p for p in model.metadata_props if p.key == MANIFEST_KEY).value = other.to_json()
    path = tmp_path / "other.onnx"
    onnx.save(model, str(path))
    process = bench.system.start("correction_controller", correction__model_path=path)
    assert process.wait(timeout=60) == 1
    log = bench.system.log("correction_controller")
    assert "action_space: head 'joint_position', robot 'osc_pose_delta'" in log
    assert "Traceback" not in log


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("node", "parameters", "words"),
    [
        ("libero_sim", {"task": 10}, ("task", "10")),
        ("correction_controller", {"correction__model_path": "nowhere.onnx"}, ("nowhere.onnx", "does not exist")),
        ("correction_controller", {"control_rate_hz": "fast"}, ("control_rate_hz",)),
        ("chunk_planner", {"inference_delay": 45}, ("H=50", "d=45")),
        ("chunk_planner", {"robot": "r2d2"}, ("r2d2", "libero")),
    ],
)
def test_bad_parameters_at_start_name_the_value(bench, node, parameters, words):
    process = bench.system.start(node, **parameters)
    assert process.wait(timeout=60) == 1
    log = bench.system.log(node)
    assert all(word in log for word in words), log
    assert "Traceback" not in log
