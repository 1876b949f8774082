"""What a chunk policy is to the planner."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.errors import ConfigError, ObservationError, PolicyError
from a2c2_ros.core.planner import ChunkRequest
from a2c2_ros.core.robot import Robot

if TYPE_CHECKING:
    import torch


CONTINUED = ("rtc", "tt_rtc")
"""Ways of chunking in which the policy goes on from the last chunk."""
REMEMBERED = 256
"""Instructions whose embeddings are kept; a server gets any number of them."""


@dataclass(frozen=True, eq=False)
class PolicyOutput:
    """One inference of a policy.

    Raises:
        PolicyError: If an array has the wrong number of axes or a value that is not finite.
    """

    actions: np.ndarray  # (H, A) float32, row k is slot k, action units
    latent: np.ndarray  # (Z,) float32, features of the base policy for the head (paper: z)
    language: np.ndarray  # (L,) float32, embedding of the instruction (paper: l)
    inference_ns: int | None = None  # by the clock of another machine that computed it; None: all the time of the call

    def __post_init__(self) -> None:
        for name, axes in (("actions", 2), ("latent", 1), ("language", 1)):
            array = getattr(self, name)
            if array.ndim != axes or not np.isfinite(array).all():
                raise PolicyError(
                    f"policy output {name} has shape {array.shape} and "
                    f"{np.count_nonzero(~np.isfinite(array))} values that are not finite; "
                    f"allowed are {axes} axes of finite numbers"
                )


@dataclass(frozen=True, eq=False)
class Continuation:
    """What the previous chunk does in the time of the new one, for real-time chunking.

    These are actions of the base policy, never corrected ones: a correction answers an observation of its own time.

    Raises:
        PolicyError: If ``delay_steps`` is negative or larger than the number of actions.
    """

    actions: np.ndarray  # (n, A) float32, action units; row k is slot k of the new chunk. (B, n, A) for a batch
    delay_steps: int  # d: that many of them are executed before the new chunk arrives
    mode: str  # "rtc": guidance while sampling (arXiv 2506.07339); "tt_rtc": given as input (arXiv 2512.05964)

    def __post_init__(self) -> None:
        left = self.actions.shape[-2]
        if not 0 <= self.delay_steps <= left:
            raise PolicyError(f"delay_steps is {self.delay_steps}, allowed is 0 to the {left} actions that are left")

    @classmethod
    def of(cls, request: ChunkRequest) -> "Continuation | None":
        """What the chunk of a request has to go on from; None: nothing."""
        if not len(request.known):
            return None
        return cls(request.known, min(request.delay_steps, len(request.known)), request.chunking)


@dataclass(frozen=True, eq=False)
class PolicyOptions:
    """What a policy may have to know beside its path; each kind reads what it needs."""

    device: str = "cpu"  # where it runs, a torch device
    dtype: str = "float32"  # of its arithmetic: float32, bfloat16 or float16
    threads: int | None = None  # CPU threads, for the whole process; None leaves them
    robot: Robot | None = None  # names of cameras, state and action, for policies whose files do not tell
    camera_shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # of the robot's cameras
    mapping: Mapping[str, Any] = field(default_factory=dict)  # content of the policy's YAML file, empty without one

    def torch_device(self) -> "torch.device":
        """The device, after trying it.

        Raises:
            ConfigError: If torch does not know it or this machine does not have it.
        """
        import torch

        try:
            return torch.zeros(1, device=self.device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device is {self.device!r}, which cannot be used here: {reason}") from error


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
    trained_for: Mapping[str, Any]  # of step_ns, state_names and action_space what its files tell

    def largest_delay(self, chunking: str) -> int | None:
        """The largest d [steps] with which it goes on from a chunk, by "rtc" or "tt_rtc"; None: it cannot."""
        ...

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of an instruction, (L,) float32; computed once per instruction."""
        ...

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str,
        *,
        seed: int,
        continuation: Continuation | None = None,
    ) -> PolicyOutput:
        """Compute a chunk.

        Args:
            observation: Per camera (image_size, image_size, 3) uint8 RGB upright, and "state" (state_dim,) float32.
            instruction: What to do, in words.
            seed: Of the sampling noise; equal inputs and seeds give equal chunks.
            continuation: What the chunk has to go on from; None: nothing.

        Raises:
            ObservationError: If an image or the state has a wrong shape, dtype or value.
            PolicyError: If the chunk is not finite, or the policy cannot go on from ``continuation``.
        """
        ...


def check_continuation(policy: ChunkPolicy, chunking: str, delay_steps: int) -> None:
    """Check that a policy can go on from a chunk as the planner's parameters want it.

    Raises:
        ConfigError: Naming the parameter, its value and what is allowed.
    """
    if chunking not in CONTINUED:
        return
    largest = policy.largest_delay(chunking)
    if largest is None:
        others = [c for c in CONTINUED if policy.largest_delay(c) is not None]
        raise ConfigError(
            f"chunking is {chunking!r}, which the policy {policy.policy_id} cannot do, allowed are "
            f"{['asynchronous', 'synchronous', *others]}"
        )
    if delay_steps > largest:
        raise ConfigError(
            f"inference_delay is {delay_steps}, with chunking {chunking!r} the policy {policy.policy_id} allows at "
            f"most {largest}"
        )


def infer_chunk(
    policy: ChunkPolicy,
    robot: Robot,
    values: Mapping[str, np.ndarray],
    instruction: str,
    request: ChunkRequest,
    chunk_id: int,
    step_ns: int,
    planner_id: str = "",
) -> ActionChunk:
    """Run a policy on an observation of a robot; the planner node and the evaluation both call this.

    Args:
        policy: The base policy.
        robot: Gives the images, the state and the action names.
        values: Newest sample of every stream of the robot.
        instruction: What to do, in words.
        request: From the planner's schedule: stamp of the observation, seed, what to go on from.
        chunk_id: Number of the chunk.
        step_ns: Duration of a slot [ns].
        planner_id: Which planner asks, unique to its start.

    Returns:
        The chunk, with the durations of inference and transport.

    Raises:
        ObservationError: If the observation does not fit the policy.
        PolicyError: If the policy's output is not finite, or it cannot go on from the previous chunk.
        ChunkError: If the output does not fit the robot's action.
    """
    inputs = robot.images(values) | {"state": robot.state_of(values)}
    started_ns = time.perf_counter_ns()
    output = policy.predict(inputs, instruction, seed=request.seed, continuation=Continuation.of(request))
    duration_ns = time.perf_counter_ns() - started_ns
    inference_ns = duration_ns if output.inference_ns is None else min(output.inference_ns, duration_ns)
    return ActionChunk(
        chunk_id=chunk_id,
        t_obs_ns=request.t_obs_ns,
        step_ns=step_ns,
        actions=output.actions,
        action_names=robot.action_names,
        latent=output.latent,
        language=output.language,
        policy_id=policy.policy_id,
        planner_id=planner_id,
        inference_ns=inference_ns,
        transport_ns=duration_ns - inference_ns,
    )


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
