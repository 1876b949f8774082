"""LIBERO simulation with planner, controller and monitor: ``ros2 launch a2c2_ros libero_sim.launch.py task:=0``."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, RegisterEventHandler, Shutdown
from launch.event_handlers import OnProcessExit
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from a2c2_ros.launching import LIBERO_SIM_ARGUMENTS, libero_sim, parse_arguments


def start_nodes(context):
    """Nodes of the system that the arguments describe, and what their exit means."""
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in LIBERO_SIM_ARGUMENTS}
    system = libero_sim(parse_arguments(LIBERO_SIM_ARGUMENTS, given))

    def on_exit(event, context):
        if event.process_name.startswith(system.ends):
            return [Shutdown(reason="the run is over")]
        return [Shutdown(reason=f"{event.process_name} failed")] if event.returncode else []

    actions = [LogInfo(msg=f"run folder: {system.out}")]
    for process in system.processes:
        node = Node(
            package="a2c2_ros",
            executable=process.executable,
            name=process.name,
            parameters=[*map(str, process.parameter_files), process.parameters],
            output="screen",
            emulate_tty=True,
            sigterm_timeout="10",
            sigkill_timeout="10",
        )
        actions += [RegisterEventHandler(OnProcessExit(target_action=node, on_exit=on_exit)), node]
    return actions


def generate_launch_description():
    """Arguments of the table, then the nodes."""
    declarations = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default_text,
            description=f"{argument.description} ({argument.allowed})",
            choices=argument.choices,
        )
        for argument in LIBERO_SIM_ARGUMENTS
    ]
    return LaunchDescription([*declarations, OpaqueFunction(function=start_nodes)])
