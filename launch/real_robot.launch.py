"""Planner and controller of a robot, or of its mock: ``ros2 launch a2c2_ros real_robot.launch.py mock:=true``."""

from a2c2_ros.launch_files import describe


def generate_launch_description():
    """See ``a2c2_ros.launching.real_robot``."""
    return describe("real_robot")
