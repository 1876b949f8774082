"""What every node does alike: start, parameters, life cycle, clean end."""

import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rcl_interfaces.msg import Parameter as ParameterMsg
from rclpy.clock import Clock as RosClock
from rclpy.clock import ClockType
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.parameter_service import ParameterService
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from a2c2_ros.core.config import Config
from a2c2_ros.core.errors import A2C2Error, ConfigError

SIGNAL_CHECK_S = 0.1
"""Longest time from a signal to its effect: Python's handlers run only between two waits."""


def sensor_qos(lockstep: bool, depth: int = 1) -> QoSProfile:
    """Newest sample only; best effort, but reliable in lockstep, where a lost image would stop the simulation."""
    reliability = ReliabilityPolicy.RELIABLE if lockstep else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(depth=depth, reliability=reliability)


def latched_qos(depth: int) -> QoSProfile:
    """Reliable, and late subscribers get the last messages."""
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def reliable_qos(depth: int) -> QoSProfile:
    """Reliable, no history for late subscribers."""
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)


class NodeParameters:
    """ROS parameters of a node from a parameter set of ``core.config``: declared, validated together, then applied.

    Args:
        node: The node.
        defaults: The parameter set with its defaults.
        validate: Called with a candidate before it is accepted; raises :class:`A2C2Error` to refuse it.
        apply: Called with the new set after it was accepted.
        always: Names with which ``validate`` and ``apply`` are called even if the value is the same: of files.
        configured: Whether the node is; before it is, everything can change. None: some parameters never can.

    Raises:
        ConfigError: If a value given at start has the wrong type or violates a rule.
    """

    def __init__(
        self,
        node: Node,
        defaults: Config,
        validate: Callable[[Config], None] = lambda candidate: None,
        apply: Callable[[Config], None] = lambda config: None,
        always: frozenset[str] = frozenset(),
        configured: Callable[[], bool] | None = None,
    ) -> None:
        self._validate = validate
        self._apply = apply
        self._always = always
        self._configured = configured
        self.named: frozenset[str] = frozenset()  # by the change that is validated or applied
        values = {}
        for item in fields(defaults):
            name = defaults.ros_name(item.name)
            try:
                descriptor = _descriptor(item)
                descriptor.read_only = configured is None and not item.metadata["dynamic"]
                values[name] = node.declare_parameter(name, item.default, descriptor).value
            except (InvalidParameterTypeException, InvalidParameterValueException) as error:
                raise ConfigError(f"parameter {name} of {node.get_name()}: {error}") from error
        self.value = defaults.replaced(values, running=False)
        node.add_on_set_parameters_callback(self._on_set)
        node.add_post_set_parameters_callback(self._post_set)

    def _on_set(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        try:
            candidate = self._candidate(parameters)
            if candidate != self.value or self.named & self._always:
                self._validate(candidate)
        except A2C2Error as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _post_set(self, parameters: Sequence[Parameter]) -> None:
        candidate = self._candidate(parameters)
        if candidate != self.value or self.named & self._always:
            self.value = candidate
            self._apply(candidate)

    def _candidate(self, parameters: Sequence[Parameter]) -> Config:
        self.named = frozenset(p.name for p in parameters)
        running = self._configured is None or self._configured()
        return self.value.replaced({p.name: p.value for p in parameters}, running=running)


def _descriptor(item) -> ParameterDescriptor:
    low, high = item.metadata["low"], item.metadata["high"]
    descriptor = ParameterDescriptor(description=item.metadata["description"])
    descriptor.dynamic_typing = True  # the parameter set checks the type, with an error that says what is allowed
    if low is not None and high is not None:
        if isinstance(item.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
        else:
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
    return descriptor


class PatientParameterService(ParameterService):
    """rclpy's parameter services; a change first awaits ``prepare``, while the executor goes on with other callbacks.

    Args:
        node: Made with ``start_parameter_services=False``. What must go on meanwhile has to be in another callback
            group than the node's default one.
        prepare: Gets the wanted values by name; returns what to wait for before they are validated, or None.
    """

    def __init__(self, node: Node, prepare: Callable[[dict[str, object]], Future | None]) -> None:
        self._prepare = prepare
        super().__init__(node)

    async def _set_parameters_callback(self, request, response):
        await self._prepared(request.parameters)
        return super()._set_parameters_callback(request, response)

    async def _set_parameters_atomically_callback(self, request, response):
        await self._prepared(request.parameters)
        return super()._set_parameters_atomically_callback(request, response)

    async def _prepared(self, messages: Sequence[ParameterMsg]) -> None:
        parameters = map(Parameter.from_parameter_msg, messages)
        future = self._prepare({parameter.name: parameter.value for parameter in parameters})
        if future is not None:
            await future


class EdgeLog:
    """Logs a condition once when it begins and once when it ends, however often it is reported; counts every report.

    Another cause of the same condition, which is a text that differs by more than numbers, is logged too, but at most
    one in ``CAUSE_PERIOD_S``.

    Args:
        node: Whose logger is used.
        now_s: A clock that only goes forward [s].
    """

    CAUSE_PERIOD_S = 5.0

    def __init__(self, node: Node, now_s: Callable[[], float] = time.monotonic) -> None:
        self._logger = node.get_logger()
        self._now_s = now_s
        self._active: dict[str, str] = {}
        self._logged: dict[str, tuple[str, float]] = {}  # text without numbers, and when
        self.counts: dict[str, int] = {}

    def problem(self, key: str, text: str) -> None:
        """The condition ``key`` holds; ``text`` says what is wrong."""
        self.counts[key] = self.counts.get(key, 0) + 1
        cause = re.sub(r"[\d.]+", "", text)
        logged, when_s = self._logged.get(key, ("", 0.0))
        if key not in self._active or (cause != logged and self._now_s() - when_s >= self.CAUSE_PERIOD_S):
            self._logger.error(text)
            self._logged[key] = cause, self._now_s()
        self._active[key] = text

    def active(self, key: str) -> str | None:
        """What the condition ``key`` was last reported with, None if it was not or has ended."""
        return self._active.get(key)

    def holds(self, key: str) -> bool:
        """Whether the condition ``key`` was reported and has not ended."""
        return key in self._active

    def fine(self, key: str) -> None:
        """The condition ``key`` does not hold."""
        if self._active.pop(key, None) is not None:
            self._logger.info(f"{key}: fine again after {self.counts[key]} problems")


class PlainNode(Node):
    """A node without a life cycle: it works from its start to its end."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.system_clock = RosClock(clock_type=ClockType.STEADY_TIME)

    def close(self) -> None:
        """Stop working; the node is about to be destroyed."""


class ManagedNode(LifecycleNode):
    """Life cycle of our nodes: errors of configuration refuse the transition and are logged, nothing is half done.

    Subclasses implement :meth:`configure`, :meth:`activate`, :meth:`deactivate` and :meth:`cleanup`.
    """

    def configure(self) -> None:
        """Load and check everything.

        Raises:
            A2C2Error: To refuse the transition.
        """

    def activate(self) -> None:
        """Start working."""

    def deactivate(self) -> None:
        """Stop working, leaving the robot in a safe command."""

    def cleanup(self) -> None:
        """Undo :meth:`configure`."""

    def on_configure(self, state) -> TransitionCallbackReturn:
        try:
            self.configure()
        except A2C2Error as error:
            self.get_logger().error(f"not configured: {error}")
        except Exception:  # noqa: BLE001, as in _defect
            self._defect("configured")
        else:
            return TransitionCallbackReturn.SUCCESS
        self.cleanup()
        return TransitionCallbackReturn.FAILURE

    def on_activate(self, state) -> TransitionCallbackReturn:
        try:
            self.activate()
        except Exception:  # noqa: BLE001, as in _defect
            return self._defect("activated")
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        try:
            self.deactivate()
        except Exception:  # noqa: BLE001, as in _defect
            return self._defect("deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        self.cleanup()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state) -> TransitionCallbackReturn:
        self.deactivate()
        self.cleanup()
        return TransitionCallbackReturn.SUCCESS

    def _defect(self, transition: str) -> TransitionCallbackReturn:
        """Log the exception that is being handled: rclpy makes it an ERROR, too, but without a word."""
        self.get_logger().error(f"not {transition}, a defect:\n{traceback.format_exc()}")
        return TransitionCallbackReturn.ERROR

    def autostart(self) -> None:
        """Configure and activate now.

        Raises:
            ConfigError: If a transition was refused; the reason was logged.
        """
        for transition in (self.trigger_configure, self.trigger_activate):
            if transition() != TransitionCallbackReturn.SUCCESS:
                raise ConfigError(f"{self.get_name()} did not start, see the error above")


def run(make_node: Callable[[], Node], args: Sequence[str] | None = None) -> int:
    """Run a node until SIGINT (Ctrl-C), SIGTERM, the end of the context or ``SystemExit`` from the node.

    The context stays valid until the node has closed itself, so that it can still send a safe command; rclpy's own
    signal handlers would end it first. A second signal interrupts at once.

    Returns:
        Exit code: 0 after a clean end, 1 if the node could not start or had to give up.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    node = None
    try:
        node = make_node()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while rclpy.ok() and not stop.is_set():
            executor.spin_once(timeout_sec=SIGNAL_CHECK_S)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except A2C2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0
