"""Scripted expert for LIBERO Spatial: takes the bowl by its rim and sets it on the plate.

It sees the simulator's true object poses, so it shows what to do but is no policy. Every action is computed from the
present state, which makes it a label for any state, also one that noise has led to.
"""

import enum

import numpy as np

from a2c2_ros.core.state import rotation_vector
from a2c2_ros.sim import conventions as c
from a2c2_ros.sim.libero_env import LiberoEnv

RIM_RADIUS_M = 0.0505
RIM_HEIGHT_M = 0.052
"""Rim above the bowl's origin, along the bowl's own axis."""
GRIP_DEPTH_M = 0.02
"""How far below the rim the gripper's centre goes."""
APPROACH_HEIGHT_M = 0.05
LIFT_HEIGHT_M = 0.08
LIFT_TOLERANCE_M = 0.02
HOVER_HEIGHT_M = 0.05
SEATED_HEIGHT_M = 0.0105
"""Bowl origin above plate origin below which the bowl stands on the plate."""
CLOSE_STEPS = 9
OPEN_STEPS = 6
RETREAT_STEPS = 6

POSITION_GAIN = 2.2
DAMPING_STEPS = 1.0
"""Displacement of the last step, in steps, that is taken off the error: the arm goes on for about that long."""
INTEGRAL_GAIN = 0.15
INTEGRAL_LIMIT_M = 0.01
INTEGRAL_RANGE_M = 0.02
ROTATION_GAIN = 1.5
DOWN_LIMIT = 0.8
LOWER_LIMIT = 0.6
CARRY_SLOPE = 0.8
CARRY_OFFSET_M = 0.02
"""The bowl is carried no lower than this slope, from close over the plate up to the height it was lifted to."""
FUNNEL_RADIUS_M = 0.03
FUNNEL_SLOPE = 0.6
FUNNEL_LIMIT_M = 0.08
WALL_MARGIN_M = 0.045
"""Height of the bowl's origin over what it is carried across; a bowl hangs up to 4 cm lower on one side."""
CORRIDOR_M = 0.05
LOST_M = 0.04
"""Distance of the bowl from where the gripper took it at which it counts as lost."""

CLEARANCE_M = 0.010
REACH_M = 0.69
"""Beyond this distance of the rim from the arm's base the elbow comes to its limit."""
BASE_XY_M = np.array([-0.66, 0.0])
RIM_CANDIDATES = 32

HELD_HEIGHT_M = 0.015
"""A bowl that is this much above where it stood hangs in the gripper, if it is near."""
HELD_DISTANCE_M = 0.09
"""Between the gripper's centre and the origin of a bowl that it holds by the rim: about 0.06 m."""
AT_BOWL_M, AT_BOWL_HEIGHT_M = 0.09, 0.02
"""A gripper this near to the bowl's axis, and not further above its rim, has come down to where it will take it."""
BETWEEN_M, BETWEEN_RAD = 0.025, 0.5
"""A gripper whose centre is this near to the rim, seen from above, and turned so has it between its open fingers."""
OPEN_M, CLOSED_M = 0.06, 0.03
"""Of the gripper: fingers further apart are open, nearer closed, also around a rim."""
RIM_COST_PER_M, RIM_COST_PER_RAD = 300.0, 12.0
FALLEN_M = 0.05
"""A bowl this far below the plate fell off the table."""
OVER_PLATE_M = 0.015
"""A bowl whose axis is this near to the plate's may be set down."""
CARRIED_M = 0.03
"""A bowl that is held and this far from where it stood may be carried on, if no wall is in its way."""
MIN_UPRIGHT = 0.5
"""Cosine of the bowl's tilt below which the expert cannot take it by the rim any more."""


class Phase(enum.Enum):
    """What the expert is doing."""

    APPROACH = "approach"
    DESCEND = "descend"
    CLOSE = "close"
    LIFT = "lift"
    TRANSFER = "transfer"
    LOWER = "lower"
    OPEN = "open"
    RETREAT = "retreat"
    DONE = "done"


