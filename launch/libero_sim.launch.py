"""LIBERO simulation with planner, controller and monitor: ``ros2 launch a2c2_ros libero_sim.launch.py task:=0``."""

from a2c2_ros.launch_files import describe


def generate_launch_description():
    """See ``a2c2_ros.launching.libero_sim``."""
    return describe("libero_sim")
