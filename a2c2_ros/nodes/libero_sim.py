"""Node ``libero_sim``: real LIBERO tasks behind the topics of a robot."""

import sys

import numpy as np
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState

from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.msg import EpisodeStatus
from a2c2_ros.nodes.conversions import array_to_image, array_to_joint_state, array_to_pose
from a2c2_ros.nodes.runtime import reliable_qos, run, sensor_qos
from a2c2_ros.nodes.simulator import Observation, SimulatorNode, SimulatorStep
from a2c2_ros.sim import conventions
from a2c2_ros.sim.disturbance import Disturbed
from a2c2_ros.sim.parameters import LiberoSimConfig
from a2c2_ros.srv import SetTask

FRAME = "world"


class LiberoSim(SimulatorNode):
    """LIBERO Spatial; ``~/set_task`` chooses another task and initial state."""

    def __init__(self) -> None:
        super().__init__("libero_sim", LiberoSimConfig())
        config = self._settings.value
        profile = load_profile(config.robot)
        self._env: Disturbed | None = None
        self._labeller = None
        self._label: np.ndarray | None = None  # the expert's action for the present observation
        self._status = EpisodeStatus()  # of the present episode
        self._task = config.task
        self._requested_state = config.initial_state
        qos = sensor_qos(config.lockstep)
        self._cameras = {c.name: self.create_publisher(Image, c.topic, qos) for c in profile.cameras}
        self._joints = self.create_publisher(JointState, profile.joint_topics[0].topic, qos)
        self._pose = self.create_publisher(PoseStamped, profile.ee_pose_topic, qos)
        self._expert = self.create_publisher(JointState, "expert_action", reliable_qos(100)) if config.expert else None
        takes_over = config.takeover_after_steps >= 0
        self._takeover = self.create_publisher(JointState, "takeover", reliable_qos(1)) if takes_over else None
        self.create_service(SetTask, "~/set_task", self._on_set_task)
        self.start(profile, conventions.STEP_NS)

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

    def _begin(self, episode: int) -> tuple[Observation, EpisodeStatus]:
        from a2c2_ros.sim.expert import Labeller  # slow to import; the node answers meanwhile
        from a2c2_ros.sim.libero_env import LiberoEnv

        config = self._settings.value
        with self._changed:
            task, state = self._task, self._requested_state
        if self._env is not None and self._env.task != task:
            self._finish()
        if self._env is None:
            self._env = Disturbed(LiberoEnv(task, motion=config.motion, suite=config.suite), config.disturbance)
        if state == -1:
            state = episode % self._env.n_initial_states
        seed = config.seed + episode
        observation = self._env.reset(None if state < 0 else state, seed)
        self._labeller, self._label = Labeller(self._env) if self._expert or self._takeover else None, None
        instruction = self._env.instruction
        self._status = EpisodeStatus(task=task, initial_state=state, instruction=instruction, seed=seed)
        return observation, self._status

    def _look(self, observation: Observation) -> None:
        self._label = self._labeller.label(observation) if self._labeller else None

    def _step(self, action: np.ndarray) -> SimulatorStep:
        observation, success = self._env.step(action)
        return SimulatorStep(observation, success, success)

    def _no_motion(self, last: np.ndarray | None) -> np.ndarray:
        gripper = conventions.GRIPPER_OPEN if last is None else last[-1]
        return np.append(np.zeros(conventions.ACTION_DIM - 1), gripper)

    def _publish_observation(self, observation: Observation, stamp_ns: int) -> None:
        label = self._label
        if label is not None:
            label = array_to_joint_state(label, conventions.ACTION_NAMES, stamp_ns)
            if self._takeover and self._status.steps >= self._settings.value.takeover_after_steps:
                self._takeover.publish(label)
        for name, publisher in self._cameras.items():
            publisher.publish(array_to_image(observation[name], stamp_ns, name))
        self._joints.publish(array_to_joint_state(observation["joint_position"], conventions.JOINT_NAMES, stamp_ns))
        self._pose.publish(array_to_pose(observation["ee_pose"], stamp_ns, FRAME))
        if label is not None and self._expert:
            self._expert.publish(label)

    def _finish(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(LiberoSim, args))


if __name__ == "__main__":
    main()
