"""Levels of Kinetix: read from a file, and made small without changing what happens in them.

The stock physics computes every body, joint and pair of bodies that the largest level could have. A level uses few of
them, and of those pairs most can never touch: both are fixed, or one of them collides with nothing.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from a2c2_ros.core.errors import ConfigError

try:
    import jax
    import jax.numpy as jnp
    from jax2d.engine import PhysicsEngine, get_empty_collision_manifolds
    from jax2d.engine import make_impulse_resolver_fn as make_resolver
    from jax2d.engine import make_impulse_warm_starting_fn as make_warm_start
    from kinetix.environment.env_state import EnvParams, EnvState, StaticEnvParams
    from kinetix.util.saving import import_env_state_from_json
except ImportError as error:
    raise ConfigError(f"Kinetix cannot be imported ({error}): KINETIX=1 make setup installs it") from error

LEVELS = (
    "grasp_easy",
    "catapult",
    "cartpole_thrust",
    "hard_lunar_lander",
    "mjc_half_cheetah",
    "mjc_swimmer",
    "mjc_walker",
    "h17_unicycle",
    "chain_lander",
    "catcher_v3",
    "trampoline",
    "car_launch",
)
"""The paper's tasks, appendix A.1.1; their files are those of arXiv 2506.07339."""
FIXED_POLYGONS = 4
"""Floor, walls and ceiling come first and stay."""
LEAST = {"polygon": FIXED_POLYGONS + 1, "circle": 2, "joint": 1, "thruster": 1}
"""The physics needs a pair of each kind of bodies, a joint and a thruster."""


@dataclass(frozen=True, eq=False)
class Level:
    """A task: where it starts, and what its physics computes."""

    name: str
    start: EnvState
    static: StaticEnvParams
    params: EnvParams
    polygons: tuple[int, ...]  # number in the file of each polygon
    circles: tuple[int, ...]


