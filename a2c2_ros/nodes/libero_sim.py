"""Node ``libero_sim``: real LIBERO tasks behind the topics of a robot."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from geometry_msgs.msg import PoseStamped
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from a2c2_ros.core.config import Parameters, parameter
from a2c2_ros.core.errors import ObservationError, SimulationError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import EpisodeStatus, PlannerStatus
from a2c2_ros.nodes.conversions import (
    array_to_image,
    array_to_joint_state,
    array_to_pose,
    joint_state_to_array,
    to_ns,
    to_time,
)
from a2c2_ros.nodes.runtime import NodeParameters, PlainNode, latched_qos, reliable_qos, run, sensor_qos
from a2c2_ros.sim import conventions
from a2c2_ros.sim.disturbance import Disturbed
from a2c2_ros.srv import SetTask

FRAME = "world"


@dataclass(frozen=True)
class SimConfig(Parameters):
    """Parameters of ``libero_sim``."""

    task: int = parameter(0, "LIBERO Spatial task", low=0, high=9, dynamic=False)
    episodes: int = parameter(2, "Episodes to run; 0: until stopped", low=0, high=100_000, dynamic=False)
    initial_state: int = parameter(
        -1,
        "Official initial state; -1: the episode's number in turn; -2: sampled from the episode's seed",
        low=-2,
        high=49,
        dynamic=False,
    )
    seed: int = parameter(0, "Seed of the fixtures; episode n uses seed + n", low=0, high=2**31 - 1, dynamic=False)
    motion: str = parameter(
        "none",
        "What the plate does: nothing, slide all the time (drift), or once (push)",
        choices=conventions.MOTIONS,
        dynamic=False,
    )
    disturbance: float = parameter(
        0.0, "Strength of pushes that the arm gets now and then, drawn from the seed", low=0.0, high=1.0, dynamic=False
    )
    expert: bool = parameter(
        False, "Publish what the scripted expert would do as expert_action, for training", dynamic=False
    )
    lockstep: bool = parameter(True, "Wait for the command of every step; else step on the clock", dynamic=False)
    lockstep_timeout_s: float = parameter(5.0, "Longest wait for a command in lockstep [s]", low=0.1, high=600.0)
    start_timeout_s: float = parameter(
        120.0, "Longest wait for planner and controller at the start [s]", low=1.0, high=3600.0
    )
    episode_gap_s: float = parameter(
        5.0,
        "Pause between episodes on the ROS clock [s]; longer than a chunk, so that none outlives its episode",
        low=0.0,
        high=600.0,
        dynamic=False,
    )
    max_steps: int = parameter(conventions.MAX_STEPS, "Step limit of an episode", low=1, high=100_000, dynamic=False)
    robot: str = parameter("libero", "Robot profile: a name in config/robots or a path", dynamic=False)


class LiberoSim(PlainNode):
    """Runs episodes on a thread of its own (the renderer belongs to one thread); the executor only takes messages.

    Lockstep: an observation and ``/clock`` are published, and the simulation steps when the command with the same stamp
    has come. The wait is bounded; a command that did not come is replaced by no motion and counted. Observations are
    repeated while waiting, so that a lost message or a late subscriber costs time, not the episode. Real time: the
    simulation steps on the system clock, and a command that is late counts.
    """

    def __init__(self) -> None:
        super().__init__("libero_sim")
        self._settings = NodeParameters(self, SimConfig())
        config = self._settings.value
        self._profile = load_profile(config.robot)
        self._changed = threading.Condition()
        self._commands: dict[int, np.ndarray] = {}
        self._planner_instruction: str | None = None
        self._newest_chunk_ns = 0
        self._stopping = False
        self._restart = False
        self._task = config.task
        self._requested_state = config.initial_state
        qos = sensor_qos(config.lockstep)
        profile = self._profile
        self._cameras = {c.name: self.create_publisher(Image, c.topic, qos) for c in profile.cameras}
        self._joints = self.create_publisher(JointState, profile.joint_states_topic, qos)
        self._pose = self.create_publisher(PoseStamped, profile.ee_pose_topic, qos)
        self._instruction = self.create_publisher(String, "instruction", latched_qos(1))
        self._episode = self.create_publisher(EpisodeStatus, "episode", latched_qos(10))
        self._expert = self.create_publisher(JointState, "expert_action", reliable_qos(100)) if config.expert else None
        self._label: np.ndarray | None = None  # the expert's action for the present observation
        self._clock_publisher = self.create_publisher(Clock, "/clock", reliable_qos(1)) if config.lockstep else None
        self.create_subscription(JointState, profile.command_topic, self._on_command, reliable_qos(1))
        if config.lockstep:
            self.create_subscription(PlannerStatus, "planner_status", self._on_status, reliable_qos(10))
        else:
            self.create_subscription(ActionChunkMsg, "action_chunk", self._on_chunk, latched_qos(2))
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(SetTask, "~/set_task", self._on_set_task)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulation")
        self._simulation = self._worker.submit(self._run_episodes)
        self._simulation_over = self.create_guard_condition(self._on_simulation_over)
        self._simulation.add_done_callback(lambda _: self._simulation_over.trigger())

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

    def _on_set_task(self, request: SetTask.Request, response: SetTask.Response) -> SetTask.Response:
        if request.task not in conventions.TASKS:
            response.message = f"task is {request.task}, allowed are 0 to {conventions.TASKS[-1]}"
        elif not -1 <= request.initial_state < conventions.N_INITIAL_STATES:
            response.message = (
                f"initial_state is {request.initial_state}, allowed are -1 to {conventions.N_INITIAL_STATES - 1}"
            )
        else:
            with self._changed:
                self._task, self._requested_state = request.task, request.initial_state
                self._restart = True
                self._changed.notify_all()
            response.success = True
            response.message = f"task {request.task} starts now"
        return response

    def _run_episodes(self) -> None:
        """Runs on the simulation thread."""
        from a2c2_ros.sim.expert import Labeller  # slow to import; the node answers meanwhile
        from a2c2_ros.sim.libero_env import LiberoEnv

        config = self._settings.value
        env: Disturbed | None = None
        episode, start_ns = 0, conventions.STEP_NS
        try:
            while not self._stopping and (config.episodes == 0 or episode < config.episodes):
                with self._changed:
                    self._restart = False
                    task, state = self._task, self._requested_state
                if env is not None and env.task != task:
                    env.close()
                    env = None
                if env is None:
                    env = Disturbed(LiberoEnv(task, motion=config.motion), config.disturbance)
                if state == -1:
                    state = episode % env.n_initial_states
                observation = env.reset(None if state < 0 else state, config.seed + episode)
                labeller = Labeller(env) if config.expert else None
                status = EpisodeStatus(
                    episode=episode,
                    episodes=config.episodes,
                    task=task,
                    initial_state=state,
                    instruction=env.instruction,
                    seed=config.seed + episode,
                )
                self._announce_instruction(env.instruction, first=episode == 0)
                run_episode = self._run_lockstep if config.lockstep else self._run_real_time
                end_ns = run_episode(env, labeller, observation, status, start_ns)
                start_ns = end_ns + round(config.episode_gap_s * 1e9 / conventions.STEP_NS) * conventions.STEP_NS
                if status.phase in (EpisodeStatus.SUCCEEDED, EpisodeStatus.FAILED):
                    episode += 1
                if not config.lockstep and (config.episodes == 0 or episode < config.episodes):
                    self._wait(lambda: False, config.episode_gap_s)
        finally:
            if env is not None:
                env.close()

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

    def _run_lockstep(
        self, env, labeller, observation: dict[str, np.ndarray], status: EpisodeStatus, start_ns: int
    ) -> int:
        """One episode in lockstep from simulated time ``start_ns``; returns its end [ns]."""
        config = self._settings.value
        now_ns = start_ns
        self._publish_phase(status, EpisodeStatus.STARTED, now_ns)
        gripper = conventions.GRIPPER_OPEN
        for step in range(config.max_steps):
            limit_s = config.start_timeout_s if status.episode == 0 and step == 0 else config.lockstep_timeout_s
            self._label = labeller.label(observation) if labeller else None
            action = self._ask(observation, now_ns, limit_s)
            if self._interrupted():
                return self._publish_phase(status, EpisodeStatus.ABORTED, now_ns)
            if action is None:
                status.timeouts += 1
                self.get_logger().warning(f"no command for step {step} within {limit_s:g} s: no motion")
                action = np.append(np.zeros(conventions.ACTION_DIM - 1), gripper)
            gripper = action[-1]
            observation, success = env.step(action)
            now_ns += conventions.STEP_NS
            status.steps = step + 1
            if success:
                return self._publish_phase(status, EpisodeStatus.SUCCEEDED, now_ns)
        return self._publish_phase(status, EpisodeStatus.FAILED, now_ns)

    def _ask(self, observation: dict[str, np.ndarray], now_ns: int, limit_s: float) -> np.ndarray | None:
        """Publish an observation and wait for its command; None if it did not come in time."""
        with self._changed:
            self._commands.clear()
        deadline = time.monotonic() + limit_s
        while True:
            self._publish_observation(observation, now_ns)
            self._clock_publisher.publish(Clock(clock=to_time(now_ns)))
            if self._wait(lambda: now_ns in self._commands, min(0.5, limit_s)):
                with self._changed:
                    return self._commands.get(now_ns)
            if self._interrupted() or time.monotonic() > deadline:
                return None

    def _run_real_time(self, env, labeller, observation: dict[str, np.ndarray], status: EpisodeStatus, _: int) -> int:
        """One episode on the system clock; it starts when the first chunk is there. Returns its end [ns]."""
        config = self._settings.value
        start_ns = self.get_clock().now().nanoseconds
        limit_s = config.start_timeout_s if status.episode == 0 else config.lockstep_timeout_s
        deadline = time.monotonic() + limit_s
        self._label = None
        while self._newest_chunk_ns < start_ns:
            self._publish_observation(observation, self.get_clock().now().nanoseconds)
            if self._interrupted():
                return self._publish_phase(status, EpisodeStatus.ABORTED, start_ns)
            if time.monotonic() > deadline:
                raise SimulationError(f"no action chunk within {limit_s:g} s; is chunk_planner running?")
            self._wait(lambda: self._newest_chunk_ns >= start_ns, conventions.STEP_NS / 1e9)
        self._publish_phase(status, EpisodeStatus.STARTED, self.get_clock().now().nanoseconds)
        gripper = conventions.GRIPPER_OPEN
        next_step = time.monotonic() + conventions.STEP_NS / 1e9
        for step in range(config.max_steps):
            self._label = labeller.label(observation) if labeller else None
            self._publish_observation(observation, self.get_clock().now().nanoseconds)
            self._wait(lambda: False, next_step - time.monotonic())
            now = time.monotonic()
            next_step = max(next_step + conventions.STEP_NS / 1e9, now)
            if self._interrupted():
                return self._publish_phase(status, EpisodeStatus.ABORTED, self.get_clock().now().nanoseconds)
            with self._changed:
                action = self._commands[max(self._commands)] if self._commands else None
                self._commands.clear()
            if action is None:
                status.timeouts += 1
                action = np.append(np.zeros(conventions.ACTION_DIM - 1), gripper)
            gripper = action[-1]
            observation, success = env.step(action)
            status.steps = step + 1
            if success:
                return self._publish_phase(status, EpisodeStatus.SUCCEEDED, self.get_clock().now().nanoseconds)
        return self._publish_phase(status, EpisodeStatus.FAILED, self.get_clock().now().nanoseconds)

    def _wait(self, condition, limit_s: float) -> bool:
        """Wait until the condition holds, the node stops or the time is over; returns whether it holds."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._interrupted(), max(limit_s, 0.0))
            return condition()

    def _interrupted(self) -> bool:
        return self._stopping or self._restart

    def _publish_observation(self, observation: dict[str, np.ndarray], stamp_ns: int) -> None:
        if self._stopping:
            return
        for name, publisher in self._cameras.items():
            publisher.publish(array_to_image(observation[name], stamp_ns, name))
        self._joints.publish(array_to_joint_state(observation["joint_position"], conventions.JOINT_NAMES, stamp_ns))
        self._pose.publish(array_to_pose(observation["ee_pose"], stamp_ns, FRAME))
        if self._label is not None:
            self._expert.publish(array_to_joint_state(self._label, conventions.ACTION_NAMES, stamp_ns))

    def _publish_phase(self, status: EpisodeStatus, phase: int, stamp_ns: int) -> int:
        status.phase = phase
        status.header.stamp = to_time(stamp_ns)
        if not self._stopping:
            self._episode.publish(status)
        return stamp_ns


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(LiberoSim, args))


if __name__ == "__main__":
    main()
