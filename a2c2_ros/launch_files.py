"""A system of ``a2c2_ros.launching`` as a launch description; all that the launch files consist of."""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    GroupAction,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import Node

from a2c2_ros.bringup import KILL_S, TERMINATE_S
from a2c2_ros.launching import CLOSED, SYSTEMS, parse_arguments

SHUTDOWN = "shutdown_on_exit"


def describe(name: str) -> LaunchDescription:
    """Arguments of the system's table, then its nodes, and what their exit means.

    Other machines are shut out unless the environment says otherwise, as in ``a2c2_ros.bringup``; that holds for these
    nodes only, not for those of a launch file that includes this one.

    Args:
        name: Key of ``SYSTEMS``.
    """
    table, build = SYSTEMS[name]

    def start_nodes(context) -> list:
        given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in table}
        system = build(parse_arguments(table, given))
        ends_all = LaunchConfiguration(SHUTDOWN).perform(context) == "true"

        def on_exit(event, context) -> list:
            if not ends_all:
                return []
            if event.process_name.startswith(system.ends):
                return [Shutdown(reason="the run is over")]
            return [Shutdown(reason=f"{event.process_name} failed")] if event.returncode else []

        actions = [LogInfo(msg=f"run folder: {system.out}")]
        actions += [LogInfo(msg=[f"{name}=", EnvironmentVariable(name)]) for name in CLOSED]
        for process in system.processes:
            node = Node(
                package="a2c2_ros",
                executable=process.executable,
                name=process.name,
                parameters=[*map(str, process.parameter_files), process.parameters],
                output="screen",
                emulate_tty=True,
                sigterm_timeout=f"{TERMINATE_S:g}",
                sigkill_timeout=f"{KILL_S:g}",
            )
            actions += [RegisterEventHandler(OnProcessExit(target_action=node, on_exit=on_exit)), node]
        return actions

    declarations = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default_text,
            description=f"{argument.description} ({argument.allowed})",
            choices=argument.choices,
        )
        for argument in table
    ]
    declarations.append(
        DeclareLaunchArgument(
            SHUTDOWN,
            default_value="true",
            description="The end of the run, or of a node with an error, ends everything (false: for including it)",
            choices=["true", "false"],
        )
    )
    closed = [SetEnvironmentVariable(n, EnvironmentVariable(n, default_value=v)) for n, v in CLOSED.items()]
    return LaunchDescription([*declarations, GroupAction([*closed, OpaqueFunction(function=start_nodes)])])
