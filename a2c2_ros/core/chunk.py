"""The action chunk: H future actions of a policy and everything that belongs to them."""

from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.errors import ChunkError


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """Actions of a policy for the H control steps after one observation (paper equation 1).

    Immutable: the planner's thread makes it, the control loop's thread reads it. Arrays are copied to float32 and made
    read-only.

    Raises:
        ChunkError: If a shape, name, value or time is wrong.
    """

    chunk_id: int  # positive, rising per planner
    t_obs_ns: int  # stamp of the observation that it was computed from [ns]
    step_ns: int  # duration of a slot [ns]
    actions: np.ndarray  # (H, A) float32, row k is slot k, action units
    action_names: tuple[str, ...]  # A names, order of the columns
    latent: np.ndarray  # (Z,) float32, may be empty
    language: np.ndarray  # (L,) float32, may be empty
    policy_id: str
    planner_id: str = ""  # which planner made it, unique to its start
    inference_ns: int = 0  # the policy's computation [ns]
    transport_ns: int = 0  # to a policy on another machine and back [ns]

    def __post_init__(self) -> None:
        object.__setattr__(self, "action_names", tuple(self.action_names))
        for name, dimensions in (("actions", 2), ("latent", 1), ("language", 1)):
            try:
                array = np.array(getattr(self, name), dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise ChunkError(f"chunk {self.chunk_id}: {name} is not an array of numbers: {error}") from error
            array.setflags(write=False)
            object.__setattr__(self, name, array)
            if array.ndim != dimensions:
                raise ChunkError(
                    f"chunk {self.chunk_id}: {name} has shape {array.shape}, allowed are {dimensions} axes"
                )
            if not np.isfinite(array).all():
                raise ChunkError(
                    f"chunk {self.chunk_id}: {name} has {np.count_nonzero(~np.isfinite(array))} values "
                    "that are not finite"
                )
        if self.chunk_id <= 0:
            raise ChunkError(f"chunk_id is {self.chunk_id}, allowed is a positive number")
        if self.step_ns <= 0:
            raise ChunkError(f"chunk {self.chunk_id}: step_ns is {self.step_ns}, allowed is a positive duration")
        if self.t_obs_ns < 0:
            raise ChunkError(f"chunk {self.chunk_id}: t_obs_ns is {self.t_obs_ns}, allowed is a time of 0 or later")
        for name in ("inference_ns", "transport_ns"):
            if getattr(self, name) < 0:
                raise ChunkError(f"chunk {self.chunk_id}: {name} is {getattr(self, name)}, allowed is 0 or more")
        if self.horizon == 0 or self.actions.shape[1] != len(self.action_names) or not self.action_names:
            raise ChunkError(
                f"chunk {self.chunk_id}: actions have shape {self.actions.shape}, allowed is "
                f"(horizon >= 1, {len(self.action_names)}) for the names {list(self.action_names)}"
            )
        if len(set(self.action_names)) != len(self.action_names):
            raise ChunkError(f"chunk {self.chunk_id}: action_names {list(self.action_names)} repeat a name")

    @property
    def horizon(self) -> int:
        """H, the number of slots."""
        return self.actions.shape[0]

    @property
    def t_end_ns(self) -> int:
        """End of the last slot [ns]."""
        return self.t_obs_ns + self.horizon * self.step_ns
