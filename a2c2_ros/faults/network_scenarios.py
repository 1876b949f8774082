"""Named faults of the network: the planner in a network namespace of its own, joined by a cable that can be cut."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from std_msgs.msg import String

from a2c2_ros.core.safety import MOVING, Reason, State
from a2c2_ros.faults.base import SkippedError, closing, group, scenario
from a2c2_ros.faults.dds import RobotFile, System, World, free_domain
from a2c2_ros.faults.libero_scenarios import INSTRUCTION, PLANNER, RATE_HZ, RECORDER, LiberoBench
from a2c2_ros.faults.namespaces import inside, ip
from a2c2_ros.paths import robot_profile

ENVIRONMENT = {
    "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",  # of the namespaces, which nobody else can reach
    "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4",  # shared memory would go round the cable
}


class Cable:
    """Two network namespaces with one cable between them, gone at the end.

    Raises:
        SkippedError: If they cannot be made, which needs root.
    """

    def __init__(self) -> None:
        mark = f"a2c2{os.getpid() % 100_000}"
        self.robot, self.policy = f"{mark}r", f"{mark}p"
        self._ends = {self.robot: (f"{mark}a", "10.199.7.1/24"), self.policy: (f"{mark}b", "10.199.7.2/24")}
        try:
            for name in self._ends:
                ip("netns", "add", name)
            (robot_end, _), (policy_end, _) = self._ends.values()
            # Made inside: no interface of this machine is touched.
            ip("-n", self.robot, "link", "add", robot_end, "type", "veth", "peer", "name", policy_end)
            ip("-n", self.robot, "link", "set", policy_end, "netns", self.policy)
            for name, (end, address) in self._ends.items():
                ip("-n", name, "address", "add", address, "dev", end)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", end, "up", "multicast", "on")
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise SkippedError(f"no network namespaces: {getattr(error, 'stderr', '') or error}") from error

    def connect(self, connected: bool) -> None:
        """Plug the cable in, or cut it."""
        ip("-n", self.policy, "link", "set", self._ends[self.policy][0], "up" if connected else "down")

    def close(self) -> None:
        """Remove the namespaces, and the cable with them."""
        for name in self._ends:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class NetworkBench(LiberoBench):
    """As LIBERO's, with the planner on the other end of a cable."""

    def __init__(self, folder: Path, system: System, world: World, cable: Cable) -> None:
        super().__init__(folder, system, world)
        self.cable = cable

    def start_planner(self, name: str = PLANNER) -> None:
        """Start the planner in its namespace."""
        parameters = {"execution_horizon": 20, "inference_delay": 0}
        self.system.start(name, PLANNER, parameters, before=("ip", "netns", "exec", self.cable.policy))

    def start_recorder(self) -> None:
        """Start a recorder beside the planner: it takes everything that the controller publishes."""
        parameters = {"out": self.folder / "run"}
        self.system.start(RECORDER, RECORDER, parameters, before=("ip", "netns", "exec", self.cable.policy))


@group("network")
def _network(folder: Path) -> Iterator[NetworkBench]:
    robot = RobotFile.read(robot_profile("libero"), RATE_HZ)
    domain_id = free_domain()
    kept = {name: os.environ.get(name) for name in ENVIRONMENT}
    cable = Cable()
    with closing(cable), inside(cable.robot):
        os.environ.update(ENVIRONMENT)
        try:
            system = System(folder, domain_id, ENVIRONMENT)
            # What was lost is sent again after seconds.
            world = World(system, domain_id, robot, settled_s=4.0, commands_get_lost=True)
            with closing(system, world):
                bench = NetworkBench(folder, system, world, cable)
                bench.start_controller()
                bench.start_planner()
                bench.start_recorder()
                world.instruction.publish(String(data=INSTRUCTION))
                world.wait_for(lambda: bool(world.steps), "the first step", 90.0)
                world.wait_for(lambda: world.steps[-1].state in MOVING, "the first motion", 90.0)
                yield bench
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@scenario(
    "network",
    "network cut between planner and controller",
    "planner and recorder are on the other end of a cable that is cut for 5 s",
    "HOLDING CHUNK_EXPIRED, then moving",
)
def _cut(bench: NetworkBench) -> str:
    world = bench.world
    bench.cable.connect(False)
    cut_s = time.monotonic()
    world.wait_state(State.HOLDING, Reason.CHUNK_EXPIRED)
    left_s = 5.0 - (time.monotonic() - cut_s)
    world.stays(max(left_s, 0.5), lambda s: s.state == State.HOLDING, "it stays HOLDING")
    bench.cable.connect(True)
    connected_s = time.monotonic()
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion", 60.0)
    return f"moving {time.monotonic() - connected_s:.1f} s after the cable was plugged in"
