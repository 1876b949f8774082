"""One episode in one process: simulator, planner schedule and correction loop, stepped together without DDS.

The same classes run in the nodes, in the same order, so that both execute the same actions.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.controller import ControlStep, CorrectionLoop
from a2c2_ros.core.errors import ChunkError, SimulationError
from a2c2_ros.core.observation import ObservationBuffer
from a2c2_ros.core.planner import PlannerSchedule
from a2c2_ros.core.robot import Robot
from a2c2_ros.policies.base import ChunkPolicy, infer_chunk


class Environment(Protocol):
    """What a rollout needs of a simulator; see ``sim.libero_env``."""

    instruction: str

    def reset(self, initial_state: int | None, seed: int) -> Mapping[str, np.ndarray]: ...

    def step(self, action: np.ndarray, look: bool = True) -> tuple[Mapping[str, np.ndarray], bool]:
        """Apply an action; with ``look=False`` nobody will read the images, and those of the last look may come."""
        ...


@dataclass(eq=False)
class Episode:
    """Result of one episode."""

    success: bool
    steps: int
    seconds: float
    inference_ms: list[float] = field(default_factory=list)
    head_ms: list[float] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)  # ticks per controller state
    refused_chunks: int = 0  # by the loop, see ChunkGate


def run_episode(
    env: Environment,
    robot: Robot,
    policy: ChunkPolicy,
    loop: CorrectionLoop,
    config: PlannerConfig,
    *,
    initial_state: int | None,
    seed: int,
    max_steps: int,
    start_ns: int = 50_000_000,
    on_step: Callable[[ControlStep, Mapping[str, np.ndarray]], None] | None = None,
) -> Episode:
    """Run one episode in lockstep.

    The chunk of an inference is computed at once and handed over when it is due, so that the delay is exactly the
    injected one. Images that neither policy, head nor ``on_step`` would read are not rendered.

    Args:
        env: The simulator.
        robot: Must describe the simulator's robot.
        policy: The base policy.
        loop: The correction loop; it is reset first.
        config: Execution horizon, delay, chunking, seed; the same as for ``chunk_planner``.
        initial_state: Official initial state, or None for a sampled one.
        seed: Seed of the environment.
        max_steps: Step limit.
        start_ns: Stamp of the first observation [ns].
        on_step: Called with every control step and the observation that it saw; None: nothing is called.

    Returns:
        The episode's result.

    Raises:
        SimulationError: If the loop has no command for a step, which in lockstep only a bug can cause.
        PolicyError: If the policy cannot go on from its previous chunk as ``config.chunking`` says.
    """
    started = time.perf_counter()
    observation = env.reset(initial_state, seed)
    loop.reset()
    states_before = loop.counts.copy()
    schedule = PlannerSchedule(config)
    buffer = ObservationBuffer(robot.streams)
    ready: ActionChunk | None = None
    chunk_id = 0
    always_look = loop.config.correction__enabled or on_step is not None
    result = Episode(success=False, steps=0, seconds=0.0)

    def hand_over(now_ns: int) -> None:
        if schedule.in_flight is not None and now_ns >= schedule.in_flight.t_due_ns:
            # As in the node: what may not move the robot is counted, and the chunk before it goes on.
            try:
                loop.install(schedule.release(ready, now_ns), now_ns)
            except ChunkError:
                result.refused_chunks += 1

    while result.steps < max_steps and not result.success:
        now_ns = start_ns + result.steps * config.step_ns
        for stream in robot.streams:
            buffer.put(stream, now_ns, observation[stream])
        hand_over(now_ns)
        request = schedule.next_request(now_ns)
        if request is not None:
            chunk_id += 1
            ready = infer_chunk(policy, robot, observation, env.instruction, request, chunk_id, config.step_ns)
            result.inference_ms.append(ready.inference_ns / 1e6)
            hand_over(now_ns)
        step = loop.tick(now_ns, buffer.snapshot())
        if on_step is not None:
            on_step(step, observation)
        if step.command is None:
            raise SimulationError(f"no command for step {result.steps}: {step.state.name}, {step.reason.name}")
        if step.head_ns:
            result.head_ms.append(step.head_ns / 1e6)
        look = always_look or schedule.wants(now_ns + config.step_ns)
        observation, result.success = env.step(step.command, look=look)
        result.steps += 1
    result.states = {state.name: n for state, n in (loop.counts - states_before).items()}
    result.seconds = time.perf_counter() - started
    return result


def run_expert_episode(env: Environment, *, initial_state: int | None, seed: int, max_steps: int) -> Episode:
    """Run one episode of the scripted expert, the upper reference: it acts at every step and sees the true poses.

    Args:
        env: The simulator, a ``LiberoEnv``; it need not render.
        initial_state: Official initial state, or None for a sampled one.
        seed: Seed of the environment.
        max_steps: Step limit.

    Returns:
        The episode's result, without inferences, head and controller states.
    """
    from a2c2_ros.sim.expert import Expert  # needs the simulator, which rollouts of other environments do not

    started = time.perf_counter()
    observation = env.reset(initial_state, seed)
    expert = Expert(env)
    result = Episode(success=False, steps=0, seconds=0.0)
    while result.steps < max_steps and not result.success:
        observation, result.success = env.step(expert.act(observation), look=False)
        result.steps += 1
    result.seconds = time.perf_counter() - started
    return result
