"""Node ``mock_robot``: a simulated arm behind the topics of a robot profile, as the real driver offers them."""

import sys
from dataclasses import dataclass

import cv2
import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, String
from trajectory_msgs.msg import JointTrajectory

from a2c2_ros.core.config import FUTURE_TOLERANCE_S, ControllerConfig, Parameters, parameter
from a2c2_ros.core.errors import A2C2Error, ConfigError, ObservationError
from a2c2_ros.drivers.profile import CommandSpec, GripperSpec, load_profile
from a2c2_ros.msg import EpisodeStatus
from a2c2_ros.nodes.command_sinks import MESSAGES
from a2c2_ros.nodes.conversions import array_to_image, array_to_joint_state, array_to_pose, to_ns, to_time
from a2c2_ros.nodes.realtime import LatestWorker
from a2c2_ros.nodes.runtime import (
    EdgeLog,
    NodeParameters,
    PlainNode,
    latched_qos,
    reliable_qos,
    run,
    sensor_qos,
)
from a2c2_ros.sim.arms import Arm, Cameras, arm_of
from a2c2_ros.sim.reach import INSTRUCTIONS, MAX_STEPS, Pushes, ReachTask


@dataclass(frozen=True)
class MockConfig(Parameters):
    """Parameters of ``mock_robot``."""

    robot: str = parameter("panda_servo", "Robot profile: a name in config/robots or a path", dynamic=False)
    sensor_rate_hz: float = parameter(
        100.0, "Joint states and poses per second [Hz]", low=1.0, high=500.0, dynamic=False
    )
    camera_rate_hz: float = parameter(20.0, "Images per second [Hz]", low=0.1, high=100.0, dynamic=False)
    latency_s: float = parameter(0.02, "From a command to its effect [s]", low=0.0, high=1.0, dynamic=False)
    command_max_age_s: float = parameter(0.2, "Older stamped commands are refused [s]", low=0.01, high=10.0)
    noise_rad: float = parameter(
        0.0005, "Standard deviation of measured joint positions [rad]", low=0.0, high=0.1, dynamic=False
    )
    seed: int = parameter(0, "Seed of the noise and the pushes", low=0, high=2**31 - 1, dynamic=False)
    episodes: int = parameter(
        0, "Episodes of the reaching task; 0: none, the arm alone", low=0, high=100_000, dynamic=False
    )
    max_steps: int = parameter(MAX_STEPS, "Step limit of an episode", low=1, high=100_000, dynamic=False)
    push_speed_m_s: float = parameter(
        0.0, "Somebody pushes the arm now and then with this speed [m/s]", low=0.0, high=1.0, dynamic=False
    )


