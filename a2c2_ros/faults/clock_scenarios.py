"""Named faults of the clock: a real controller on simulated time, the world is the clock."""

from collections.abc import Iterator
from pathlib import Path

from a2c2_ros.core.safety import MOVING, Reason, State
from a2c2_ros.faults.arm_scenarios import ARM_HORIZON, ARM_RATE_HZ, write_arm_profile
from a2c2_ros.faults.base import STALE, NodeBench, closing, group, must, scenario
from a2c2_ros.faults.dds import CONTROLLER, RobotFile, System, World, free_domain


@group("clock")
def _clock(folder: Path) -> Iterator[NodeBench]:
    path = write_arm_profile(folder / "arm.yaml", simulated=True)
    domain_id = free_domain()
    system = System(folder, domain_id)
    world = World(system, domain_id, RobotFile.read(path, ARM_RATE_HZ), simulated_time=True)
    with closing(system, world):
        parameters = {
            "robot": path,
            "control_rate_hz": ARM_RATE_HZ,
            "correction.enabled": False,
            "correction.model_path": "",
            "use_sim_time": True,
        }
        system.start(CONTROLLER, CONTROLLER, parameters)
        world.wait_for(lambda: bool(world.steps), "the first step", 60.0)
        world.plan(ARM_HORIZON, period_s=0.4)
        yield NodeBench(folder, system, world)


@scenario("clock", "clock stopped", "/clock falls silent for 1.5 s", "HOLDING CLOCK_STOPPED, then moving")
def _stopped(bench: NodeBench) -> None:
    world = bench.world
    world.clock_stopped = True
    bench.fault_begins()
    world.wait_state(State.HOLDING, Reason.CLOCK_STOPPED)
    world.stays(1.0, lambda s: s.state == State.HOLDING, "it stays HOLDING")
    world.clock_stopped = False
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")


@scenario(
    "clock",
    "clock back",
    "/clock goes back by 30 s",
    "HOLDING CLOCK_JUMPED, then NO_CHUNK: nothing from before is used; then moving",
)
def _back(bench: NodeBench) -> None:
    world = bench.world
    world.sim_ns -= 30_000_000_000
    bench.fault_begins()
    world.wait_state(State.HOLDING, Reason.CLOCK_JUMPED)
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")


@scenario(
    "clock",
    "clock back by 0.6 s",
    "/clock goes back by less than the buffer notices; samples with the old time are on their way",
    "HOLDING, then moving",
)
def _back_a_little(bench: NodeBench) -> None:
    world = bench.world
    world.sim_ns -= 600_000_000
    bench.fault_begins()
    world.wait_state(State.HOLDING, Reason.CLOCK_JUMPED)
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")


@scenario(
    "clock",
    "clock back by less than a period, then stopped",
    "/clock goes back by 15 ms and falls silent",
    "HOLDING CLOCK_STOPPED, then moving",
)
def _back_and_stopped(bench: NodeBench) -> None:
    world = bench.world
    world.sim_ns -= 15_000_000
    world.publish_clock()
    world.clock_stopped = True
    bench.fault_begins()
    world.wait_state(State.HOLDING, Reason.CLOCK_STOPPED)
    world.clock_stopped = False
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")


@scenario("clock", "clock forward", "/clock goes on by 60 s", "HOLDING: everything is stale; then moving")
def _forward(bench: NodeBench) -> None:
    world = bench.world
    world.sim_ns += 60_000_000_000
    bench.fault_begins()
    held = world.wait_state(State.HOLDING)
    must(held.reason in (*STALE, Reason.CHUNK_EXPIRED), f"stale data, not {held.reason.name}")
    world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")
