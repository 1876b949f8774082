"""Parameters of the simulator nodes, for the nodes and for what starts them."""

from dataclasses import dataclass

from a2c2_ros.core.config import Parameters, parameter
from a2c2_ros.sim import conventions


@dataclass(frozen=True)
class SimulatorConfig(Parameters):
    """Parameters of every simulator."""

    episodes: int = parameter(2, "Episodes to run; 0: until stopped", low=0, high=100_000, dynamic=False)
    lockstep: bool = parameter(True, "Wait for the command of every step; else step on the clock", dynamic=False)
    lockstep_timeout_s: float = parameter(5.0, "Longest wait for a command in lockstep [s]", low=0.1, high=600.0)
    start_timeout_s: float = parameter(
        120.0, "Longest wait for planner and controller at the start [s]", low=1.0, high=3600.0
    )
    episode_gap_s: float = parameter(
        5.0,
        "Pause between episodes on the ROS clock [s]; longer than a chunk, so that none outlives its episode",
        low=0.0,
        high=600.0,
        dynamic=False,
    )


@dataclass(frozen=True)
class LiberoSimConfig(SimulatorConfig):
    """Parameters of ``libero_sim``."""

    task: int = parameter(0, "LIBERO Spatial task", low=0, high=9, dynamic=False)
    initial_state: int = parameter(
        -1,
        "Official initial state; -1: the episode's number in turn; -2: sampled from the episode's seed",
        low=-2,
        high=49,
        dynamic=False,
    )
    seed: int = parameter(0, "Seed of the fixtures; episode n uses seed + n", low=0, high=2**31 - 1, dynamic=False)
    motion: str = parameter(
        "none",
        "What the plate does: nothing, slide all the time (drift), or once (push)",
        choices=conventions.MOTIONS,
        dynamic=False,
    )
    suite: str = parameter(
        conventions.SUITE,
        "LIBERO Spatial, or LIBERO-PRO's form of it with two objects in each other's place",
        choices=conventions.SUITES,
        dynamic=False,
    )
    disturbance: float = parameter(
        0.0, "Strength of pushes that the arm gets now and then, drawn from the seed", low=0.0, high=1.0, dynamic=False
    )
    expert: bool = parameter(
        False, "Publish what the scripted expert would do as expert_action, for training", dynamic=False
    )
    takeover_after_steps: int = parameter(
        -1,
        "After so many steps of an episode the scripted expert commands by the topic takeover, as a person would; "
        "-1: never",
        low=-1,
        high=100_000,
        dynamic=False,
    )
    max_steps: int = parameter(conventions.MAX_STEPS, "Step limit of an episode", low=1, high=100_000, dynamic=False)
    robot: str = parameter("libero", "Robot profile: a name in config/robots or a path", dynamic=False)


@dataclass(frozen=True)
class KinetixSimConfig(SimulatorConfig):
    """Parameters of ``kinetix_sim``."""

    level: str = parameter("", "Level file of Kinetix, JSON", dynamic=False)
    seed: int = parameter(0, "Seed of the noise; episode n uses seed + n", low=0, high=2**31 - 1, dynamic=False)
    max_steps: int = parameter(256, "Step limit of an episode", low=1, high=256, dynamic=False)
    robot: str = parameter("", "Robot profile of the level, as training.kinetix writes it", dynamic=False)