class MockRobot(PlainNode):
    """An arm on the system clock: commands in, joint states, poses and images out, and a task to try a policy on.

    A command that is stale, from the future, not finite or for other joints is refused and logged, and changes nothing.
    An episode begins with the first command after its instruction: a controller that is not enabled sends none.
    """

    def __init__(self) -> None:
        super().__init__("mock_robot")
        self._settings = NodeParameters(self, MockConfig())
        config = self._settings.value
        self._profile = profile = load_profile(config.robot)
        if config.episodes and profile.ee_pose_topic is None:
            raise ConfigError(
                f"episodes is {config.episodes}, a profile without state ee_pose_gripper allows 0: {profile.robot.name}"
            )
        self._log = EdgeLog(self)
        name = arm_of(profile.joint_names)
        self._arm = Arm(
            name, latency_s=config.latency_s, noise_rad=config.noise_rad, seed=config.seed, start_ns=self._now_ns()
        )
        self._task = ReachTask()
        self._pushes = Pushes(np.random.default_rng(config.seed), config.push_speed_m_s)
        self._status: EpisodeStatus | None = None
        self._commanded = False
        apart = [name for joints in profile.joint_topics[1:] for name in joints.names]
        self._joints = {}  # publisher to its joints; the first driver publishes all that it has
        for joints in profile.joint_topics:
            others = [name for name in self._arm.joint_names if name not in apart]
            names = others if joints.stream == "joint_position" else joints.names
            self._joints[self.create_publisher(JointState, joints.topic, reliable_qos(1))] = names
        self._pose = None
        if profile.ee_pose_topic is not None:
            self._pose = self.create_publisher(PoseStamped, profile.ee_pose_topic, reliable_qos(1))
        self._take(profile.command)
        if profile.gripper is not None:
            self._take(profile.gripper)
        self.create_timer(1.0 / config.sensor_rate_hz, self._on_time, clock=self.system_clock)
        if profile.ready_topic is not None:
            self.create_publisher(Bool, profile.ready_topic, latched_qos(1)).publish(Bool(data=True))
        self._worker = None
        if profile.cameras:
            self._cameras: Cameras | None = None
            self._images = {
                camera.name: self.create_publisher(
                    CompressedImage if camera.transport == "compressed" else Image, camera.topic, sensor_qos(False)
                )
                for camera in profile.cameras
            }
            self._worker = LatestWorker(lambda _, stamp_ns: self._look(name, stamp_ns))
            self.create_timer(1.0 / config.camera_rate_hz, self._ask_to_look, clock=self.system_clock)
        if config.episodes:
            self._instruction = self.create_publisher(String, "instruction", latched_qos(1))
            self._episode = self.create_publisher(EpisodeStatus, "episode", latched_qos(10))
            period_s = 1.0 / (profile.control_rate_hz or ControllerConfig().control_rate_hz)
            self._steps = self.create_timer(period_s, self._on_step, clock=self.system_clock)
            self._announce(0)
        self.get_logger().info(f"{name} with the topics of {profile.robot.name}: {profile.command.kind} commands")

    def close(self) -> None:
        """Stop rendering; the node is about to be destroyed."""
        if self._worker is not None:
            self._worker.stop()

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    # --- commands -----------------------------------------------------------------------------------------------

    def _take(self, spec: CommandSpec | GripperSpec) -> None:
        """Subscribe to the commands of the arm or of the gripper.

        Raises:
            ConfigError: If the profile's kind is none that the mock offers.
        """
        if spec.kind not in MESSAGES:
            raise ConfigError(f"the mock has no gripper of kind {spec.kind!r}, allowed are {sorted(MESSAGES)}")
        fingers = self._arm.joint_names[len(self._arm.arm_joints) :]
        names = spec.joints if isinstance(spec, CommandSpec) else fingers[:1]
        convert = {
            "joint_state": lambda m: self._follow(m.name, [m.position], None),
            "joint_trajectory": self._follow_trajectory,
            "float64_multi_array": lambda m: self._follow(names, [m.data], None),
            "twist_stamped": self._servo,
        }[spec.kind]
        stamped = spec.kind in ("joint_state", "twist_stamped")

        def take(message) -> None:
            now_ns = self._now_ns()
            self._arm.advance(now_ns)
            try:
                if stamped:
                    self._check_age((now_ns - to_ns(message.header.stamp)) / 1e9)
                convert(message)
            except A2C2Error as error:
                self._log.problem(spec.topic, f"command on {spec.topic} refused: {error}")
                return
            self._log.fine(spec.topic)
            self._commanded = True

        self.create_subscription(MESSAGES[spec.kind].message_type, spec.topic, take, reliable_qos(1))

    def _check_age(self, age_s: float) -> None:
        limit_s = self._settings.value.command_max_age_s
        if not -FUTURE_TOLERANCE_S <= age_s <= limit_s:
            raise ObservationError(f"it is {age_s:.3f} s old, allowed is {-FUTURE_TOLERANCE_S} to {limit_s}")

    def _servo(self, message: TwistStamped) -> None:
        frame = self._profile.command.frame_id
        if message.header.frame_id != frame:
            raise ObservationError(f"its frame is {message.header.frame_id!r}, allowed is {frame!r}")
        linear, angular = message.twist.linear, message.twist.angular
        self._arm.twist(np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z]))

    def _follow_trajectory(self, message: JointTrajectory) -> None:
        now_ns = self._now_ns()
        start_ns = to_ns(message.header.stamp) or now_ns
        times = [start_ns + to_ns(point.time_from_start) for point in message.points]
        if not times or times[-1] <= now_ns:
            raise ObservationError("the trajectory has no point, or all of it is over")
        self._follow(message.joint_names, [point.positions for point in message.points], times)

    def _follow(self, names, rows, times_ns: list[int] | None) -> None:
        """Positions by joint name; a finger may be among them or alone."""
        positions = np.array([list(row) for row in rows], dtype=np.float64)
        if positions.ndim != 2 or positions.shape[1] != len(names):
            raise ObservationError(f"it has {positions.shape} values for the joints {list(names)}")
        columns = {name: positions[:, i] for i, name in enumerate(names)}
        arm, finger = self._arm.arm_joints, self._arm.joint_names[len(self._arm.arm_joints)]
        given = [name for name in arm if name in columns]
        if unknown := set(columns) - {*arm, finger}:
            raise ObservationError(f"it has the joints {sorted(unknown)}, allowed are {[*arm, finger]}")
        if given and given != list(arm):
            raise ObservationError(f"it has only {given} of the joints {list(arm)}")
        if not np.isfinite(positions).all():
            raise ObservationError("a position is not finite")
        if given:
            self._arm.move(np.stack([columns[name] for name in arm], axis=1), times_ns)
        if finger in columns:
            self._arm.grip(float(columns[finger][-1]))

    # --- sensors ------------------------------------------------------------------------------------------------

    def _on_time(self) -> None:
        now_ns = self._now_ns()
        self._arm.advance(now_ns)
        positions, pose = self._arm.measure()
        rows = dict(zip(self._arm.joint_names, zip(positions, self._arm.velocity, strict=True), strict=True))
        for publisher, names in self._joints.items():
            message = array_to_joint_state([rows[name][0] for name in names], names, now_ns)
            message.velocity = [float(rows[name][1]) for name in names]
            publisher.publish(message)
        if self._pose is not None:
            self._pose.publish(array_to_pose(pose, now_ns, self._profile.ee_pose_frame or "base"))

    def _ask_to_look(self) -> None:
        self._worker.submit("look", self._now_ns())

    def _look(self, name: str, stamp_ns: int) -> None:
        """Runs on the worker's thread, which owns the renderer."""
        try:
            if self._cameras is None:
                self._cameras = Cameras(name, {c.name: (c.height, c.width) for c in self._profile.cameras})
            images = self._cameras.render(self._arm.position)
        except A2C2Error as error:
            self._log.problem("cameras", str(error))
            return
        for camera in self._profile.cameras:
            message = array_to_image(images[camera.name], stamp_ns, camera.name)
            if camera.transport == "compressed":
                _, data = cv2.imencode(".jpg", images[camera.name][:, :, ::-1])
                message = CompressedImage(header=message.header, format="jpeg", data=data.tobytes())
            self._images[camera.name].publish(message)

    # --- the task -----------------------------------------------------------------------------------------------

    def _announce(self, episode: int) -> None:
        config = self._settings.value
        if episode == config.episodes:
            self._status = None
            self._steps.cancel()
            return
        instruction = self._task.start(episode)
        self._commanded = False
        self._status = EpisodeStatus(
            episode=episode,
            episodes=config.episodes,
            task=episode % len(INSTRUCTIONS),
            instruction=instruction,
            seed=config.seed,
            phase=EpisodeStatus.ABORTED,  # until it starts
        )
        self._instruction.publish(String(data=instruction))

    def _on_step(self) -> None:
        status, started = self._status, self._status.phase == EpisodeStatus.STARTED
        if not started:
            if self._commanded:
                self._publish_phase(EpisodeStatus.STARTED)
            return
        self._pushes.step(self._arm)
        status.steps += 1
        status.timeouts += not self._commanded
        self._commanded = False
        streams = self._profile.joint_streams
        values = self._arm.by_stream(self._arm.position, streams) | {"ee_pose": self._arm.centre}
        if self._task.update(self._profile.robot.state_of(values)[:3]):
            self._end(EpisodeStatus.SUCCEEDED)
        elif status.steps >= self._settings.value.max_steps:
            self._end(EpisodeStatus.FAILED)

    def _end(self, phase: int) -> None:
        self._publish_phase(phase)
        self._announce(self._status.episode + 1)

    def _publish_phase(self, phase: int) -> None:
        self._status.phase = phase
        self._status.header.stamp = to_time(self._now_ns())
        self._episode.publish(self._status)


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(MockRobot, args))


if __name__ == "__main__":
    main()