class Expert:
    """Phase machine for one episode: call :meth:`act` once per step and apply what it returns, or something near it.

    Attributes:
        phase: Present phase.
        grasps: How many times the gripper was closed; more than one means that the bowl was lost.

    Args:
        env: The environment, after ``reset``. Read only.
    """

    def __init__(self, env: LiberoEnv):
        self._env = env
        self.phase = Phase.APPROACH
        self.grasps = 0
        self._steps = 0
        self._integral = np.zeros(3)
        self._last_position: np.ndarray | None = None
        self._rim_angle = 0.0
        self._yaw = 0.0
        self._hold = np.zeros(3)
        self._bowl_in_hand = np.zeros(3)
        self._lift_z = 0.0
        self._choose_rim()

    @property
    def accepts_noise(self) -> bool:
        """False while the fingers close: a bowl that is taken while the hand drifts slips out."""
        return self.phase is not Phase.CLOSE

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the expert's action for an observation of its environment.

        Args:
            observation: What the environment returned last; only ``ee_pose`` is read.

        Returns:
            (7,) float64 within [-1, 1], in the order of ``conventions.ACTION_NAMES``.
        """
        position, orientation = observation["ee_pose"][:3], observation["ee_pose"][3:]
        bowl = self._env.object_pose(c.TARGET_BOWL)
        plate = self._env.object_pose(c.PLATE)
        velocity = np.zeros(3) if self._last_position is None else position - self._last_position
        self._last_position = position.copy()
        tilt_error = rotation_vector(self._desired_orientation(), orientation)
        self._advance(position, bowl, plate, float(np.linalg.norm(velocity)), float(np.linalg.norm(tilt_error)))
        target = self._target(position, bowl, plate)

        error = target - position
        settled = np.abs(error) < INTEGRAL_RANGE_M
        self._integral = np.clip(self._integral + INTEGRAL_GAIN * error * settled, -INTEGRAL_LIMIT_M, INTEGRAL_LIMIT_M)
        action = np.empty(c.ACTION_DIM)
        action[:3] = (POSITION_GAIN * error - DAMPING_STEPS * velocity + self._integral) / c.POSITION_SCALE_M
        action[2] = max(action[2], -DOWN_LIMIT if self.phase in (Phase.APPROACH, Phase.TRANSFER) else -LOWER_LIMIT)
        action[3:6] = ROTATION_GAIN * tilt_error / c.ROTATION_SCALE_RAD
        closed = self.phase in (Phase.CLOSE, Phase.LIFT, Phase.TRANSFER, Phase.LOWER)
        action[6] = c.GRIPPER_CLOSE if closed else c.GRIPPER_OPEN
        self._steps += 1
        return np.clip(action, c.ACTION_LOW, c.ACTION_HIGH)

    def _advance(self, position: np.ndarray, bowl: np.ndarray, plate: np.ndarray, speed: float, tilt: float) -> None:
        """Moves to the next phase where its condition holds. A phase that lasts too long accepts a looser condition."""
        late = self._steps > 30
        if self.phase in (Phase.LIFT, Phase.TRANSFER, Phase.LOWER) and self._lost(position, bowl):
            self._choose_rim()
            self._enter(Phase.APPROACH)
        if self.phase is Phase.APPROACH:
            error = position - self._grip_point(bowl) - (0.0, 0.0, APPROACH_HEIGHT_M)
            near = np.linalg.norm(error[:2]) < (0.02 if late else 0.01) and abs(error[2]) < 0.03
            if near and tilt < (0.25 if late else 0.12) and (late or speed < 0.012):
                self._enter(Phase.DESCEND)
        elif self.phase is Phase.DESCEND:
            error = np.linalg.norm(position - self._grip_point(bowl))
            calm = error < 0.006 and speed < 0.003 and tilt < 0.08
            if calm or (self._steps > 20 and error < 0.010) or (late and error < 0.016):
                self.grasps += 1
                self._enter(Phase.CLOSE)
            elif self._steps > 60:
                self._choose_rim()
                self._enter(Phase.APPROACH)
        elif self.phase is Phase.CLOSE and self._steps >= CLOSE_STEPS:
            self._bowl_in_hand = bowl[:3] - position
            self._lift_z = position[2] + max(LIFT_HEIGHT_M, self._wall_height(bowl, plate) + WALL_MARGIN_M - bowl[2])
            self._enter(Phase.LIFT)
        elif self.phase is Phase.LIFT and position[2] > self._lift_z - LIFT_TOLERANCE_M:
            self._enter(Phase.TRANSFER)
        elif self.phase is Phase.TRANSFER:
            error = np.linalg.norm(bowl[:2] - plate[:2])
            if error < (0.012 if late else 0.008) and bowl[2] - plate[2] < HOVER_HEIGHT_M + 0.03:
                self._enter(Phase.LOWER)
        elif self.phase is Phase.LOWER:
            height = bowl[2] - plate[2]
            if height < SEATED_HEIGHT_M or (late and height < 2 * SEATED_HEIGHT_M):
                self._enter(Phase.OPEN)
        elif self.phase is Phase.OPEN and self._steps >= OPEN_STEPS:
            self._enter(Phase.RETREAT)
        elif self.phase is Phase.RETREAT and self._steps >= RETREAT_STEPS:
            self._enter(Phase.DONE)

    def _target(self, position: np.ndarray, bowl: np.ndarray, plate: np.ndarray) -> np.ndarray:
        """Where the gripper's centre should go now, (3,) [m]."""
        if self.phase is Phase.APPROACH:
            target = self._grip_point(bowl) + (0.0, 0.0, APPROACH_HEIGHT_M)
            return target + _funnel(position, target)
        if self.phase is Phase.DESCEND:
            target = self._grip_point(bowl)
            # The fingers would land on the rim if they came down beside it.
            aside = np.linalg.norm(position[:2] - target[:2]) > 0.015 and position[2] > target[2] + GRIP_DEPTH_M
            return target + (0.0, 0.0, APPROACH_HEIGHT_M if aside else 0.0)
        if self.phase is Phase.CLOSE:
            return self._hold
        if self.phase is Phase.LIFT:
            return np.array([self._hold[0], self._hold[1], self._lift_z])
        if self.phase in (Phase.TRANSFER, Phase.LOWER):
            above = np.array([0.0, 0.0, HOVER_HEIGHT_M])
            if self.phase is Phase.LOWER and np.linalg.norm(bowl[:2] - plate[:2]) < 0.02:
                above[2] = SEATED_HEIGHT_M - 0.015
            # Measured and not as taken: the bowl may have turned between the fingers.
            target = plate[:3] + above + (position - bowl[:3])
            if self.phase is Phase.TRANSFER:
                # Stays high until the bowl is past the drawer and the cabinet's edge.
                slope = CARRY_SLOPE * np.linalg.norm(bowl[:2] - plate[:2]) - CARRY_OFFSET_M
                target[2] = max(target[2], min(self._lift_z, target[2] + slope))
            return target
        if self.phase is Phase.OPEN:
            return self._hold
        return self._hold + (0.0, 0.0, 0.08)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._steps = 0
        self._integral = np.zeros(3)
        if phase in (Phase.CLOSE, Phase.OPEN):
            self._hold = self._last_position.copy()

    def _lost(self, position: np.ndarray, bowl: np.ndarray) -> bool:
        return float(np.linalg.norm(bowl[:3] - position - self._bowl_in_hand)) > LOST_M

    def _desired_orientation(self) -> np.ndarray:
        """Gripper straight down, turned by the chosen yaw: (4,) x y z w."""
        return np.array([np.cos(self._yaw / 2), np.sin(self._yaw / 2), 0.0, 0.0])

    def _grip_point(self, bowl: np.ndarray) -> np.ndarray:
        return _rim_points(bowl, np.array([self._rim_angle]))[0] - (0.0, 0.0, GRIP_DEPTH_M)

    def _wall_height(self, bowl: np.ndarray, plate: np.ndarray) -> float:
        """Highest edge [m] of what lies under the straight way from the bowl to the plate, such as a drawer's front."""
        centres, rotations, half_edges = self._env.obstacle_boxes(c.TARGET_BOWL)
        way = bowl[:2] + np.linspace(0.0, 1.0, 20)[:, None] * (plate[:2] - bowl[:2])
        way = np.concatenate([np.repeat(way[None], len(centres), 0), np.repeat(centres[:, None, 2:], 20, 1)], axis=2)
        local = np.einsum("mki,mij->mkj", way - centres[:, None], rotations)
        aside = np.maximum(np.abs(local) - half_edges[:, None], 0.0)
        under = np.linalg.norm(aside, axis=2).min(axis=1) < CORRIDOR_M
        tops = centres[:, 2] + (np.abs(rotations[:, 2]) * half_edges).sum(axis=1)
        return float(tops[under].max(initial=-np.inf))

    def _choose_rim(self) -> None:
        """Chooses where on the rim to grip: free of other objects, with little turning and reaching."""
        bowl = self._env.object_pose(c.TARGET_BOWL)
        angles = np.arange(RIM_CANDIDATES) * (2 * np.pi / RIM_CANDIDATES)
        rims = _rim_points(bowl, angles)
        radial = rims - rims.mean(axis=0)
        # The fingers open along the hand's y axis, which must lie along the rim's radius, either way round.
        yaws = np.arctan2(radial[:, 1], radial[:, 0]) - np.pi / 2
        yaws = (yaws + np.pi / 2) % np.pi - np.pi / 2
        boxes = self._env.obstacle_boxes(c.TARGET_BOWL)
        costs = []
        for rim, yaw in zip(rims, yaws):
            points = _gripper_points(yaw) + rim - (0.0, 0.0, GRIP_DEPTH_M)
            shortage = max(0.0, CLEARANCE_M - _clearance(points, *boxes))
            reach = float(np.linalg.norm(rim[:2] - BASE_XY_M))
            costs.append(
                100.0 * shortage
                + 20.0 * max(0.0, reach - REACH_M)
                + 0.3 * abs(yaw)
                + 0.5 * reach
                + self._rim_preference(rim, yaw)
            )
        best = int(np.argmin(costs))
        self._rim_angle, self._yaw = float(angles[best]), float(yaws[best])

    def _rim_preference(self, rim: np.ndarray, yaw: float) -> float:
        """Further cost of a point (3,) [m] of the rim, and the hand's yaw [rad] there."""
        return 0.0


