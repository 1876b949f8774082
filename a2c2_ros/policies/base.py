"""What a chunk policy is to the planner."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from a2c2_ros.core.errors import ObservationError, PolicyError


@dataclass(frozen=True, eq=False)
class PolicyOutput:
    """One inference of a policy.

    Raises:
        PolicyError: If an array has the wrong number of axes or a value that is not finite.
    """

    actions: np.ndarray  # (H, A) float32, row k is slot k, action units
    latent: np.ndarray  # (Z,) float32, features of the base policy for the head (paper: z)
    language: np.ndarray  # (L,) float32, embedding of the instruction (paper: l)

    def __post_init__(self) -> None:
        for name, axes in (("actions", 2), ("latent", 1), ("language", 1)):
            array = getattr(self, name)
            if array.ndim != axes or not np.isfinite(array).all():
                raise PolicyError(
                    f"policy output {name} has shape {array.shape} and "
                    f"{np.count_nonzero(~np.isfinite(array))} values that are not finite; "
                    f"allowed are {axes} axes of finite numbers"
                )


class ChunkPolicy(Protocol):
    """A policy that maps one observation and an instruction to a chunk of actions."""

    policy_id: str  # names these weights and sampling settings; a head is trained for one of them
    horizon: int  # H
    action_names: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int  # side of the square images [pixels]
    state_dim: int
    latent_dim: int
    language_dim: int

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of an instruction, (L,) float32; computed once per instruction."""
        ...

    def predict(self, observation: Mapping[str, np.ndarray], instruction: str, *, seed: int) -> PolicyOutput:
        """Compute a chunk.

        Args:
            observation: Per camera (image_size, image_size, 3) uint8 RGB upright, and "state" (state_dim,) float32.
            instruction: What to do, in words.
            seed: Of the sampling noise; equal inputs and seeds give equal chunks.

        Raises:
            ObservationError: If an image or the state has a wrong shape, dtype or value.
            PolicyError: If the chunk is not finite.
        """
        ...


def check_observation(policy: ChunkPolicy, observation: Mapping[str, np.ndarray]) -> None:
    """Check the shapes, dtypes and values of an observation for a policy.

    Raises:
        ObservationError: Naming the stream, what it has and what is allowed.
    """
    expected = {name: ((policy.image_size, policy.image_size, 3), np.uint8) for name in policy.cameras}
    expected["state"] = ((policy.state_dim,), np.float32)
    for name, (shape, dtype) in expected.items():
        if name not in observation:
            raise ObservationError(f"the observation has no {name!r}, it has {sorted(observation)}")
        array = observation[name]
        if array.shape != shape or array.dtype != dtype:
            raise ObservationError(
                f"observation {name!r} is {array.dtype} {array.shape}, allowed is {np.dtype(dtype)} {shape}"
            )
    if not np.isfinite(observation["state"]).all():
        raise ObservationError(f"the state is not finite: {observation['state'].tolist()}")
