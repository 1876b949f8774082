"""What a person asks of running nodes, where there is no ``ros2``: ``python -m a2c2_ros.nodes.operate enable``.

Several parameters of one ``set`` change together or not at all. The exit code is 0 if it was done, 1 if it was refused
or nobody answered, 2 for wrong arguments.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import rclpy
from rcl_interfaces.msg import ParameterType
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter, get_parameter_value, parameter_value_to_python
from rclpy.parameter_client import AsyncParameterClient
from rclpy.task import Future
from std_msgs.msg import String
from std_srvs.srv import SetBool

from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.core.safety import Reason, State
from a2c2_ros.core.timing import NO_E_FITS
from a2c2_ros.msg import ControlStep, EpisodeStatus, PlannerTiming
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos

CONTROLLER = "correction_controller"
PHASES = {
    "started": EpisodeStatus.STARTED,
    "succeeded": EpisodeStatus.SUCCEEDED,
    "failed": EpisodeStatus.FAILED,
    "aborted": EpisodeStatus.ABORTED,
}
LISTENERS_S = 1.0
"""A recorder subscribes this long after the first publisher has appeared, or sooner."""
ENVIRONMENT = {"ROS_DOMAIN_ID": "0", "ROS_AUTOMATIC_DISCOVERY_RANGE": "ROS's default"}


class OperateError(A2C2Error):
    """It was refused, or nobody answered."""


class Operator:
    """A node that asks others; a context manager.

    Args:
        namespace: Of the nodes that are asked.
        timeout_s: How long an answer may take [s], and how long the one who gives it may stay unseen.
    """

    def __init__(self, namespace: str = "", timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        self._node = rclpy.create_node(f"operate_{os.getpid()}", namespace=namespace, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)

    def __enter__(self) -> "Operator":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    def enable(self, value: bool) -> str:
        """Let the robot move, or stop it; returns the controller's words."""
        service = f"{CONTROLLER}/enable"
        client = self._node.create_client(SetBool, service)
        # Asked once: a second request could undo a stop that came between the two.
        answer = self._ask(service, client.wait_for_service, lambda: client.call_async(SetBool.Request(data=value)))
        if not answer.success:
            raise OperateError(f"{CONTROLLER}: {answer.message}")
        return answer.message or ("enabled" if value else "disabled")

    def state(self) -> str:
        """State, reason, and the age of every stream, of the next control step."""
        future = Future()
        received = self._node.create_subscription(ControlStep, "control_step", future.set_result, reliable_qos(10))
        step = self._wait(future, f"{received.topic_name}: no message")
        reason = "" if step.reason == Reason.NONE else f" {Reason(step.reason).name}"
        ages = ", ".join(f"{n} {age:.3f} s" for n, age in zip(step.stream_names, step.stream_ages_s, strict=True))
        return f"{State(step.state).name}{reason} {step.detail}".rstrip() + f"\nages: {ages}"

    def delay(self) -> str:
        """How slow the policy is and which e fit, of the next chunk."""
        future = Future()
        received = self._node.create_subscription(PlannerTiming, "planner_timing", future.set_result, reliable_qos(10))
        timing = self._wait(future, f"{received.topic_name}: no chunk")
        text = f"this chunk: {timing.delay_s:.3f} s, d={timing.delay_steps} of H={timing.horizon}"
        if timing.effective_delay_steps < 0:
            return f"{text}\nd and e: not measured yet, the first chunk after a pause does not count"
        least, most = timing.execution_horizon_min, timing.execution_horizon_max
        fits = f"e from {least} to {most} fits" if most else NO_E_FITS
        text += f"\nd={timing.effective_delay_steps} (95% of {timing.window_chunks} chunks): {fits}"
        return f"{text}; execution_horizon is {timing.execution_horizon}"

    def episode(self, phase: int, instruction: str) -> None:
        """Say on the topic ``episode`` that one begins or how it ended, for recorder and monitor.

        Raises:
            OperateError: If nobody listens.
        """
        message = EpisodeStatus(phase=phase, instruction=instruction)
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._say("episode", message)

    def instruct(self, instruction: str) -> None:
        """Tell the planner what the robot is to do, on the topic ``instruction``.

        Raises:
            OperateError: If nobody listens.
        """
        self._say("instruction", String(data=instruction))

    def _say(self, topic: str, message: EpisodeStatus | String) -> None:
        publisher = self._node.create_publisher(type(message), topic, latched_qos(1))
        self._spin_until(publisher.get_subscription_count, f"{publisher.topic_name}: nobody listens")
        publisher.publish(message)
        time.sleep(LISTENERS_S)  # who subscribes only now gets it, too, as long as the publisher lives
        publisher.wait_for_all_acked(Duration(seconds=self._timeout_s))

    def get(self, node: str, names: Sequence[str]) -> dict[str, object]:
        """Parameters of a node by name.

        Raises:
            OperateError: If one does not exist.
        """
        client = AsyncParameterClient(self._node, node)
        values = self._ask(node, client.wait_for_services, lambda: client.get_parameters(list(names))).values
        missing = [n for n, v in zip(names, values, strict=False) if v.type == ParameterType.PARAMETER_NOT_SET]
        if missing or len(values) < len(names):
            raise OperateError(f"{node} has no parameter {', '.join(missing or names)}")
        return {name: parameter_value_to_python(value) for name, value in zip(names, values, strict=True)}

    def set(self, node: str, values: dict[str, str]) -> None:
        """Set parameters of a node together; values as in YAML.

        Raises:
            OperateError: With the node's reason, if it refuses them.
        """
        client = AsyncParameterClient(self._node, node)
        parameters = [
            Parameter(name, value=parameter_value_to_python(get_parameter_value(text))) for name, text in values.items()
        ]
        answer = self._ask(node, client.wait_for_services, lambda: client.set_parameters_atomically(parameters))
        if not answer.result.successful:
            raise OperateError(f"{node}: {answer.result.reason}")

    def _ask(self, whom: str, is_there: Callable[[float], bool], call: Callable[[], Future]):
        if not is_there(self._timeout_s):
            raise OperateError(f"{whom}: nobody is there after {self._timeout_s:g} s; {_where()}")
        return self._wait(call(), f"{whom}: no answer")

    def _wait(self, future: Future, problem: str):
        self._spin_until(future.done, problem)
        return future.result()

    def _spin_until(self, condition: Callable[[], bool], problem: str) -> None:
        end_s = time.monotonic() + self._timeout_s
        while not condition():
            if time.monotonic() > end_s:
                raise OperateError(f"{problem} within {self._timeout_s:g} s; {_where()}")
            rclpy.spin_once(self._node, executor=self._executor, timeout_sec=0.02)