class Labeller(Expert):
    """The expert beside a loop that acts by itself.

    The expert's phase follows its own acts. A label has to follow what can be seen, or equal pictures get contrary
    labels. So a grasp that the loop made is taken over, or the label would be to let go of the bowl. Where the loop has
    come down to the rim, the bowl is to be taken there, whatever point the expert would have come down at, and without
    going up again to hover first. The bowl is lifted when the fingers have closed and left alone when they have opened,
    not after so many steps; and it is carried on as soon as nothing is in its way, not led back to where it was taken.

    Args:
        env: The environment, after ``reset``.
    """

    def __init__(self, env: LiberoEnv):
        self._at_bowl = False
        self._opening_m = OPEN_M
        self._hand_yaw = 0.0
        super().__init__(env)
        self._rest = env.object_pose(c.TARGET_BOWL)[:3].copy()

    @property
    def lost(self) -> bool:
        """The bowl fell off the table or over: no action of the expert leads anywhere."""
        bowl, plate = (self._env.object_pose(name) for name in (c.TARGET_BOWL, c.PLATE))
        x, y = bowl[3:5]
        return bool(bowl[2] < plate[2] - FALLEN_M or 1.0 - 2.0 * (x * x + y * y) < MIN_UPRIGHT)

    def _rim_preference(self, rim: np.ndarray, yaw: float) -> float:
        if not self._at_bowl:
            return 0.0
        way = float(np.linalg.norm(rim - self._last_position))
        return RIM_COST_PER_M * way + RIM_COST_PER_RAD * abs(self._turn_to(yaw))

    def _advance(self, position: np.ndarray, bowl: np.ndarray, plate: np.ndarray, speed: float, tilt: float) -> None:
        before = self.phase
        if before in (Phase.APPROACH, Phase.DESCEND) and self._at_bowl:
            self._choose_rim()
            wanted = Phase.DESCEND if self._rim_between_fingers(position, bowl) else Phase.APPROACH
            if wanted is not before:
                self._enter(wanted)
        elif before is Phase.DESCEND:
            self._choose_rim()
            self._enter(Phase.APPROACH)
        elif before is Phase.CLOSE and self._opening_m > CLOSED_M:
            self._steps = min(self._steps, CLOSE_STEPS - 1)
            if not self._rim_between_fingers(position, bowl):
                self._enter(Phase.APPROACH)
        elif before is Phase.TRANSFER and self._over_plate(bowl, plate):
            self._enter(Phase.LOWER)
        elif before is Phase.OPEN and self._opening_m < OPEN_M:
            self._steps = min(self._steps, OPEN_STEPS - 1)
        super()._advance(position, bowl, plate, speed, tilt)
        if self.phase is not Phase.LIFT:
            return
        if before is Phase.CLOSE:
            self._lift_z -= max(0.0, bowl[2] - self._rest[2])  # it may hang already
        moved = float(np.linalg.norm(bowl[:3] - self._rest)) > CARRIED_M
        if moved and bowl[2] > self._wall_height(bowl, plate) + WALL_MARGIN_M - LIFT_TOLERANCE_M:
            self._enter(Phase.TRANSFER)

    def _held(self, position: np.ndarray, bowl: np.ndarray) -> bool:
        if float(np.linalg.norm(bowl[:3] - position)) >= HELD_DISTANCE_M:
            return False
        lifted = bowl[2] > self._rest[2] + HELD_HEIGHT_M
        return bool(lifted or (self._opening_m < CLOSED_M and self._env.grasps(c.TARGET_BOWL)))

    def _over_plate(self, bowl: np.ndarray, plate: np.ndarray) -> bool:
        near = float(np.linalg.norm(bowl[:2] - plate[:2])) < OVER_PLATE_M
        return near and bowl[2] - plate[2] < HOVER_HEIGHT_M + LIFT_TOLERANCE_M

    def _rim_between_fingers(self, position: np.ndarray, bowl: np.ndarray) -> bool:
        near = float(np.linalg.norm(position[:2] - self._grip_point(bowl)[:2])) < BETWEEN_M
        return near and abs(self._turn_to(self._yaw)) < BETWEEN_RAD

    def _turn_to(self, yaw: float) -> float:
        """From the hand's yaw, either way round [rad]."""
        return float((yaw - self._hand_yaw + np.pi / 2) % np.pi - np.pi / 2)

    def _target(self, position: np.ndarray, bowl: np.ndarray, plate: np.ndarray) -> np.ndarray:
        if self.phase is Phase.CLOSE and self._opening_m > CLOSED_M:
            return position
        target = super()._target(position, bowl, plate)
        if self.phase is Phase.LIFT:
            target[:2] = position[:2]
        if self.phase is Phase.TRANSFER:
            # The expert comes from above. What hangs lower already need not go up but over a wall.
            needed = max(CARRY_OFFSET_M, self._wall_height(bowl, plate) + WALL_MARGIN_M - bowl[2])
            target[2] = min(target[2], position[2] + needed)
        return target

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """As :meth:`Expert.act`; ``joint_position`` is read, too."""
        position, orientation = observation["ee_pose"][:3], observation["ee_pose"][3:]
        self._opening_m = float(np.abs(observation["joint_position"][-2:]).sum())
        bowl = self._env.object_pose(c.TARGET_BOWL)
        self._hand_yaw = float(2.0 * np.arctan2(orientation[1], orientation[0]))
        reaching = self.phase in (Phase.APPROACH, Phase.DESCEND) and self._last_position is not None
        if reaching and self._held(position, bowl):
            self._enter(Phase.CLOSE)
            self._steps = CLOSE_STEPS
        if self.phase is Phase.CLOSE:
            self._yaw = self._hand_yaw  # it stays as the bowl is taken
        self._at_bowl = (
            self._last_position is not None
            and position[2] - bowl[2] < RIM_HEIGHT_M + AT_BOWL_HEIGHT_M
            and float(np.linalg.norm(position[:2] - bowl[:2])) < AT_BOWL_M
        )
        return super().act(observation)

    def label(self, observation: dict[str, np.ndarray]) -> np.ndarray | None:
        """As :meth:`act`; None if the task is done, or lost, so that no action says anything."""
        action = self.act(observation)
        return None if self.phase is Phase.DONE or self.lost else action


