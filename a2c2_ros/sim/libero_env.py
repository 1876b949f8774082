"""One LIBERO Spatial task as a plain object: reset, step, two upright camera images. No ROS in here."""

import contextlib
import io
import os

os.environ.setdefault("MUJOCO_GL", "osmesa")  # read by mujoco when it is imported; needs neither display nor GPU

import mujoco
import numpy as np

from a2c2_ros.core.errors import SimulationError
from a2c2_ros.sim import conventions as c
from a2c2_ros.sim.culling import HIDDEN, ViewCulling
from a2c2_ros.sim.meshes import simplify_meshes
from a2c2_ros.sim.single_pass import SinglePass

with contextlib.redirect_stdout(io.StringIO()):  # the benchmark reports its task lists on import
    from libero.libero.benchmark import get_benchmark
    from libero.libero.envs.env_wrapper import ControlEnv
    from robosuite.utils.errors import RandomizationError

ARM_NOISE_RAD = 0.02
"""Standard deviation of the arm's joints at the start of an episode: robosuite's default, seen in LIBERO's states."""
MIN_CONTRAST = 8.0
"""Grey-level standard deviation below which a frame is taken for a failed render. Real frames have more than 25."""
DRIFT_SPEED_M_S = 0.02
DRIFT_LIMIT_M = 0.08
"""Distance from its place at which the drifting plate turns."""
PUSH_SPEED_M_S = 0.2
PUSH_LENGTH_M = 0.08
PUSH_STEPS = (10, 40)
"""Range of the step at which the push begins: after the first chunk, before the bowl is there."""
_DIRECTIONS = 8
_PLACEMENT_ATTEMPTS = 100


