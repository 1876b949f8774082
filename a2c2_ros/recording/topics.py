"""What a recording of a run holds: one list, for ``episode_recorder`` and for ``ros2 bag record``.

``ros2 bag record -s mcap --topics $(python -m a2c2_ros.recording.topics --robot libero)`` records what the node does.
"""

import argparse
import sys
from collections.abc import Sequence

import yaml

from a2c2_ros.commands import command
from a2c2_ros.drivers.profile import GRIPPER_ACTION_KINDS, Profile, load_profile

LATCHED = ("instruction", "action_chunk", "control_configuration", "episode")
OF_NODES = (*LATCHED, "control_step", "planner_timing")
OF_OTHERS = ("takeover", "expert_action", "emergency_stop", "/parameter_events", "/diagnostics", "/clock")
DEPTH = 1000
"""Messages that wait for the recorder: a burst of seconds at the control rate."""


def recorded_topics(profile: Profile) -> tuple[str, ...]:
    """Names of the recorded topics, relative as the nodes use them: the robot's, those of our nodes, those of others.

    A name whose topic does not exist in a run is recorded when its first publisher appears, and costs nothing before.
    """
    robot = [camera.topic for camera in profile.cameras]
    robot += [joints.topic for joints in profile.joint_topics]
    robot += [profile.ee_pose_topic, profile.ready_topic, profile.command_topic]
    if profile.gripper is not None and profile.gripper.kind not in GRIPPER_ACTION_KINDS:  # bags hold no goals
        robot.append(profile.gripper.topic)
    return tuple(dict.fromkeys(name for name in (*robot, *OF_NODES, *OF_OTHERS) if name is not None))


def absolute(name: str, namespace: str = "/") -> str:
    """Full name of a topic for nodes in ``namespace``."""
    return name if name.startswith("/") else f"{namespace.rstrip('/')}/{name}"


def qos_overrides(namespace: str = "/") -> dict[str, dict[str, str | int]]:
    """QoS of our nodes' topics for ``ros2 bag record --qos-profile-overrides-path``.

    rosbag2 takes reliability and durability from the publishers by itself, but keeps only 10 messages of a burst.
    """
    return {
        absolute(name, namespace): {
            "history": "keep_last",
            "depth": DEPTH,
            "reliability": "reliable",
            "durability": "transient_local" if name in LATCHED else "volatile",
        }
        for name in OF_NODES
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.recording.topics", description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="libero", help="profile: a name in config/robots or a path (libero)")
    parser.add_argument("--namespace", default="/", help="of the nodes (/)")
    parser.add_argument("--qos", action="store_true", help="print the QoS overrides (YAML) instead of the names")
    args = parser.parse_args(argv)
    names = [absolute(name, args.namespace) for name in recorded_topics(load_profile(args.robot))]
    print(yaml.safe_dump(qos_overrides(args.namespace), sort_keys=False).strip() if args.qos else "\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