def _funnel(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Extra height while the gripper is still to the side, so that it comes from above."""
    aside = float(np.linalg.norm(position[:2] - target[:2])) - FUNNEL_RADIUS_M
    return np.array([0.0, 0.0, np.clip(FUNNEL_SLOPE * aside, 0.0, FUNNEL_LIMIT_M)])


def _rim_points(bowl: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Points of the bowl's rim at angles in the bowl's own frame: (n, 3) [m], world frame; a tilted bowl is fine."""
    x, y, z, w = bowl[3:]
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    heights = np.full_like(angles, RIM_HEIGHT_M)
    local = np.stack([RIM_RADIUS_M * np.cos(angles), RIM_RADIUS_M * np.sin(angles), heights], axis=1)
    return bowl[:3] + local @ rotation.T


def _gripper_points(yaw: float) -> np.ndarray:
    """Sample points of the open fingers and the hand around the gripper's centre, pointing down: (n, 3) [m]."""
    fingers = [(x, y, z) for x in (-0.01, 0.01) for y in (-0.06, -0.045, 0.045, 0.06) for z in (-0.01, 0.01, 0.03)]
    hand = [(x, y, z) for x in (-0.03, 0.0, 0.03) for y in np.linspace(-0.104, 0.104, 9) for z in (0.032, 0.06, 0.11)]
    points = np.array(fingers + hand)
    # The way down is part of the grip.
    points = np.concatenate([points + (0.0, 0.0, height) for height in (0.0, 0.025, APPROACH_HEIGHT_M)])
    cos, sin = np.cos(yaw), np.sin(yaw)
    return points @ np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _clearance(points: np.ndarray, centres: np.ndarray, rotations: np.ndarray, half_edges: np.ndarray) -> float:
    """Smallest signed distance from points (n, 3) to boxes (m, 3), (m, 3, 3), (m, 3) [m]; negative inside."""
    local = np.einsum("nmj,mji->nmi", points[:, None] - centres[None], rotations)
    beyond = np.abs(local) - half_edges
    outside = np.linalg.norm(np.maximum(beyond, 0.0), axis=2)
    return float((outside + np.minimum(beyond.max(axis=2), 0.0)).min())
