"""A batch of Kinetix environments of one level, in JAX (arXiv 2410.23208).

The state is what can change in a level: where its moving bodies are and how they move. Everything else of Kinetix's
observation (sizes, masses, joints) is constant within a level. The action has the motors and thrusters that the level
uses. Normal noise is added to every action, as in arXiv 2506.07339.
"""

import hashlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from kinetix.environment.env import KinetixEnv as StockEnv
from kinetix.environment.env_state import EnvParams, EnvState
from kinetix.environment.spaces import ContinuousActions, KinetixObservation

from a2c2_ros.sim.kinetix_level import Level, PrunedEngine, movable, shrink

ACTION_SPACE = "kinetix"
CONTROL_RATE_HZ = 60
STEP_NS = round(1e9 / CONTROL_RATE_HZ)
"""Duration of a control step [ns]. A step computes two of Kinetix's, 1/60 s each: in a loop on the clock its world runs
twice as fast as it was made for."""
ACTION_NOISE = 0.1
"""Standard deviation [action units]."""
FEATURES = ("x", "y", "vx", "vy", "spin", "sin", "cos")
"""Of a body: position [m], velocity [m/s], tanh of the angular velocity / 10 rad/s, and the rotation."""
VARIANTS = ("pruned", "shrunk", "stock")
PARTS = (1, 2, 8)
"""Batches are computed as a whole or by the half or the eighth of their environments, each of which is compiled."""
LEAST_PART = 512
"""Environments; a smaller part would not be worth its compilation."""


class Batch(NamedTuple):
    """N environments of a level, as far as they are still computed; immutable."""

    states: EnvState  # of n <= N
    rows: np.ndarray  # (n,) int, which of the N they are


class Stepped(NamedTuple):
    """What a step brought, each (N, ...); NaN, 0 and False of an environment that is not computed any more."""

    batch: Batch
    state: np.ndarray  # (N, S) float32; of a new episode where one ended and restarts are asked for
    reward: np.ndarray  # (N,) float32
    ended: np.ndarray  # (N,) bool
    solved: np.ndarray  # (N,) bool, the episode ended with success


class Bodies(KinetixObservation):
    """Kinetix's interface for what an environment observes: the moving bodies."""

    def __init__(self, level: Level, variant: str) -> None:
        super().__init__(level.params, level.static)
        content = b"".join(np.asarray(values).tobytes() for values in jax.tree.leaves(level.start))
        self._identity = f"{variant} {hashlib.sha256(content).hexdigest()}"
        self._moving = {
            kind: np.flatnonzero(np.asarray(shapes.active) & movable(shapes))
            for kind, shapes in (("polygon", level.start.polygon), ("circle", level.start.circle))
        }
        numbers = {"polygon": level.polygons, "circle": level.circles}
        self.names = tuple(
            f"{kind}{numbers[kind][row]}.{feature}"
            for kind, rows in self._moving.items()
            for row in rows
            for feature in FEATURES
        )

    def get_obs(self, state: EnvState) -> jax.Array:
        """(S,) float32."""
        parts = []
        for kind, rows in self._moving.items():
            body = jax.tree.map(lambda values, rows=rows: values[rows], getattr(state, kind))
            columns = [
                *(body.position[:, i] for i in range(2)),
                *(body.velocity[:, i] for i in range(2)),
                jnp.tanh(body.angular_velocity / 10.0),
                jnp.sin(body.rotation),
                jnp.cos(body.rotation),
            ]
            parts.append(jnp.stack(columns, axis=1).reshape(-1))
        return jnp.nan_to_num(jnp.clip(jnp.concatenate(parts), -10.0, 10.0))

    def hash_key(self) -> tuple:
        """What distinguishes it, for compiled functions: two levels may have the same sizes and names."""
        return (type(self).__name__, self._identity)