class LiberoEnv:
    """One task of LIBERO Spatial with one robot, one physics model and one renderer.

    Same task, initial state, seed and actions give the same observations bit for bit, in any process of one machine.

    An observation is a dict of numpy arrays:

    - ``agentview``, ``wrist``: (image_size, image_size, 3) uint8 RGB, upright; absent with ``render=False``.
    - ``ee_pose``: (7,) float64, position x y z [m] and orientation x y z w of the gripper in LIBERO's world frame.
    - ``joint_position``: (9,) float64 in the order of ``conventions.JOINT_NAMES`` [rad, fingers m].

    Args:
        task: Task number, 0 to 9 (LIBERO's task order 0).
        image_size: Edge of the square camera images [pixel].
        render: False leaves the images out and makes a step several times cheaper.
        full_meshes: True draws LIBERO's meshes as they are, four times slower; see ``sim.meshes``.
        motion: One of ``conventions.MOTIONS``.
        suite: One of ``conventions.SUITES``.

    Raises:
        SimulationError: If there is no such task, motion or suite, or the renderer cannot be made.
    """

    def __init__(
        self,
        task: int,
        *,
        image_size: int = c.IMAGE_SIZE,
        render: bool = True,
        full_meshes: bool = False,
        motion: str = "none",
        suite: str = c.SUITE,
    ):
        if isinstance(task, bool) or not isinstance(task, (int, np.integer)) or task not in c.TASKS:
            raise SimulationError(f"unknown task {task!r} of {c.SUITE}, allowed are the integers 0 to {c.TASKS[-1]}")
        if motion not in c.MOTIONS:
            raise SimulationError(f"motion is {motion!r}, allowed are {c.MOTIONS}")
        if suite not in c.SUITES:
            raise SimulationError(f"suite is {suite!r}, allowed are {c.SUITES}")
        self.task = int(task)
        self.motion = motion
        self.image_size = int(image_size)
        with contextlib.redirect_stdout(io.StringIO()):
            benchmark = get_benchmark(suite)(0)
        self._initial_states = benchmark.get_task_init_states(self.task)
        self.instruction = benchmark.get_task(self.task).language
        self.n_initial_states = len(self._initial_states)
        self._control_env = ControlEnv(
            bddl_file_name=benchmark.get_task_bddl_file_path(self.task),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=c.CONTROL_RATE_HZ,
            hard_reset=False,
            ignore_done=True,
        )
        self._env = self._control_env.env
        # Everything is read from the simulation directly; the benchmark would update 40 sensors in every substep.
        self._env._observables.clear()
        self._model = self._env.sim.model._model
        self._data = self._env.sim.data._data
        if render and not full_meshes:
            simplify_meshes(self._model)
        self._renderer = self._make_renderer() if render else None
        self._images: dict[str, np.ndarray] = {}
        self._motion: _PlateMotion | None = None

    @property
    def control_timestep_s(self) -> float:
        """Simulated seconds of one step."""
        return self._env.control_timestep

    def reset(self, initial_state: int | None, seed: int) -> dict[str, np.ndarray]:
        """Starts an episode and lets the objects settle for ``conventions.SETTLE_STEPS`` steps.

        The cabinet and the stove are not part of LIBERO's initial states: they are drawn anew from ``seed`` in every
        episode, from the distribution of a full reload, but without reloading the model.

        Args:
            initial_state: Number of an official initial state, or None for a placement drawn from ``seed`` with
                LIBERO's own samplers and arm noise.
            seed: Any non-negative integer below 2**32.

        Returns:
            The first observation, see the class.

        Raises:
            SimulationError: If there is no such initial state or seed, if the objects cannot be placed, or if the
                renderer returns unusable frames.
        """
        if initial_state is not None and not 0 <= initial_state < self.n_initial_states:
            raise SimulationError(
                f"unknown initial state {initial_state!r}, allowed are 0 to {self.n_initial_states - 1}, or None"
            )
        if not 0 <= seed < 2**32:
            raise SimulationError(f"the seed is {seed}, allowed are 0 to {2**32 - 1}")
        env = self._env
        self._home_fixtures()
        with _numpy_seed(seed):
            self._place_objects()
            arm_noise = np.random.standard_normal(7) * ARM_NOISE_RAD
        robot = env.robots[0]
        robot.gripper.current_action = np.zeros(2)
        if initial_state is None:
            self._data.qpos[robot._ref_joint_pos_indexes] += arm_noise
        else:
            env.sim.set_state_from_flattened(self._initial_states[initial_state])
        env.sim.forward()
        # The controller would otherwise turn the arm back to the orientation that it saw before the state was set.
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        for _ in range(c.SETTLE_STEPS):
            self._advance(c.IDLE_ACTION)
        self._motion = None if self.motion == "none" else _PlateMotion(self, self.motion, np.random.default_rng(seed))
        observation = self.observe()
        self._check_frames(observation)
        return observation

    def step(self, action: np.ndarray, look: bool = True) -> tuple[dict[str, np.ndarray], bool]:
        """Applies one action for one control period.

        Args:
            action: (7,) in the order of ``conventions.ACTION_NAMES``; values outside [-1, 1] are clipped. The gripper
                moves by the sign of its value.
            look: False spares the rendering: the observation has the images of the last look.

        Returns:
            The observation after the step, and whether LIBERO's goal of the task holds now.

        Raises:
            SimulationError: If the action has another shape or is not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (c.ACTION_DIM,):
            raise SimulationError(f"the action has shape {action.shape}, allowed is ({c.ACTION_DIM},)")
        if not np.isfinite(action).all():
            raise SimulationError(f"the action is not finite: {action.tolist()}")
        if self._motion is not None:
            self._motion.advance()
        success = self._advance(np.clip(action, c.ACTION_LOW, c.ACTION_HIGH))
        return self.observe(look), success

    def observe(self, look: bool = True) -> dict[str, np.ndarray]:
        """Returns the observation of the present state, see the class; ``look`` as in :meth:`step`."""
        robot = self._env.robots[0]
        position = self._data.site_xpos[robot.eef_site_id]
        orientation = self._data.body(robot.robot_model.eef_name).xquat
        joints = robot._ref_joint_pos_indexes + robot._ref_gripper_joint_pos_indexes
        observation = {
            "ee_pose": np.concatenate([position, np.roll(orientation, -1)]),
            "joint_position": self._data.qpos[joints],
        }
        if self._renderer is not None and look:
            for name, camera in c.LIBERO_CAMERAS.items():
                self._culling.apply(self._data, camera)
                self._renderer.update_scene(self._data, camera=camera, scene_option=self._scene_option)
                self._images[name] = self._renderer.render()
        return observation | self._images

    def object_pose(self, name: str) -> np.ndarray:
        """Privileged: pose of an object or fixture, for the expert and for training labels only.

        Args:
            name: LIBERO's name, for example ``akita_black_bowl_1``.

        Returns:
            (7,) float64, position x y z [m] and orientation x y z w in LIBERO's world frame.

        Raises:
            SimulationError: If the task has no such object.
        """
        body = self._data.body(self._body_id(name))
        return np.concatenate([body.xpos, np.roll(body.xquat, -1)])

    def grasps(self, name: str) -> bool:
        """Whether both fingers touch a movable object of the task; raises SimulationError if there is none."""
        self._body_id(name)
        return bool(self._env._check_grasp(self._env.robots[0].gripper, self._env.objects_dict[name]))

    def obstacle_boxes(self, exclude: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Privileged: boxes around the collision shapes of every object and fixture but one.

        Args:
            exclude: Name of the object that is left out.

        Returns:
            Centres (n, 3) [m], rotation matrices (n, 3, 3) box to world, and half edges (n, 3) [m].

        Raises:
            SimulationError: If the task has no object named ``exclude``.
        """
        self._body_id(exclude)
        roots = [body for name, body in self._env.obj_body_id.items() if name != exclude]
        model, data = self._model, self._data
        solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        geoms = np.flatnonzero(solid & np.isin(self._root_of(model.geom_bodyid), roots))
        rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
        boxes = model.geom_aabb[geoms]
        centres = data.geom_xpos[geoms] + np.einsum("nij,nj->ni", rotations, boxes[:, :3])
        return centres, rotations.copy(), boxes[:, 3:].copy()

    def close(self) -> None:
        """Frees the renderer and the physics. The object cannot be used afterwards."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._control_env.close()

    def __enter__(self) -> "LiberoEnv":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _advance(self, action: np.ndarray) -> bool:
        """One control period; True if the goal holds after it."""
        with SinglePass(self._env.sim):
            _, _, success, _ = self._env.step(action)
        return bool(success)

    def _make_renderer(self) -> mujoco.Renderer:
        self._model.vis.quality.offsamples = 0
        self._scene_option = mujoco.MjvOption()
        self._scene_option.geomgroup[HIDDEN] = 0
        self._culling = ViewCulling(self._model, c.LIBERO_CAMERAS.values())
        renderer = mujoco.Renderer(self._model, self.image_size, self.image_size)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer

    def _check_frames(self, observation: dict[str, np.ndarray]) -> None:
        for name in c.CAMERAS if self._renderer is not None else ():
            contrast = float(observation[name].mean(axis=2).std())
            if contrast < MIN_CONTRAST:
                raise SimulationError(
                    f"camera {name} of task {self.task} shows a frame with contrast {contrast:.1f}, allowed is at "
                    f"least {MIN_CONTRAST}: the renderer is unusable, run this task in a process of its own"
                )

    def _home_fixtures(self) -> None:
        # The samplers read the fixtures' regions as if the fixtures stood at the origin, as in a fresh model.
        for name in self._env.fixtures_dict:
            body = self._body_id(name)
            self._model.body_pos[body] = 0.0
            self._model.body_quat[body] = (1.0, 0.0, 0.0, 0.0)

    def _place_objects(self) -> None:
        for _ in range(_PLACEMENT_ATTEMPTS):
            try:
                self._env.reset()
                return
            except RandomizationError:
                self._home_fixtures()
        raise SimulationError(f"no free placement of the objects of task {self.task} in {_PLACEMENT_ATTEMPTS} attempts")

    def _body_id(self, name: str) -> int:
        try:
            return self._env.obj_body_id[name]
        except KeyError:
            raise SimulationError(
                f"task {self.task} has no object {name!r}, allowed are {sorted(self._env.obj_body_id)}"
            ) from None

    def _root_of(self, bodies: np.ndarray) -> np.ndarray:
        """Child of the world that each body hangs on."""
        roots = np.array(bodies)
        while (inner := self._model.body_parentid[roots] != 0).any():
            roots[inner] = self._model.body_parentid[roots[inner]]
        return roots


class _PlateMotion:
    """Slides the plate over the table, in a direction that is free of other objects.

    The position is set, not the velocity: friction must not decide how far it goes.
    """

    def __init__(self, env: LiberoEnv, kind: str, rng: np.random.Generator) -> None:
        self._kind = kind
        self._timestep_s = env.control_timestep_s
        self._data = env._data
        joint = env._model.body_jntadr[env._body_id(c.PLATE)]
        self._position = slice(env._model.jnt_qposadr[joint], env._model.jnt_qposadr[joint] + 2)
        self._velocity = slice(env._model.jnt_dofadr[joint], env._model.jnt_dofadr[joint] + 6)
        self._step, self._moved_m, self._sign = 0, 0.0, 1.0
        self._push_at = int(rng.integers(*PUSH_STEPS))
        names = [name for name in env._env.obj_body_id if name != c.PLATE]
        others = np.stack([env.object_pose(name)[:2] for name in names])
        angles = rng.uniform(0.0, 2 * np.pi, _DIRECTIONS)
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        ends = self._data.qpos[self._position] + PUSH_LENGTH_M * directions
        room = np.linalg.norm(ends[:, None] - others[None], axis=2).min(axis=1)
        self._direction = directions[np.argmax(room)]

    def advance(self) -> None:
        """Move by one control step."""
        speed_m_s = DRIFT_SPEED_M_S
        if self._kind == "push":
            waits = self._step < self._push_at or self._moved_m >= PUSH_LENGTH_M
            speed_m_s = 0.0 if waits else PUSH_SPEED_M_S
        elif abs(self._moved_m) >= DRIFT_LIMIT_M and self._moved_m * self._sign > 0:
            self._sign = -self._sign
        self._step += 1
        if speed_m_s:
            way_m = self._sign * speed_m_s * self._timestep_s
            self._moved_m += way_m
            self._data.qpos[self._position] += way_m * self._direction
            self._data.qvel[self._velocity] = 0.0


@contextlib.contextmanager
def _numpy_seed(seed: int):
    """The benchmark's samplers draw from numpy's global generator: seeds it and restores the caller's state."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
