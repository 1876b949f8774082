"""Node ``kinetix_sim``: a Kinetix level behind the topics of a robot whose joints are the level's moving bodies."""

import sys

import numpy as np
from sensor_msgs.msg import JointState

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.msg import EpisodeStatus
from a2c2_ros.nodes.conversions import array_to_joint_state
from a2c2_ros.nodes.runtime import run, sensor_qos
from a2c2_ros.nodes.simulator import Observation, SimulatorNode, SimulatorStep
from a2c2_ros.sim.parameters import KinetixSimConfig


class KinetixSim(SimulatorNode):
    """One environment of a level; its physics is computed ahead of the first episode, which takes half a minute."""

    def __init__(self) -> None:
        super().__init__("kinetix_sim", KinetixSimConfig())
        config = self._settings.value
        from a2c2_ros.sim.kinetix_env import STEP_NS, KinetixEnv
        from a2c2_ros.sim.kinetix_level import load_level

        profile = load_profile(config.robot)
        self._env = KinetixEnv(load_level(config.level))
        for name, theirs in (
            ("joint_states.names", profile.joint_names),
            ("action.names", profile.robot.action_names),
        ):
            mine = self._env.state_names if name == "joint_states.names" else self._env.action_names
            if tuple(theirs) != mine:
                raise ConfigError(f"robot {config.robot}: {name} is {list(theirs)}, the level has {list(mine)}")
        self._joints = self.create_publisher(JointState, profile.joint_topics[0].topic, sensor_qos(config.lockstep))
        self._env.compile(1)
        self.start(profile, STEP_NS)

    def _begin(self, episode: int) -> tuple[Observation, EpisodeStatus]:
        self._batch, state = self._env.reset(1)
        self._seed, self._count = self._settings.value.seed + episode, 0
        status = EpisodeStatus(initial_state=-1, instruction=self._env.name, seed=self._seed)
        return {"joint_position": state[0]}, status

    def _step(self, action: np.ndarray) -> SimulatorStep:
        stepped = self._env.step(self._batch, action[None], (self._seed, self._count))
        self._batch, self._count = stepped.batch, self._count + 1
        return SimulatorStep({"joint_position": stepped.state[0]}, bool(stepped.solved[0]), bool(stepped.ended[0]))

    def _no_motion(self, last: np.ndarray | None) -> np.ndarray:
        return np.zeros(len(self._env.action_names))

    def _publish_observation(self, observation: Observation, stamp_ns: int) -> None:
        self._joints.publish(array_to_joint_state(observation["joint_position"], self._env.state_names, stamp_ns))


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(KinetixSim, args))


if __name__ == "__main__":
    main()