def _where() -> str:
    return "this shell has " + ", ".join(f"{n}={os.environ.get(n, default)}" for n, default in ENVIRONMENT.items())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m a2c2_ros.nodes.operate", description=__doc__.split("\n\n")[0])
    p.epilog = "The nodes must be in this shell's ROS_DOMAIN_ID; the bring-up prints its own."
    p.add_argument("--namespace", default="", help="of the nodes")
    p.add_argument("--timeout-s", type=float, default=10.0, help="for an answer [s] (default: 10)")
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("enable", help="the controller may move the robot")
    commands.add_parser("disable", help="the controller stops; no substitute for an emergency stop")
    commands.add_parser("state", help="what the controller does, why, and how old its data are")
    commands.add_parser("delay", help="how slow the policy is (d), and which execution horizons fit")
    instruct = commands.add_parser("instruct", help="tell the planner what the robot is to do")
    instruct.add_argument("instruction", help="for example 'reach the upper left corner'")
    episode = commands.add_parser("episode", help="say that an episode begins or how it ended, for a recorded bag")
    episode.add_argument("phase", choices=PHASES, help="what has happened")
    episode.add_argument("--instruction", default="", help="of the episode that begins")
    for name, text in (("get", "print parameters"), ("set", "set parameters, all together or none")):
        command = commands.add_parser(name, help=text)
        command.add_argument("node", help="for example chunk_planner")
        words = "NAME" if name == "get" else "NAME VALUE"
        command.add_argument("words", nargs="+", metavar=words, help="for example execution_horizon")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.command == "set" and len(args.words) % 2:
        p.error(f"{args.words[-1]!r} has no value, allowed are pairs NAME VALUE")
    try:
        with Operator(args.namespace, args.timeout_s) as operator:
            if args.command in ("enable", "disable"):
                print(operator.enable(args.command == "enable"))
            elif args.command == "episode":
                operator.episode(PHASES[args.phase], args.instruction)
            elif args.command == "instruct":
                operator.instruct(args.instruction)
            elif args.command == "state":
                print(operator.state())
            elif args.command == "delay":
                print(operator.delay())
            elif args.command == "get":
                for name, value in operator.get(args.node, args.words).items():
                    print(f"{name}: {value}")
            else:
                operator.set(args.node, dict(zip(args.words[::2], args.words[1::2], strict=True)))
    except OperateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
