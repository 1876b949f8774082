"""Numbers and names of the LIBERO Spatial robot that every part must agree on. Needs nothing but numpy."""

import numpy as np

from a2c2_ros.core.errors import ConfigError

SUITE = "libero_spatial"
SWAP_SUITE = "libero_spatial_swap"
SUITES = (SUITE, SWAP_SUITE)
"""LIBERO-PRO's variant: the same tasks, with two of the objects in each other's place."""
TASKS = range(10)
"""Task numbers of the suite, in LIBERO's task order 0."""

ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
ACTION_DIM = len(ACTION_NAMES)
ACTION_LOW = -1.0
ACTION_HIGH = 1.0
GRIPPER_OPEN = -1.0
GRIPPER_CLOSE = 1.0
POSITION_SCALE_M = 0.05
"""Metres that a full position action asks for, from the current pose, in world axes."""
ROTATION_SCALE_RAD = 0.5
"""Radians that a full rotation action asks for, from the current orientation, about world axes."""

JOINT_NAMES = tuple(f"panda_joint{i}" for i in range(1, 8)) + ("panda_finger_joint1", "panda_finger_joint2")
CAMERAS = ("agentview", "wrist")
LIBERO_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
IMAGE_SIZE = 128
STATE_DIM = 8

CONTROL_RATE_HZ = 20
STEP_NS = 1_000_000_000 // CONTROL_RATE_HZ
SETTLE_STEPS = 10
"""Steps without motion at the start of an episode: LIBERO's objects start slightly above their supports."""
MAX_STEPS = 220
"""Longest LIBERO Spatial episode of the usual protocol, settling not counted."""
N_INITIAL_STATES = 50

IDLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, GRIPPER_OPEN])
IDLE_ACTION.setflags(write=False)

NOMINAL_EE_QUAT_XYZW = np.array([1.0, 0.0, 0.0, 0.0])
"""End-effector orientation of the home pose (gripper pointing straight down), as the simulator reports it."""
NOMINAL_EE_QUAT_XYZW.setflags(write=False)

TARGET_BOWL = "akita_black_bowl_1"
PLATE = "plate_1"

MOTIONS = ("none", "drift", "push")
"""What the plate does during an episode: nothing; slide to and fro all the time; slide once, early in the episode."""


def parse_numbers(text: str) -> list[int]:
    """``"0-3,7"`` to [0, 1, 2, 3, 7].

    Raises:
        ConfigError: If the text is not a list of numbers and rising ranges, or names a number twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or part.endswith("-"):
            raise ConfigError(f"{text!r} is not a list of numbers, allowed is for example 0-3,7")
        found = range(int(first), int(last or first) + 1)
        if not found:
            raise ConfigError(f"{text!r} has the range {part}, allowed is one that rises, for example 0-3")
        if repeated := sorted(set(found).intersection(numbers)):
            raise ConfigError(f"{text!r} names {repeated} twice, allowed is every number once")
        numbers += found
    return numbers


def parse_tasks(text: str) -> list[int]:
    """Task numbers of a list such as ``"0-3,7"``.

    Raises:
        ConfigError: If the text is not such a list or names a task that the suite does not have.
    """
    tasks = parse_numbers(text)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f"tasks {unknown} do not exist, allowed are 0 to {TASKS[-1]}")
    return tasks
