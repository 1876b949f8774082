"""Node ``chunk_planner``: action chunks from a slow policy, computed beside the callbacks, published when due."""

import sys
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from sensor_msgs.msg import JointState
from std_msgs.msg import Header, String

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.core.health import planner_status
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.planner import ChunkRequest, PlannerSchedule
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import Reason, stale_stream
from a2c2_ros.core.timing import ChunkTiming, DelayMonitor
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import PlannerStatus, PlannerTiming
from a2c2_ros.nodes.conversions import chunk_to_message, timing_to_message, to_ns, to_time
from a2c2_ros.nodes.diagnostics import diagnostics_of
from a2c2_ros.nodes.observation_source import ObservationSource
from a2c2_ros.nodes.runtime import (
    EdgeLog,
    ManagedNode,
    NodeParameters,
    latched_qos,
    reliable_qos,
    run,
)
from a2c2_ros.policies.base import CONTINUED, Continuation, check_continuation, infer_chunk
from a2c2_ros.policies.registry import load_policy_for

DIAGNOSTICS_PERIOD_S = 1.0
IDLE_REPORTS = 3
"""After so many reports without what an inference needs the log says so: at a start it takes a moment to come."""


class ChunkPlanner(ManagedNode):
    """Runs a policy on one worker thread, one inference at a time; the callbacks never wait for it.

    The worker gets immutable inputs and hands its result back through a guard condition, so that everything else
    happens on the executor's one thread.
    """

    def __init__(self) -> None:
        super().__init__("chunk_planner")
        self._log = EdgeLog(self)
        self._policy = None
        self._schedule: PlannerSchedule | None = None
        self._settings = NodeParameters(
            self, PlannerConfig(), self._validate, self._apply, configured=lambda: self._policy is not None
        )
        self._worker: ThreadPoolExecutor | None = None
        self._source: ObservationSource | None = None
        self._running: tuple[ChunkRequest, Future] | None = None
        self._due_timer = None
        self._timing: ChunkTiming | None = None  # of the last chunk
        self._idle_reports = 0
        self._instruction = ""
        self._to_answer_ns: int | None = None
        self._answered_ns = 0
        self._published_ns = 0
        self._chunk_ids = count(1)
        self._planner_id = uuid.uuid4().hex
        self._chunk_publisher = self.create_publisher(ActionChunkMsg, "action_chunk", latched_qos(2))
        self._timing_publisher = self.create_publisher(PlannerTiming, "planner_timing", reliable_qos(10))
        self._status_publisher = self.create_publisher(PlannerStatus, "planner_status", reliable_qos(10))
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", reliable_qos(10))
        self._result_ready = self.create_guard_condition(self._pump)
        if self._settings.value.autostart:
            self.autostart()

    def configure(self) -> None:
        config = self._settings.value
        self._profile = load_profile(config.robot)
        self._profile.check_rate(config.control_rate_hz)
        robot, shapes = self._profile.robot, self._profile.camera_shapes()
        self._policy = policy = load_policy_for(
            self._profile,
            config.policy,
            config.policy_path,
            config.policy_config,
            device=config.policy_device,
            dtype=config.policy_dtype,
            threads=config.policy_threads,
        )
        for name, mine, theirs in (
            ("horizon", config.horizon, policy.horizon),
            ("action_names", robot.action_names, tuple(policy.action_names)),
            ("state size", len(robot.state_names), policy.state_dim),
            *((f"camera {c}", shapes.get(c), (policy.image_size, policy.image_size, 3)) for c in policy.cameras),
            *((name, mine, policy.trained_for.get(name, mine)) for name, mine in robot_facts(robot, config).items()),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"policy {policy.policy_id} does not fit: {name} is {mine!r}, the policy needs {theirs!r}"
                )
        check_continuation(policy, config.chunking, config.inference_delay)
        self._schedule = PlannerSchedule(config)
        self._delays, self._timing = DelayMonitor(), None
        self._warm_up()
        self.get_logger().info(
            f"configured: policy {policy.policy_id}, H={policy.horizon}, e={config.execution_horizon}, "
            f"d={config.inference_delay}, {config.chunking}, {'lockstep' if config.lockstep else 'real time'}"
        )

    def activate(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._instruction_subscription = self.create_subscription(
            String, "instruction", self._on_instruction, latched_qos(1)
        )
        # When the person lets go, the robot waits for a chunk that was observed since.
        self._takeover_subscription = self.create_subscription(
            JointState, "takeover", self._on_takeover, reliable_qos(1)
        )
        # So it does when a person has enabled it after a stop.
        self._replan_subscription = self.create_subscription(Header, "replan", self._on_replan, latched_qos(1))
        self._source = ObservationSource(
            self,
            self._profile,
            self._settings.value.lockstep,
            self._log,
            lambda: self._settings.value.future_tolerance_ns,
            self._on_sample,
        )
        self._report_timer = self.create_timer(
            DIAGNOSTICS_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )

    def deactivate(self) -> None:
        if self._worker is None:
            return
        self._source.close()
        self.destroy_timer(self._report_timer)
        self.destroy_subscription(self._instruction_subscription)
        self.destroy_subscription(self._takeover_subscription)
        self.destroy_subscription(self._replan_subscription)
        self._cancel_due_timer()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = None
        self._running = None
        self._schedule.reset()

    def cleanup(self) -> None:
        self._policy = self._schedule = None

    def close(self) -> None:
        """Stop working; the node is about to be destroyed."""
        self.deactivate()

    def _warm_up(self) -> None:
        """The first inference is slower than the others; it must not count."""
        policy, config = self._policy, self._settings.value
        observation = {c: np.zeros((policy.image_size, policy.image_size, 3), np.uint8) for c in policy.cameras}
        observation["state"] = np.zeros(policy.state_dim, np.float32)
        continuation = None
        if config.chunking in CONTINUED:
            known = np.zeros((config.horizon - config.execution_horizon, len(policy.action_names)), np.float32)
            continuation = Continuation(known, config.inference_delay, config.chunking)
        policy.predict(observation, "warm up", seed=0, continuation=continuation)

    def _validate(self, candidate: PlannerConfig) -> None:
        if self._policy is not None:
            check_continuation(self._policy, candidate.chunking, candidate.inference_delay)

    def _apply(self, config: PlannerConfig) -> None:
        if self._schedule is not None:
            self._schedule.configure(config)
            self._delays = DelayMonitor()  # the injected delay or the way of chunking may be another

    def _on_instruction(self, message: String) -> None:
        if message.data != self._instruction:
            self._instruction = message.data
            self._schedule.invalidate()
            self.get_logger().info(f"instruction: {message.data!r}")
        if self._settings.value.lockstep:
            self._publish_status()

    def _on_takeover(self, message: JointState) -> None:
        # The stamp and not the arrival: the controller counts from there. It refuses one from the future.
        latest_ns = self.get_clock().now().nanoseconds + self._settings.value.future_tolerance_ns
        given_ns = min(to_ns(message.header.stamp), latest_ns)
        self._schedule.replan(given_ns + self._settings.value.takeover_timeout_ns)

    def _on_replan(self, message: Header) -> None:
        self._schedule.replan(to_ns(message.stamp))

    def _on_sample(self) -> None:
        observation = self._source.snapshot()
        streams = self._profile.robot.streams
        if len(observation.stamps_ns) != len(streams):
            return  # _report tells
        # Slot 0 starts with the oldest of the inputs: no part of the chunk may be newer than it claims.
        stamp_ns = observation.oldest_ns(self._profile.robot.undated_streams)
        if self._settings.value.lockstep:
            if not observation.synchronous_at(stamp_ns, streams):
                return
            if stamp_ns == self._answered_ns:
                self._publish_status()  # a simulator that asks again did not get the answer
                return
        elif self._unusable_stream(observation) is not None:
            return
        if stamp_ns < self._answered_ns:
            self.get_logger().warning("the clock jumped back: starting afresh")
            self._schedule.reset()
            self._published_ns = 0
        self._to_answer_ns = stamp_ns
        self._pump()

    def _unusable_stream(self, observation: Observation) -> tuple[Reason, str] | None:
        """Why no inference starts from an observation in real time, and the stream; None: it is good."""
        limits = {name: spec.max_age_ns for name, spec in self._profile.robot.streams.items()}
        now_ns = self.get_clock().now().nanoseconds
        return stale_stream(observation.ages_ns(now_ns), limits, self._settings.value.future_tolerance_ns)

    def _pump(self) -> None:
        """Publish what is due, start what is wanted, answer the newest observation; called on every event."""
        stamp_ns, lockstep = self._to_answer_ns, self._settings.value.lockstep
        if stamp_ns is None or self._worker is None:
            return
        if self._waits_for_chunk(stamp_ns, lockstep):
            return
        if not lockstep and self._is_dropped_running():
            return  # an observation that waited for it would be old
        if self._instruction:
            request = self._schedule.next_request(stamp_ns)
            if request is not None:
                self._start(request, self._source.snapshot())
                if self._waits_for_chunk(stamp_ns, lockstep) and lockstep:
                    return
        self._answered_ns = stamp_ns
        if lockstep:
            self._to_answer_ns = None
            self._publish_status()

    def _waits_for_chunk(self, stamp_ns: int, lockstep: bool) -> bool:
        """Publish the chunk in flight if it is done and due; True if it is due but not done."""
        request = self._schedule.in_flight
        if request is None or self._running is None or self._running[0] is not request:
            return False
        now_ns = stamp_ns if lockstep else self.get_clock().now().nanoseconds
        future = self._running[1]
        if now_ns < request.t_due_ns:
            if future.done() and not lockstep:
                self._wake_in(request.t_due_ns - now_ns)
            return False
        if not future.done():
            return True
        self._running = None
        error = future.exception()
        if isinstance(error, A2C2Error):
            self._schedule.failed(now_ns)
            self._log.problem("inference", f"inference failed: {error}")
        elif error is not None:
            raise error
        else:
            self._log.fine("inference")
            chunk, instruction = future.result()
            chunk = self._schedule.release(chunk, now_ns)
            self._published_ns = chunk.t_obs_ns
            self._chunk_publisher.publish(chunk_to_message(chunk, instruction))
            self._publish_timing(request, chunk, now_ns)
        return False

    def _is_dropped_running(self) -> bool:
        """The worker is still at an inference whose chunk is not wanted any more."""
        if self._running is None:
            return False
        request, future = self._running
        return request is not self._schedule.in_flight and not future.done()

    def _start(self, request: ChunkRequest, observation: Observation) -> None:
        future = self._worker.submit(self._infer, request, observation, self._instruction)
        self._running = (request, future)
        future.add_done_callback(lambda _: self._result_ready.trigger())

    def _infer(self, request: ChunkRequest, observation: Observation, instruction: str) -> tuple[ActionChunk, str]:
        """Runs on the worker thread."""
        chunk = infer_chunk(
            self._policy,
            self._profile.robot,
            observation.values,
            instruction,
            request,
            next(self._chunk_ids),
            self._settings.value.step_ns,
            self._planner_id,
        )
        return chunk, instruction

    def _wake_in(self, duration_ns: int) -> None:
        if self._due_timer is None:
            self._due_timer = self.create_timer(duration_ns / 1e9, self._on_due)

    def _on_due(self) -> None:
        self._cancel_due_timer()
        self._pump()

    def _cancel_due_timer(self) -> None:
        if self._due_timer is not None:
            self.destroy_timer(self._due_timer)
            self._due_timer = None

    def _publish_timing(self, request: ChunkRequest, chunk: ActionChunk, now_ns: int) -> None:
        config = self._settings.value
        timing = self._delays.add(
            now_ns - request.t_obs_ns,
            config.step_ns,
            cold=request.sequence == 0,
            horizon=config.horizon,
            execution_horizon=config.execution_horizon,
        )
        self._timing = timing
        if not config.lockstep and config.chunking in CONTINUED:
            self._expect_delay(timing, config.chunking)
        self._timing_publisher.publish(timing_to_message(timing, request, chunk, config.inference_delay))
        # The robot stands still while a synchronous chunk is computed, so any delay fits.
        if timing.problem and request.chunking != "synchronous":
            self._log.problem("timing", timing.problem)
        else:
            self._log.fine("timing")

    def _expect_delay(self, timing: ChunkTiming, chunking: str) -> None:
        # Nothing else is known after the first chunk.
        measured = timing.delay_steps if timing.effective_delay_steps < 0 else timing.effective_delay_steps
        largest = self._policy.largest_delay(chunking)
        if measured > largest:
            self._log.problem(
                "delay",
                f"chunks come d={measured} steps late, with {chunking} the policy goes on from {largest} at most",
            )
        else:
            self._log.fine("delay")
        self._schedule.expect_delay(min(measured, largest))

    def _report(self) -> None:
        """Once a second: why there is no inference, in the log, and diagnostics."""
        idle = None if self._settings.value.lockstep else self._idle_reason()
        self._idle_reports = self._idle_reports + 1 if idle else 0
        if self._idle_reports >= IDLE_REPORTS:
            self._log.problem("idle", f"no inference: {idle}")
        elif not idle:
            self._log.fine("idle")
        status = planner_status(
            self._policy.policy_id, self._instruction, idle, self._log.active("inference"), self._timing
        )
        self._diagnostics_publisher.publish(diagnostics_of(self, [status], self._profile.robot.name))

    def _idle_reason(self) -> str | None:
        observation = self._source.snapshot()
        unusable = self._unusable_stream(observation)
        if unusable is not None:
            reason, stream = unusable
            age_ns = observation.ages_ns(self.get_clock().now().nanoseconds).get(stream)
            return f"{reason.name}: {stream}" + ("" if age_ns is None else f" is {age_ns / 1e9:.2f} s old")
        return None if self._instruction else "nothing was said on the topic instruction"

    def _publish_status(self) -> None:
        status = PlannerStatus(
            chunk_stamp=to_time(self._published_ns),
            instruction=self._instruction,
            inference_running=self._running is not None,
        )
        status.header.stamp = to_time(self._answered_ns)
        self._status_publisher.publish(status)


def robot_facts(robot: Robot, config: PlannerConfig) -> dict[str, object]:
    """What a policy was trained for besides sizes, of this robot; keys as in ``ChunkPolicy.trained_for``."""
    return {"step_ns": config.step_ns, "state_names": tuple(robot.state_names), "action_space": robot.action_space}


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(ChunkPlanner, args))


if __name__ == "__main__":
    main()