def load_level(path: str | Path) -> Level:
    """Read a level file, all of it.

    Raises:
        ConfigError: If there is no such file, or it is not a level.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"level {path} is not a file; --levels is the folder with NAME.json")
    try:
        start, static, params = import_env_state_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a level: {type(error).__name__}: {error}") from error
    return Level(path.stem, start, static, params, tuple(range(static.num_polygons)), tuple(range(static.num_circles)))


def shrink(level: Level) -> Level:
    """Leave out what the level does not use."""
    start, static = level.start, level.static
    polygons, circles, joints, thrusters = (_used(getattr(start, kind).active, least) for kind, least in LEAST.items())
    bodies = np.concatenate([polygons, static.num_polygons + circles])
    new_number = np.zeros(static.num_polygons + static.num_circles, dtype=np.int32)
    new_number[bodies] = np.arange(len(bodies))

    def rows(tree, kept: np.ndarray):
        return jax.tree.map(lambda values: values[kept], tree)

    def renumbered(numbers: jax.Array) -> jax.Array:
        return jnp.asarray(new_number)[numbers]

    static = static.replace(
        num_polygons=len(polygons), num_circles=len(circles), num_joints=len(joints), num_thrusters=len(thrusters)
    )
    joint, thruster = rows(start.joint, joints), rows(start.thruster, thrusters)
    names = ("acc_rr_manifolds", "acc_cr_manifolds", "acc_cc_manifolds")
    small = start.replace(
        polygon=rows(start.polygon, polygons),
        circle=rows(start.circle, circles),
        joint=joint.replace(a_index=renumbered(joint.a_index), b_index=renumbered(joint.b_index)),
        thruster=thruster.replace(object_index=renumbered(thruster.object_index)),
        collision_matrix=start.collision_matrix[np.ix_(bodies, bodies)],
        **{f"polygon_{name}": getattr(start, f"polygon_{name}")[polygons] for name in BODY_ENTRIES},
        **{f"circle_{name}": getattr(start, f"circle_{name}")[circles] for name in BODY_ENTRIES},
        motor_bindings=start.motor_bindings[joints],
        motor_auto=start.motor_auto[joints],
        thruster_bindings=start.thruster_bindings[thrusters],
        **dict(zip(names, get_empty_collision_manifolds(static), strict=True)),
    )
    return dataclasses.replace(
        level, start=small, static=static, polygons=tuple(map(int, polygons)), circles=tuple(map(int, circles))
    )


BODY_ENTRIES = ("shape_roles", "highlighted", "densities")


def _used(active: jax.Array, least: int) -> np.ndarray:
    """Numbers of what is active, and of the first others if that is less than ``least``.

    Floor, walls and ceiling are always active.
    """
    active = np.asarray(active)
    order = np.argsort(~active, kind="stable")
    return np.sort(order[: max(least, int(active.sum()))])


class PrunedEngine(PhysicsEngine):
    """The physics of a level without the pairs of bodies that can never touch.

    Pairs that count for reward or distance stay, too.
    """

    def __init__(self, level: Level) -> None:
        static = level.static
        super().__init__(static)
        start = level.start
        polygon = _bodies(start.polygon, start.polygon_shape_roles)
        circle = _bodies(start.circle, start.circle_shape_roles)
        sides = {
            "poly_poly": (True, True, polygon, polygon),
            "circle_poly": (False, True, circle, polygon),
            "circle_circle": (False, False, circle, circle),
        }
        matrix = np.asarray(start.collision_matrix)
        resolvers = {"poly_poly": "rr", "circle_poly": "cr", "circle_circle": "cc"}
        for name, (first_poly, second_poly, first, second) in sides.items():
            pairs = np.asarray(getattr(self, f"{name}_pairs"))
            a, b = pairs.T
            shift = static.num_polygons
            meets = matrix[a + shift * (not first_poly), b + shift * (not second_poly)]
            touches = first.active[a] & second.active[b] & (first.moves[a] | second.moves[b]) & meets
            touches &= _collide(first.mode[a], second.mode[b])
            counts = np.isin(first.role[a] * second.role[b], (2, 3)) & first.active[a] & second.active[b]
            kept = np.flatnonzero(touches | counts)
            kept = kept if len(kept) else np.array([0])  # the physics has no level without pairs
            pairs = jnp.asarray(pairs[kept])
            setattr(self, f"{name}_pairs", pairs)
            size = min(static.solver_batch_size, len(kept))
            batches = -(-len(kept) // size)
            key = resolvers[name]
            resolver = make_resolver(static, first_poly, second_poly, len(kept), batches, size, batches * size, pairs)
            setattr(self, f"{key}_fn", resolver)
            setattr(self, f"ws_{key}_fn", make_warm_start(static, first_poly, second_poly, len(kept), pairs))

    def start(self, state: EnvState) -> EnvState:
        """The same state with manifolds of these pairs alone; they are empty at the start."""

        def empty(manifolds, pairs: jax.Array):
            return jax.tree.map(lambda values: jnp.zeros_like(values, shape=(len(pairs), *values.shape[1:])), manifolds)

        return state.replace(
            acc_rr_manifolds=empty(state.acc_rr_manifolds, self.poly_poly_pairs),
            acc_cr_manifolds=empty(state.acc_cr_manifolds, self.circle_poly_pairs),
            acc_cc_manifolds=empty(state.acc_cc_manifolds, self.circle_circle_pairs),
        )


def movable(shapes) -> np.ndarray:
    """(n,) bool, polygons or circles that forces can move."""
    return (np.asarray(shapes.inverse_mass) != 0) | (np.asarray(shapes.inverse_inertia) != 0)


@dataclass(frozen=True, eq=False)
class _Bodies:
    active: np.ndarray
    moves: np.ndarray
    mode: np.ndarray
    role: np.ndarray


def _bodies(shapes, roles: jax.Array) -> _Bodies:
    return _Bodies(np.asarray(shapes.active), movable(shapes), np.asarray(shapes.collision_mode), np.asarray(roles))


def _collide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Collision modes: 2 with everything, 1 with all but 0."""
    return (a == 2) | (b == 2) | (a * b > 0)