def _left(batch: Batch, going: np.ndarray) -> Batch:
    """The smallest part of a batch that has all environments that are still of interest."""
    wanted = going[batch.rows]
    sizes = [len(going) // part for part in PARTS]
    size = min((size for size in sizes if size >= max(LEAST_PART, wanted.sum())), default=len(wanted))
    if size >= len(wanted):
        return batch
    kept = np.argsort(~wanted, kind="stable")[:size]
    return Batch(_take(batch.states, kept), batch.rows[kept])


@jax.jit
def _take(states: EnvState, rows: np.ndarray) -> EnvState:
    return jax.tree.map(lambda values: values[rows], states)


class KinetixEnv:
    """Batches of environments of one level.

    Args:
        level: The level, as it was read.
        variant: "stock": as Kinetix computes it; "shrunk": without what the level does not use; "pruned": without the
            pairs of bodies that can never touch, too. State and action are the same in all.
        noise: Standard deviation of the noise on every action [action units].
        distance_reward: Weight of how much nearer goal and body came in a step, in the reward [1/m]; for training.
    """

    def __init__(
        self, level: Level, *, variant: str = "pruned", noise: float = ACTION_NOISE, distance_reward: float = 0.0
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, allowed are {VARIANTS}")
        motors, thrusters = (
            sorted({int(binding) for binding, active in zip(bindings, used, strict=True) if active})
            for bindings, used in (
                (level.start.motor_bindings, level.start.joint.active & level.start.joint.motor_on),
                (level.start.thruster_bindings, level.start.thruster.active),
            )
        )
        self.name, self.variant = level.name, variant
        self.action_names = (*(f"motor{i}" for i in motors), *(f"thruster{i}" for i in thrusters))
        self._action_rows = np.array([*motors, *(level.static.num_motor_bindings + i for i in thrusters)])
        self.action_low = np.array([-1.0] * len(motors) + [0.0] * len(thrusters), dtype=np.float32)
        if variant != "stock":
            level = shrink(level)
        engine = PrunedEngine(level) if variant == "pruned" else None
        start = engine.start(level.start) if engine else level.start
        self._params = level.params.replace(dense_reward_scale=distance_reward)
        self._static = level.static
        self._observation = Bodies(level, variant)
        self.state_names = self._observation.names
        self._stock = StockEnv(
            ContinuousActions(self._params, self._static),
            self._observation,
            self._static,
            physics_engine=engine,
            auto_reset=False,
        )
        # Of the same types as what a step returns, so that the first step and the others are one compiled program.
        self._start = jax.tree.map(lambda values: jnp.asarray(values, values.dtype), start)
        self.max_steps = int(level.params.max_timesteps)
        self._noise = noise

    def reset(self, count: int) -> tuple[Batch, np.ndarray]:
        """``count`` environments at the start of the level, and their states (N, S) float32."""
        states = jax.tree.map(lambda values: jnp.broadcast_to(values, (count, *jnp.shape(values))), self._start)
        return Batch(states, np.arange(count)), np.tile(np.asarray(self._stock.get_obs(self._start)), (count, 1))

    def compile(self, count: int) -> None:
        """Compile what steps of so many environments need."""
        batch, _ = self.reset(count)
        idle = np.zeros((count, len(self.action_names)), np.float32)
        for part in PARTS:
            batch = self.step(batch, idle, (0, 0), going=np.arange(count) < count // part).batch

    def step(
        self,
        batch: Batch,
        action: np.ndarray,
        seed: tuple[int, int],
        *,
        restart: bool = False,
        going: np.ndarray | None = None,
    ) -> Stepped:
        """Apply an action to every environment.

        Args:
            batch: The environments.
            action: (N, A) action units; motors -1 to 1, thrusters 0 to 1, clipped before the noise and after it.
            seed: Of the noise: of the run, and the number of the step.
            restart: Environments whose episode ended are back at the start.
            going: (N,) bool, environments that are of interest from here on; None: all.
        """
        noise = np.random.default_rng(seed).standard_normal(action.shape, np.float32)
        noisy = np.clip(action, self.action_low, 1.0) + self._noise * noise
        if going is not None:
            batch = _left(batch, going)
        # All that differs between environments of a level is an argument, so that JAX's compilation cache knows them.
        states, *rest = self._step(batch.states, jnp.asarray(noisy[batch.rows], jnp.float32), self._params, restart)
        found = []
        for values in map(np.asarray, rest):
            empty = np.nan if values.ndim > 1 else 0
            found.append(np.full((len(action), *values.shape[1:]), empty, values.dtype))
            found[-1][batch.rows] = values
        return Stepped(Batch(states, batch.rows), *found)

    @partial(jax.jit, static_argnums=0)
    def _step(self, states: EnvState, action: jax.Array, params: EnvParams, restart: bool):
        size = self._static.num_motor_bindings + self._static.num_thruster_bindings
        full = jnp.zeros((len(action), size)).at[:, self._action_rows].set(action)
        key = jax.random.key(0)  # of Kinetix, which draws nothing in a step

        def one(state: EnvState, values: jax.Array):
            observed, state, reward, ended, info = self._stock.step_env(key, state, values, params)
            again = ended & restart
            state = jax.tree.map(lambda first, now: jnp.where(again, first, now), self._start, state)
            observed = jnp.where(again, self._stock.get_obs(self._start), observed)
            return state, observed, reward, ended, ended & info["GoalR"]

        return jax.vmap(one)(states, full)

    def picture(self, batch: Batch, row: int) -> np.ndarray:
        """(500, 500, 3) uint8 RGB of one environment."""
        from kinetix.render.renderer_pixels import make_render_pixels

        if not hasattr(self, "_render"):
            self._render = jax.jit(make_render_pixels(self._params, self._static))
        (place,) = np.flatnonzero(batch.rows == row)
        image = self._render(jax.tree.map(lambda values: values[place], batch.states))
        return np.asarray(image).round().astype(np.uint8).transpose(1, 0, 2)[::-1]
