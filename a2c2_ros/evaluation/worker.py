"""A process that runs episodes of one LIBERO task: requests come as JSON lines on stdin, records go out the same way.

A process has one simulator in its life, because a second renderer may draw wrong images without an error. So it stays
for as long as there is work for its task. ``ProcessWorker`` is the side that asks.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation.cells import EXPERT, STATIC, Cell, episode_name, parse_variant
from a2c2_ros.paths import model_path
from a2c2_ros.policies.lerobot_files import is_checkpoint

MODELS_KEPT = 2
"""Policies, and heads, that stay loaded; a row usually runs for several cells."""
STOP_TIMEOUT_S = 10.0
EPISODE_ERRORS = (A2C2Error, ArithmeticError, RuntimeError, ValueError)
"""What spoils one episode only. Anything else is a bug of the evaluation and ends the process."""

Run = Callable[[Any, Cell, int], Mapping[str, Any]]


class Worker(Protocol):
    """Runs episodes of one task and one variant."""

    def run(self, cell: Cell, number: int) -> dict[str, Any]:
        """Run an episode; the record is of :func:`attempt`. Raises WorkerError if the process died."""
        ...

    def close(self) -> None:
        """End it; may be called twice and from another thread."""
        ...


class WorkerError(A2C2Error, RuntimeError):
    """A worker process died, or could not make its simulator."""


def run_cell_episode(env: Any, cell: Cell, number: int, videos: Path | None = None) -> dict[str, Any]:
    """Run one episode of a cell on a simulator.

    Args:
        env: The simulator.
        cell: How.
        number: Of the episode.
        videos: Existing folder for an MP4 file of the episode; of the expert's there is none.

    Returns:
        The fields of :class:`rollout.Episode`, and ``failure``: of ``failures.FAILURES``, None for a success.
    """
    from a2c2_ros.evaluation.failures import Watched
    from a2c2_ros.evaluation.rollout import run_episode, run_expert_episode
    from a2c2_ros.recording.film import filmed

    env = Watched(env)
    initial_state, seed = cell.placement(number)
    where = {"initial_state": initial_state, "seed": seed, "max_steps": cell.max_steps}
    if cell.method == EXPERT:
        episode = run_expert_episode(env, **where)
    else:
        policy, loop = _policy(cell.policy), _loop(cell.head if cell.corrected else "")
        robot = load_profile("libero").robot
        video = None if videos is None else videos / f"{episode_name(env.task, number)}.mp4"
        with filmed(video, robot, f"{cell.name}, task {env.task}, state {number}") as on_step:
            episode = run_episode(env, robot, policy, loop, cell.planner_config(), **where, on_step=on_step)
    return {**vars(episode), "failure": None if episode.success else env.failure}


@functools.lru_cache(maxsize=MODELS_KEPT)
def _policy(path: str) -> Any:
    from a2c2_ros.policies.registry import load_policy_for

    folder = model_path(path)
    return load_policy_for(load_profile("libero"), "lerobot" if is_checkpoint(folder) else "flow", folder, threads=1)


@functools.lru_cache(maxsize=MODELS_KEPT)
def _loop(head: str) -> CorrectionLoop:
    from a2c2_ros.heads.onnx_head import OnnxHead

    config = ControllerConfig(correction__enabled=bool(head), lockstep=True)
    return CorrectionLoop(config, load_profile("libero").robot, OnnxHead(model_path(head)) if head else None)


def attempt(env: Any, cell: Cell, number: int, run: Run = run_cell_episode) -> dict[str, Any]:
    """The record of an episode: ``error`` None and its fields, or the exception that it ended with and nothing else."""
    try:
        return {"error": None, **run(env, cell, number)}
    except EPISODE_ERRORS as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def serve(env: Any, requests: TextIO, replies: TextIO, run: Run = run_cell_episode) -> None:
    """Answer requests, a JSON object {"cell", "number"} per line, until there are no more."""
    for line in requests:
        request = json.loads(line)
        record = attempt(env, Cell(**request["cell"]), request["number"], run)
        replies.write(json.dumps(record) + "\n")
        replies.flush()


class ProcessWorker:
    """A :class:`Worker` in a process of its own, one numeric thread.

    Args:
        command: Starts a program that calls :func:`serve`.
        log: Gets what the process prints.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("a") as file:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                process_group=0,  # Ctrl-C reaches the parent only
            )

    @staticmethod
    def libero(task: int, variant: str, log_folder: Path, videos: Path | None = None) -> "ProcessWorker":
        """A worker with the LIBERO simulator; with ``videos`` every episode leaves a video in that folder."""
        command = [sys.executable, "-m", "a2c2_ros.evaluation.worker", "--task", str(task), "--variant", variant]
        command += [] if videos is None else ["--videos", str(videos)]
        return ProcessWorker(command, log_folder / f"task{task:02d}_{variant}.log")

    def run(self, cell: Cell, number: int) -> dict[str, Any]:
        """See :class:`Worker`."""
        try:
            self._process.stdin.write(json.dumps({"cell": dataclasses.asdict(cell), "number": number}) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # ValueError: closed by another thread
            reply = ""
        if not reply.endswith("\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            self.close()
            code = self._process.returncode
            raise WorkerError(f"the process of {cell.name}, episode {number}, ended with code {code}, see {self._log}")
        return json.loads(reply)

    def close(self) -> None:
        """See :class:`Worker`."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.evaluation.worker", description=__doc__)
    parser.add_argument("--task", type=int, required=True, help="task number")
    parser.add_argument(
        "--variant", default=STATIC, help="static, swap, or a motion of the simulator; +0.5: with pushes"
    )
    parser.add_argument("--videos", type=Path, help="existing folder for a video of every episode")
    args = parser.parse_args(argv)
    # Whatever a library prints must not come between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from a2c2_ros.sim.disturbance import Disturbed
    from a2c2_ros.sim.libero_env import LiberoEnv

    try:
        arguments, strength = parse_variant(args.variant)
        with LiberoEnv(args.task, **arguments) as env:
            run = functools.partial(run_cell_episode, videos=args.videos)
            serve(Disturbed(env, strength) if strength else env, sys.stdin, replies, run)
    except A2C2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
