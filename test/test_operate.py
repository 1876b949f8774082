"""A person's command line, against real nodes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("rclpy")

from a2c2_ros.msg import ControlStep, EpisodeStatus, PlannerTiming
from std_msgs.msg import String

from a2c2_ros.core.safety import Reason
from a2c2_ros.nodes.conversions import to_ns
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos


def operate(bench, *words, namespace="", timeout_s=30.0):
    """(exit code, what it printed)"""
    command = [sys.executable, "-m", "a2c2_ros.nodes.operate", f"--timeout-s={timeout_s}", f"--namespace={namespace}"]
    environment = os.environ | {"ROS_DOMAIN_ID": str(bench.system.domain_id)}
    with subprocess.Popen(
        [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        bench.spin_until(lambda: process.poll() is not None, f"end of operate {words}")
        return process.returncode, process.stdout.read()


@pytest.mark.timeout(200)
def test_a_person_enables_sets_and_stops_without_ros2(bench, manifest):
    bench.system.start("correction_controller", start_state="disabled")
    bench.wait_for_state(ControlStep.STOPPED, Reason.DISABLED)
    code, text = operate(bench, "state")
    assert code == 0 and text.startswith("STOPPED DISABLED not enabled yet\nages: ") and "agentview 0." in text
    assert operate(bench, "enable")[0] == 0
    bench.chunk(manifest)
    bench.wait_for_state(ControlStep.RUNNING)

    node = "correction_controller"
    assert operate(bench, "set", node, "residual_limit", "0.75", "correction.enabled", "false") == (0, "")
    assert operate(bench, "get", node, "residual_limit", "correction.enabled") == (
        0,
        "residual_limit: 0.75\ncorrection.enabled: False\n",
    )
    code, text = operate(bench, "set", node, "correction.enabled", "true", "residual_limit", "-1.0")
    assert code == 1 and "residual_limit" in text and "-1" in text
    assert bench.get_parameter(node, "correction.enabled") is False, "all or nothing"
    assert operate(bench, "get", node, "rate") == (1, f"error: {node} has no parameter rate\n")
    assert operate(bench, "disable")[0] == 0
    bench.wait_for_state(ControlStep.STOPPED, Reason.DISABLED)


def test_a_person_says_how_an_episode_ended(bench):
    heard = []
    bench.node.create_subscription(EpisodeStatus, "episode", heard.append, latched_qos(10))
    assert operate(bench, "episode", "started", "--instruction", "open it") == (0, "")
    assert operate(bench, "episode", "succeeded") == (0, "")
    assert operate(bench, "episode", "aborted") == (0, "")
    phases = [(m.phase, m.instruction) for m in heard]
    assert phases == [(EpisodeStatus.STARTED, "open it"), (EpisodeStatus.SUCCEEDED, ""), (EpisodeStatus.ABORTED, "")]
    assert to_ns(heard[0].header.stamp) < to_ns(heard[1].header.stamp) < bench.now_ns()


def test_a_person_tells_the_robot_what_to_do(bench):
    said = []
    bench.node.create_subscription(String, "instruction", lambda message: said.append(message.data), latched_qos(1))
    assert operate(bench, "instruct", "open the drawer") == (0, "")
    assert operate(bench, "instruct", "close it") == (0, "")
    assert said == ["open the drawer", "close it"]


def test_a_person_is_told_how_slow_the_policy_is(bench):
    publisher = bench.node.create_publisher(PlannerTiming, "planner_timing", reliable_qos(10))
    timing = {"delay_s": 0.55, "delay_steps": 11, "horizon": 50, "execution_horizon": 40}

    def told(**values):
        timer = bench.node.create_timer(0.05, lambda: publisher.publish(PlannerTiming(**timing | values)))
        code, text = operate(bench, "delay")
        bench.node.destroy_timer(timer)
        assert code == 0
        return text

    assert "not measured yet" in told(effective_delay_steps=-1)
    fits = {"execution_horizon_min": 12, "execution_horizon_max": 38}
    assert told(effective_delay_steps=12, window_chunks=7, **fits) == (
        "this chunk: 0.550 s, d=11 of H=50\nd=12 (95% of 7 chunks): e from 12 to 38 fits; execution_horizon is 40\n"
    )
    assert "no e fits" in told(effective_delay_steps=30, window_chunks=7)


def test_nobody_there_is_said_with_the_domain(bench):
    code, text = operate(bench, "enable", namespace="elsewhere", timeout_s=0.2)
    assert code == 1 and f"ROS_DOMAIN_ID={bench.system.domain_id}" in text and "Traceback" not in text
    code, text = operate(bench, "state", timeout_s=0.2)
    assert code == 1 and "control_step: no message within 0.2 s" in text
    code, text = operate(bench, "instruct", "open it", namespace="elsewhere", timeout_s=0.2)
    assert code == 1 and "/elsewhere/instruction: nobody listens" in text
    assert operate(bench, "set", "chunk_planner", "horizon")[0] == 2
