"""Episodes of many cells of an (e, d) grid at a time: simulator, policy and head take batches.

When a chunk is asked for, when it is there and which slot owns a step is decided by the classes of the planner and the
control loop, once per cell, because all its episodes are in step.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from a2c2_ros.core.buffer import ChunkBuffer
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.planner import ChunkRequest, PlannerSchedule
from a2c2_ros.evaluation.methods import Method
from a2c2_ros.heads.base import Head
from a2c2_ros.policies.base import Continuation
from a2c2_ros.policies.flow import FlowNetwork

if TYPE_CHECKING:
    from a2c2_ros.sim.kinetix_env import KinetixEnv


class CellSchedule:
    """When the chunks of a cell are asked for and executed; the core decides, by time alone.

    The core's chunk is a token whose slot k holds the number k: what the core picks of it is picked of the chunks of
    all episodes.
    """

    def __init__(self, method: Method, e: int, d: int, horizon: int, step_ns: int, seed: int) -> None:
        self._config = PlannerConfig(
            horizon=horizon,
            execution_horizon=e,
            inference_delay=d,
            control_rate_hz=1e9 / step_ns,
            chunking=method.chunking,
            seed=seed,
        )
        self._schedule = PlannerSchedule(self._config)
        self._buffer = ChunkBuffer()
        self._slots = np.arange(horizon, dtype=np.float32)[:, None]
        self._ready: ActionChunk | None = None
        self._count = 0

    def begin(self, now_ns: int) -> ChunkRequest | None:
        """Hand over what is due; the inference that starts now, or None."""
        self._hand_over(now_ns)
        request = self._schedule.next_request(now_ns)
        if request is not None:
            self._count += 1
            self._ready = ActionChunk(
                chunk_id=self._count,
                t_obs_ns=request.t_obs_ns,
                step_ns=self._config.step_ns,
                actions=self._slots,
                action_names=("slot",),
                latent=np.zeros(0),
                language=np.zeros(0),
                policy_id="",
            )
            self._hand_over(now_ns)
        return request

    @property
    def newest(self) -> int:
        """Number of the chunk that was asked for last."""
        return self._count

    def select(self, now_ns: int) -> tuple[int, int]:
        """Number of the chunk that owns this step, and its slot."""
        chunk, slot = self._buffer.select(now_ns)
        return chunk.chunk_id, slot

    def _hand_over(self, now_ns: int) -> None:
        flying = self._schedule.in_flight
        if flying is not None and now_ns >= flying.t_due_ns:
            self._buffer.install(self._schedule.release(self._ready, now_ns))


@dataclass(eq=False)
class _Cell:
    schedule: CellSchedule
    rows: slice
    chunks: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # (R, H, A) and (R, Z), newest


@dataclass(frozen=True, eq=False)
class Outcome:
    """Episodes of a method on a level."""

    solved: dict[tuple[int, int], np.ndarray]  # (e, d) to (R,) bool
    steps: dict[tuple[int, int], np.ndarray]  # (e, d) to (R,) int
    seconds: dict[str, float]  # of the simulator, the policy and the head
    counts: dict[str, int]  # steps, chunks and corrections of episodes until their ends


def run_method(
    env: "KinetixEnv",
    policy: FlowNetwork,
    head: Head | None,
    method: Method,
    pairs: Sequence[tuple[int, int]],
    rollouts: int,
    seed: int,
    language: torch.Tensor,
    bar: tqdm | None = None,
) -> Outcome:
    """Run all cells of a method on a level together.

    Args:
        env: Of the level.
        policy: Base policy.
        head: Correction head; used if the method corrects.
        method: How chunks are executed.
        pairs: (e, d) of the cells.
        rollouts: Episodes per cell.
        seed: Of action noise and sampling.
        language: (L,) the policy's embedding of the instruction.
        bar: Advanced by one per step of all.

    Raises:
        PolicyError: If the policy cannot go on from its previous chunk as the method says.
    """
    horizon, step_ns, device = policy.config.horizon, policy.config.step_ns, policy.action_std.device
    taus = torch.tensor(np.stack([time_feature(k, horizon) for k in range(horizon)]), device=device)
    cells = [
        _Cell(CellSchedule(method, e, d, horizon, step_ns, seed), slice(i * rollouts, (i + 1) * rollouts))
        for i, (e, d) in enumerate(pairs)
    ]
    count = len(cells) * rollouts
    batch, state = env.reset(count)
    over, solved = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    steps = np.full(count, env.max_steps)
    base = torch.zeros(count, len(env.action_names), device=device)
    latent = torch.zeros(count, policy.config.latent_dim, device=device)
    slots = torch.zeros(count, dtype=torch.int64, device=device)
    words = language.to(device).expand(count, -1)
    seconds, counts = Counter(), Counter()
    noise = torch.Generator().manual_seed(seed)
    for step in range(env.max_steps):
        now_ns, begun = (step + 1) * step_ns, time.perf_counter()
        seen = torch.tensor(state, device=device)
        alive = ~over
        with torch.inference_mode():
            for cell in cells:
                going = torch.tensor(alive[cell.rows], device=device)
                request = cell.schedule.begin(now_ns)
                if request is not None:
                    _infer(cell, request, policy, seen[cell.rows], words[cell.rows], noise, going)
                    counts["chunks"] += int(going.sum())
                number, slot = cell.schedule.select(now_ns)
                chunks, latents = cell.chunks[number]
                base[cell.rows], latent[cell.rows], slots[cell.rows] = chunks[:, slot], latents, slot
            if device.type == "cuda":
                torch.cuda.synchronize()
            inferred = time.perf_counter()
            action = base.clone()  # the simulator may keep it
            if method.corrected:
                rows = torch.tensor(np.flatnonzero(alive), device=device)
                taken = latent[rows, : head.config.latent_dim], words[rows, : head.config.language_dim]
                action[rows] += head.fuse({}, seen[rows], base[rows], taus[slots[rows]], *taken)
                counts["corrections"] += len(rows)
            action = action.cpu().numpy()
        corrected = time.perf_counter()
        stepped = env.step(batch, action, (seed, step), going=alive)
        counts["steps"] += int(alive.sum())
        batch, state = stepped.batch, stepped.state
        first = stepped.ended & alive
        solved |= first & stepped.solved
        steps[first] = step + 1
        over |= first
        for name, duration in (
            ("policy", inferred - begun),
            ("head", corrected - inferred),
            ("simulator", time.perf_counter() - corrected),
        ):
            seconds[name] += duration
        if bar is not None:
            bar.update()
        if over.all():
            break
    return Outcome(
        {pair: solved[cell.rows] for pair, cell in zip(pairs, cells, strict=True)},
        {pair: steps[cell.rows] for pair, cell in zip(pairs, cells, strict=True)},
        dict(seconds),
        dict(counts),
    )


def _infer(
    cell: _Cell,
    request: ChunkRequest,
    policy: FlowNetwork,
    state: torch.Tensor,
    language: torch.Tensor,
    generator: torch.Generator,
    going: torch.Tensor,
) -> None:
    """The chunks of a cell's episodes that go on; the two newest are kept, which is all that a schedule may execute."""
    noise = torch.randn(len(state), policy.decoder.output.out_features, generator=generator).to(state.device)
    chunks = state.new_zeros(len(state), policy.config.horizon, len(policy.config.action_names))
    latents = state.new_zeros(len(state), policy.config.latent_dim)
    if going.any():
        latents[going] = policy.encode({}, state[going], language[going])
        chunks[going] = policy.sample(latents[going], noise[going], _continuation(cell, request, going))
    cell.chunks[cell.schedule.newest] = (chunks, latents)
    for old in [number for number in cell.chunks if number < cell.schedule.newest - 1]:
        del cell.chunks[old]


def _continuation(cell: _Cell, request: ChunkRequest, going: torch.Tensor) -> Continuation | None:
    if not len(request.known):
        return None
    previous, _ = cell.chunks[cell.schedule.newest - 1]
    known = previous[going][:, request.known[:, 0].astype(int)].cpu().numpy()
    return Continuation(known, min(request.delay_steps, known.shape[1]), request.chunking)
