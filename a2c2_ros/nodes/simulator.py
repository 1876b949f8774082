"""What simulators have in common behind the topics of a robot: episodes in lockstep or on the clock."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from a2c2_ros.core.errors import ConfigError, ObservationError, SimulationError
from a2c2_ros.drivers.profile import Profile
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import EpisodeStatus, PlannerStatus
from a2c2_ros.nodes.conversions import joint_state_to_array, to_ns, to_time
from a2c2_ros.nodes.runtime import NodeParameters, PlainNode, latched_qos, reliable_qos
from a2c2_ros.sim.parameters import SimulatorConfig

Observation = dict[str, np.ndarray]


class SimulatorStep(NamedTuple):
    """What a step brought."""

    observation: Observation
    solved: bool
    over: bool  # the episode cannot go on, solved or not


class SimulatorNode(PlainNode):
    """Runs episodes on a thread of its own (the renderer belongs to one thread); the executor only takes messages.

    Lockstep: an observation and ``/clock`` are published, and the simulation steps when the command with the same stamp
    has come. The wait is bounded; a command that did not come is replaced by no motion and counted. Observations are
    repeated while waiting, so that a lost message or a late subscriber costs time, not the episode. Real time: the
    simulation steps on the system clock, and a command that is late counts.

    Args:
        name: Of the node.
        config: Its parameters, with ``max_steps`` beside those of :class:`SimulatorConfig`.
    """

    def __init__(self, name: str, config: SimulatorConfig) -> None:
        super().__init__(name)
        self._settings = NodeParameters(self, config)

    def start(self, profile: Profile, step_ns: int) -> None:
        """Open the topics and begin with the first episode.

        Args:
            profile: The robot; its command is a joint state of action values.
            step_ns: Duration of a control step [ns].

        Raises:
            ConfigError: If its joints have several topics.
        """
        config = self._settings.value
        if len(profile.joint_topics) > 1:
            more = [joints.stream for joints in profile.joint_topics[1:]]
            raise ConfigError(f"robot {profile.robot.name}: more_joint_states is {more}, a simulator allows none")
        self._profile, self._step_ns = profile, step_ns
        self._changed = threading.Condition()
        self._commands: dict[int, np.ndarray] = {}
        self._planner_instruction: str | None = None
        self._newest_chunk_ns = 0
        self._last: np.ndarray | None = None  # action of the episode's last step
        self._stopping = False
        self._restart = False
        self._instruction = self.create_publisher(String, "instruction", latched_qos(1))
        self._episode = self.create_publisher(EpisodeStatus, "episode", latched_qos(10))
        self._clock_publisher = self.create_publisher(Clock, "/clock", reliable_qos(1)) if config.lockstep else None
        self.create_subscription(JointState, profile.command_topic, self._on_command, reliable_qos(1))
        if config.lockstep:
            self.create_subscription(PlannerStatus, "planner_status", self._on_status, reliable_qos(10))
        else:
            self.create_subscription(ActionChunkMsg, "action_chunk", self._on_chunk, latched_qos(2))
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulation")
        self._simulation = self._worker.submit(self._run_episodes)
        self._simulation_over = self.create_guard_condition(self._on_simulation_over)
        self._simulation.add_done_callback(lambda _: self._simulation_over.trigger())

    # --- what a simulator is; all on the simulation's thread ---------------------------------------------------------

    def _begin(self, episode: int) -> tuple[Observation, EpisodeStatus]:
        """Set an episode up; its first observation, and its status with all that is known before it starts."""
        raise NotImplementedError

    def _step(self, action: np.ndarray) -> SimulatorStep:
        """Apply (A,) action units."""
        raise NotImplementedError

    def _publish_observation(self, observation: Observation, stamp_ns: int) -> None:
        """Publish the sensors' messages."""
        raise NotImplementedError

    def _no_motion(self, last: np.ndarray | None) -> np.ndarray:
        """(A,) what is applied where no command came; ``last`` is the action before it, None at the start."""
        raise NotImplementedError

    def _look(self, observation: Observation) -> None:
        """A new step begins with this observation, before it is published."""

    def _finish(self) -> None:
        """The last episode is over."""

    # --- messages ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the simulation; the node is about to be destroyed."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._worker.shutdown(wait=True)

    def _on_simulation_over(self) -> None:
        """Raise what ended the simulation, whatever it was: a node without its simulation must not live on."""
        self._simulation.result()

    def _on_command(self, message: JointState) -> None:
        try:
            action = joint_state_to_array(message, self._profile.robot.action_names)
        except ObservationError as error:
            self.get_logger().error(f"command refused: {error}", throttle_duration_sec=1.0)
            return
        if not np.isfinite(action).all():
            self.get_logger().error(f"command refused: not finite: {action.tolist()}", throttle_duration_sec=1.0)
            return
        with self._changed:
            self._commands[to_ns(message.header.stamp)] = action
            self._changed.notify_all()

    def _on_status(self, message: PlannerStatus) -> None:
        with self._changed:
            self._planner_instruction = message.instruction
            self._changed.notify_all()

    def _on_chunk(self, message: ActionChunkMsg) -> None:
        with self._changed:
            self._newest_chunk_ns = max(self._newest_chunk_ns, to_ns(message.header.stamp))
            self._changed.notify_all()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._changed:
            self._restart = True
            self._changed.notify_all()
        response.success = True
        response.message = "the episode is aborted and starts again"
        return response

    # --- episodes ----------------------------------------------------------------------------------------------------

    def _run_episodes(self) -> None:
        """Runs on the simulation thread."""
        config = self._settings.value
        episode, start_ns = 0, self._step_ns
        try:
            while not self._stopping and (config.episodes == 0 or episode < config.episodes):
                with self._changed:
                    self._restart = False
                observation, status = self._begin(episode)
                status.episode, status.episodes = episode, config.episodes
                self._announce_instruction(status.instruction, first=episode == 0)
                run_episode = self._run_lockstep if config.lockstep else self._run_real_time
                end_ns = run_episode(observation, status, start_ns)
                start_ns = end_ns + round(config.episode_gap_s * 1e9 / self._step_ns) * self._step_ns
                if status.phase in (EpisodeStatus.SUCCEEDED, EpisodeStatus.FAILED):
                    episode += 1
                if not config.lockstep and (config.episodes == 0 or episode < config.episodes):
                    self._wait(lambda: False, config.episode_gap_s)
        finally:
            self._finish()

    def _announce_instruction(self, instruction: str, *, first: bool) -> None:
        """Publish the instruction; in lockstep, wait until the planner uses it."""
        config = self._settings.value
        self._planner_instruction = None
        self._instruction.publish(String(data=instruction))
        if not config.lockstep:
            return
        deadline = time.monotonic() + (config.start_timeout_s if first else config.lockstep_timeout_s)
        while not self._wait(lambda: self._planner_instruction == instruction, 0.5):
            if self._interrupted():
                return
            if time.monotonic() > deadline:
                raise SimulationError(
                    "the planner did not take the instruction in time; is chunk_planner running, and "
                    "with lockstep true?"
                )
            self._instruction.publish(String(data=instruction))

    def _run_lockstep(self, observation: Observation, status: EpisodeStatus, start_ns: int) -> int:
        """One episode in lockstep from simulated time ``start_ns``; returns its end [ns]."""
        config = self._settings.value
        now_ns = start_ns
        self._publish_phase(status, EpisodeStatus.STARTED, now_ns)
        self._last = None
        for step in range(config.max_steps):
            limit_s = config.start_timeout_s if status.episode == 0 and step == 0 else config.lockstep_timeout_s
            self._look(observation)
            action = self._ask(observation, now_ns, limit_s)
            if self._interrupted():
                return self._publish_phase(status, EpisodeStatus.ABORTED, now_ns)
            if action is None:
                self.get_logger().warning(f"no command for step {step} within {limit_s:g} s: no motion")
            observation, solved, over = self._apply(action, status)
            now_ns += self._step_ns
            if over:
                break
        return self._publish_phase(status, EpisodeStatus.SUCCEEDED if solved else EpisodeStatus.FAILED, now_ns)

    def _apply(self, action: np.ndarray | None, status: EpisodeStatus) -> SimulatorStep:
        """Step with a command, or without motion where none came, and count both."""
        if action is None:
            status.timeouts += 1
            action = self._no_motion(self._last)
        self._last = action
        status.steps += 1
        return self._step(action)

    def _ask(self, observation: Observation, now_ns: int, limit_s: float) -> np.ndarray | None:
        """Publish an observation and wait for its command; None if it did not come in time."""
        with self._changed:
            self._commands.clear()
        deadline = time.monotonic() + limit_s
        while True:
            self._show(observation, now_ns)
            self._clock_publisher.publish(Clock(clock=to_time(now_ns)))
            if self._wait(lambda: now_ns in self._commands, min(0.5, limit_s)):
                with self._changed:
                    return self._commands.get(now_ns)
            if self._interrupted() or time.monotonic() > deadline:
                return None

    def _run_real_time(self, observation: Observation, status: EpisodeStatus, _start_ns: int) -> int:
        """One episode on the system clock; it starts when the first chunk is there. Returns its end [ns]."""
        config = self._settings.value
        start_ns = self.get_clock().now().nanoseconds
        limit_s = config.start_timeout_s if status.episode == 0 else config.lockstep_timeout_s
        deadline = time.monotonic() + limit_s
        step_s = self._step_ns / 1e9
        while self._newest_chunk_ns < start_ns:
            self._show(observation, self.get_clock().now().nanoseconds)
            if self._interrupted():
                return self._publish_phase(status, EpisodeStatus.ABORTED, start_ns)
            if time.monotonic() > deadline:
                raise SimulationError(f"no action chunk within {limit_s:g} s; is chunk_planner running?")
            self._wait(lambda: self._newest_chunk_ns >= start_ns, step_s)
        self._publish_phase(status, EpisodeStatus.STARTED, self.get_clock().now().nanoseconds)
        self._last = None
        next_step = time.monotonic() + step_s
        for _ in range(config.max_steps):
            self._look(observation)
            self._show(observation, self.get_clock().now().nanoseconds)
            self._wait(lambda: False, next_step - time.monotonic())
            now = time.monotonic()
            next_step = max(next_step + step_s, now)
            if self._interrupted():
                return self._publish_phase(status, EpisodeStatus.ABORTED, self.get_clock().now().nanoseconds)
            with self._changed:
                action = self._commands[max(self._commands)] if self._commands else None
                self._commands.clear()
            observation, solved, over = self._apply(action, status)
            if over:
                break
        phase = EpisodeStatus.SUCCEEDED if solved else EpisodeStatus.FAILED
        return self._publish_phase(status, phase, self.get_clock().now().nanoseconds)

    def _wait(self, condition, limit_s: float) -> bool:
        """Wait until the condition holds, the node stops or the time is over; returns whether it holds."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._interrupted(), max(limit_s, 0.0))
            return condition()

    def _interrupted(self) -> bool:
        return self._stopping or self._restart

    def _show(self, observation: Observation, stamp_ns: int) -> None:
        if not self._stopping:
            self._publish_observation(observation, stamp_ns)

    def _publish_phase(self, status: EpisodeStatus, phase: int, stamp_ns: int) -> int:
        status.phase = phase
        status.header.stamp = to_time(stamp_ns)
        if not self._stopping:
            self._episode.publish(status)
        return stamp_ns
