"""A Kinetix level with planner, controller and monitor: ``ros2 launch a2c2_ros kinetix_sim.launch.py level:=FILE``."""

from a2c2_ros.launch_files import describe


def generate_launch_description():
    """See ``a2c2_ros.launching.kinetix_sim``."""
    return describe("kinetix_sim")
