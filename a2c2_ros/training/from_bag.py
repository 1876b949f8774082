"""Recorded runs as one data set: ``python -m a2c2_ros.training.from_bag BAG... --out DATASET``.

A frame is a control tick that moved the robot: the observation that the loop decided on, what it executed, the base
chunk and slot, and a label. The observation is the one that the live loop used, found by the recorded ages and
converted by the same functions; the whole run is computed again by the same loop and compared (parity). The result is a
data set as of ``training.on_policy``: ``action`` is the label, ``action.executed`` what was executed, the base chunks
are in ``executed/<policy id>.npz``, so that ``train_head --data`` takes it.

Labels: ``executed``: the command, in successful episodes; ``takeover``: the person's command, while a person commands;
``expert``: the topic expert_action; ``auto``: the first of takeover, expert, executed that a frame has, executed only
in episodes that nobody took over. A frame without a label is not in the data set. A data-set episode has no gaps: where
a tick was missed, lost or has no label, the next one begins; ``executed/record.json`` says which belong to one run.

Bags without any chunk, in which a person commands all the time, give demonstrations for a base policy
(``train_policy --data``).

A damaged bag gives what can be saved; ``from_bag.json`` in the data set says what was lost.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ConfigError, ObservationError
from a2c2_ros.core.head import CorrectionHead
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.replay import RecordedStep, Samples, observed, replay
from a2c2_ros.core.safety import MOVING, State
from a2c2_ros.policies.language import LANGUAGE_DIM, InstructionEncoder
from a2c2_ros.training.assembling import assemble, features_of
from a2c2_ros.training.dataset import IMAGE_PREFIX
from a2c2_ros.training.joining import save_executed, save_language, save_record
from a2c2_ros.training.recorded_run import Episode, Recording

LABELS = ("auto", "executed", "takeover", "expert")
MIN_PART_FRAMES = 2
"""A video of one frame cannot be joined to others; a frame without a neighbour is left out."""
PART_BYTES = 512_000_000
"""A data-set episode whose images are larger goes on in another one: it is kept in memory while it is encoded."""
REPORT_FILE = "from_bag.json"


@dataclass(eq=False)
class Part:
    """Frames without a gap that become one episode of the data set."""

    key: tuple[Episode, str]  # episode and instruction
    run: int = 0  # number of the episode over all bags
    end_ns: int = 0  # when the next frame is due
    frames: dict[str, list[np.ndarray]] = field(default_factory=dict)
    ticks: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of the labels
    slots: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    chunks: dict[int, ActionChunk] = field(default_factory=dict)

    def add(self, frame: "Frame", tick: int) -> None:
        """Take the frame of a tick."""
        self.ticks.append(tick)
        self.kinds.append(frame.kind)
        for name, value in frame.values.items():
            self.frames.setdefault(name, []).append(value)
        if frame.chunk is not None:
            self.chunks.setdefault(frame.chunk.t_obs_ns, frame.chunk)
        self.rows.append(-1 if frame.chunk is None else list(self.chunks).index(frame.chunk.t_obs_ns))
        self.slots.append(-1 if frame.chunk is None else frame.slot)

    def save(self, path: Path, example: ActionChunk | None) -> None:
        """Write it as ``training.demonstrations`` and ``training.on_policy`` write an episode.

        Args:
            path: File.
            example: Has the sizes of all chunks; None: there is none.
        """
        base = {}
        if example is not None:
            chunks = self.chunks.values()
            actions, latents = [chunk.actions for chunk in chunks], [chunk.latent for chunk in chunks]
            base = {
                "executed.chunk": np.array(self.rows, dtype=np.int64),
                "executed.slot": np.array(self.slots, dtype=np.int64),
                "executed.actions": np.array(actions, dtype=np.float32).reshape(-1, *example.actions.shape),
                "executed.latents": np.array(latents, dtype=np.float32).reshape(-1, example.latent.size),
            }
        episode, instruction = self.key
        frames = {name: np.stack(values) for name, values in self.frames.items()}
        said = {"instruction": instruction, "solved": episode.outcome == "succeeded", "run": self.run}
        np.savez(path, **said, **frames, **base)


@dataclass(eq=False)
class Conversion:
    """What became of the ticks of a recording."""

    lost: dict[str, list[list[int]]] = field(default_factory=dict)  # what a tick lacks -> first and last tick of runs
    labels: Counter[str] = field(default_factory=Counter)

    def lose(self, tick: int, episode: Episode | None, lacks: Sequence[str]) -> None:
        """A tick that is no frame, and what it lacks."""
        for what in lacks:
            runs = self.lost.setdefault(what, [])
            if runs and tick == runs[-1][1] + 1:
                runs[-1][1] = tick
            else:
                runs.append([tick, tick])
            if episode is not None:
                episode.lacking[what] += 1

    @property
    def lost_ticks(self) -> dict[str, int]:
        """How many ticks lack what."""
        return {why: sum(last - first + 1 for first, last in runs) for why, runs in self.lost.items()}


def label_of(
    recording: Recording, step: RecordedStep, observation: Observation, episode: Episode, wanted: str
) -> tuple[str, np.ndarray] | None:
    """The kind of a frame's label and the label, (A,) float32; None if it has none of the wanted kind."""
    unasked = wanted == "auto"
    found = {
        "takeover": step.command if step.state == State.TAKEOVER else None,
        # The expert saw what the newest sample shows.
        "expert": recording.experts.get(max(observation.stamps_ns.values())),
        # A person's success does not make right what led to the takeover.
        "executed": step.command if episode.outcome == "succeeded" and not (unasked and episode.taken_over) else None,
    }
    kinds = found if unasked else (wanted,)
    return next(((kind, found[kind]) for kind in kinds if found[kind] is not None), None)


def compare(
    recording: Recording, heads: Mapping[int, tuple[ControllerConfig, CorrectionHead | None]]
) -> dict[str, object]:
    """Compute a run again: how many ticks could be compared, and which of them came to another command."""
    robot, chunks, takeovers = recording.robot, recording.chunks, recording.takeovers
    replayed = replay(recording.steps, heads, robot, chunks, recording.samples(), takeovers)
    bar = tqdm(replayed, total=len(recording.steps), desc="parity", unit="tick")
    results = [(again.recorded.tick, again.same) for again in bar if again.step is not None]
    return {"compared": len(results), "differing": [tick for tick, same in results if not same]}


@dataclass(frozen=True, eq=False)
class Frame:
    """What a tick gives to the data set."""

    values: dict[str, np.ndarray]  # by feature
    kind: str  # of the label
    instruction: str
    chunk: ActionChunk | None  # the base chunk
    slot: int


def frame_of(
    recording: Recording, sensors: Mapping[str, Samples], step: RecordedStep, episode: Episode | None, wanted: str
) -> Frame | tuple[str, ...]:
    """The frame of a tick, or what it lacks."""
    robot = recording.robot
    if step.state not in MOVING or step.command is None:
        return ("motion",)
    if episode is None:
        return ("episode",)
    observation, missing = observed(step, sensors)
    missing += tuple(set(robot.streams) - set(step.ages_ns))
    # A person may command without a camera; a head may not.
    stale = [name for name, age_ns in step.ages_ns.items() if age_ns > robot.streams[name].max_age_ns]
    missing += tuple(f"a fresh {name}" for name in stale)
    chunk = recording.chunks.get(step.t_obs_ns)
    if step.t_obs_ns and chunk is None:
        missing += ("chunk",)
    instruction = recording.instructions.get(step.t_obs_ns) or episode.instruction
    if not instruction:
        missing += ("instruction",)
    if missing:
        return missing
    label = label_of(recording, step, observation, episode, wanted)
    if label is None:
        return ("label",)
    try:
        state = robot.state_of(observation.values)
    except ObservationError:
        return ("state",)
    images = {f"{IMAGE_PREFIX}{name}": image for name, image in robot.images(observation.values).items()}
    kind, action = label
    values = {"observation.state": state, "action": action, "action.executed": step.command}
    return Frame(images | values, kind, instruction, chunk, step.slot)


def convert(recording: Recording, wanted: str, save: Callable[[Part], None], first_run: int = 0) -> Conversion:
    """Make the parts of a recording.

    Args:
        recording: The run.
        wanted: Of ``LABELS``.
        save: Takes a part when it is complete.
        first_run: Number of the recording's first episode over all bags.
    """
    result, robot, sensors = Conversion(), recording.robot, recording.samples()
    image_bytes = sum(int(np.prod(robot.streams[name].shape)) for name in robot.cameras)
    limit = max(2, PART_BYTES // max(1, image_bytes))
    part: Part | None = None

    def finish() -> None:
        nonlocal part
        if part is not None:
            episode = part.key[0]
            if len(part.slots) < MIN_PART_FRAMES:
                for tick in part.ticks:
                    result.lose(tick, episode, ("neighbour",))
            else:
                episode.parts += 1
                episode.frames += len(part.slots)
                result.labels.update(part.kinds)
                save(part)
        part = None

    for step in tqdm(recording.steps, desc=recording.path.name, unit="tick"):
        episode = recording.episode_at(step.t_tick_ns)
        frame = frame_of(recording, sensors, step, episode, wanted)
        if not isinstance(frame, Frame):
            result.lose(step.tick, episode, frame)
            continue
        key = (episode, frame.instruction)
        if part is None or part.key != key or step.t_tick_ns != part.end_ns or len(part.slots) >= limit:
            finish()
            part = Part(key, first_run + recording.episodes.index(episode))
        part.end_ns = step.t_tick_ns + recording.period_ns
        part.add(frame, step.tick)
    finish()
    return result


def check_same(recordings: Sequence[Recording]) -> int:
    """Check that bags go into one data set.

    Returns:
        Frames per second.

    Raises:
        ConfigError: Naming what differs, or what no data set can have.
    """
    first = recordings[0].identity
    for other in recordings[1:]:
        rows = [(name, value, other.identity[name]) for name, value in first.items()]
        if wrong := [f"{name}: {mine!r} and {theirs!r}" for name, mine, theirs in rows if mine != theirs]:
            raise ConfigError(f"{recordings[0].path} and {other.path} are of different runs: " + "; ".join(wrong))
    for name in ("policy_id", "horizon"):
        if " and " in first[name]:
            raise ConfigError(f"{recordings[0].path}: {name} of the chunks is {first[name]!r}, allowed is one or none")
    fps, period_ns = round(first["control_rate_hz"]), recordings[0].period_ns
    steps = {chunk.step_ns for recording in recordings for chunk in recording.chunks.values()}
    if round(1e9 / fps) != period_ns or not steps <= {period_ns}:
        raise ConfigError(
            f"{recordings[0].path}: the control period is {period_ns} ns, steps of the chunks are {sorted(steps)} ns, "
            "allowed is one period of a whole number of steps per second"
        )
    return fps


def summary(recording: Recording, conversion: Conversion, parity: Mapping[str, object] | None) -> dict[str, object]:
    """What is said of a bag in the report; parity is of :func:`compare`."""
    steps, damage = recording.steps, recording.damage
    ticks = np.array([step.tick for step in steps])
    heads = {revision: sha for revision, (_, _, sha) in recording.configurations.items()}
    return {
        "bag": str(recording.path),
        "intact": damage.intact,
        **dataclasses.asdict(damage),
        "refused": dict(recording.refused),
        "seconds": recording.seconds,
        "head_sha256": heads,
        "states": {state.name: n for state, n in Counter(step.state for step in steps).items()},
        "ticks": {
            "recorded": len(steps),
            "not_recorded": int(np.maximum(np.diff(ticks) - 1, 0).sum()),
            "missed_by_the_loop": recording.missed_ticks,
            "after_a_restart_and_not_used": recording.after_restart,
        },
        "lacking": conversion.lost_ticks,
        "lacking_ticks": conversion.lost,
        "labels": dict(conversion.labels),
        "episodes": [
            {
                "task": episode.task,
                "instruction": episode.instruction,
                "outcome": episode.outcome,
                "frames": episode.frames,
                "parts": episode.parts,
                "lacking": dict(episode.lacking),
            }
            for episode in recording.episodes
        ],
        "parity": parity,
    }


def tell(bag: Mapping[str, object]) -> None:
    """Print what is worth knowing of a bag's report."""
    frames = sum(episode["frames"] for episode in bag["episodes"])
    parity = bag["parity"] and f"{len(bag['parity']['differing'])} of {bag['parity']['compared']} ticks differ"
    print(f"{bag['bag']}: {frames} frames of {bag['ticks']['recorded']} ticks; parity: {parity or 'not checked'}")
    facts = [*bag["problems"], *(f"{n} messages of {topic} were not recorded" for topic, n in bag["dropped"].items())]
    facts += [f"{n} messages of {topic} could not be converted" for topic, n in bag["refused"].items()]
    facts += [f"{n} ticks lack {what}" for what, n in bag["lacking"].items()]
    facts += [f"{n} ticks {what.replace('_', ' ')}" for what, n in bag["ticks"].items() if n and what != "recorded"]
    for number, episode in enumerate(bag["episodes"]):
        if not episode["frames"]:
            facts.append(f"episode {number} ({episode['outcome']}) has no frame, its ticks lack {episode['lacking']}")
    for fact in facts:
        print(f"  {fact}")


def language_of(recordings: Sequence[Recording]) -> dict[str, np.ndarray]:
    """Instruction to the policy's embedding; empty if the policy has none, or takes that of the package."""
    found = {r.instructions[stamp]: chunk.language for r in recordings for stamp, chunk in r.chunks.items()}
    encoder = InstructionEncoder()

    def of_package(text: str, value: np.ndarray) -> bool:
        # Unit vectors; another processor or number of threads rounds otherwise, another sentence is far away.
        return value.shape == (LANGUAGE_DIM,) and np.linalg.norm(value - encoder.embed(text)) < 1e-3

    same = (of_package(text, value) for text, value in found.items())
    return {} if all(value.size == 0 for value in found.values()) or all(same) else found


def build(bags: Sequence[Path], out: Path, wanted: str, parity: bool, robot: Path | None = None) -> dict[str, object]:
    """Convert bags.

    Args:
        bags: Folders or files.
        out: Folder of the data set; it appears when it is complete.
        wanted: Of ``LABELS``.
        parity: Compute the runs again.
        robot: The runs' profile on this machine, see :func:`recorded_profile`.

    Returns:
        The report.

    Raises:
        ConfigError: If the folder exists, the bags do not go together, or no frame is left.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out or remove it")
    started_s = time.monotonic()
    work = out.with_name(f".{out.name}.from_bag")  # OUT.parts is where demonstrations keep their episodes
    shutil.rmtree(work, ignore_errors=True)
    staging, parts = work / out.name, work / "parts"
    parts.mkdir(parents=True)
    try:
        recordings = [Recording(path, parts, robot) for path in bags]
        fps = check_same(recordings)
        identity, arm = recordings[0].identity, recordings[0].robot
        chunk = next(iter(recordings[0].chunks.values()), None)
        paths: list[Path] = []

        def save(part: Part) -> None:
            paths.append(parts / f"part{len(paths):06d}.npz")
            part.save(paths[-1], chunk)

        with ThreadPoolExecutor(1) as pool:  # the runtime of the head leaves the interpreter to the conversion
            again = [pool.submit(compare, recording, recording.heads()) if parity else None for recording in recordings]
            runs = itertools.accumulate((len(recording.episodes) for recording in recordings), initial=0)
            conversions = [convert(r, wanted, save, run) for r, run in zip(recordings, runs, strict=False)]
            if not paths:
                lacking = sum((Counter(conversion.lost_ticks) for conversion in conversions), Counter())
                raise ConfigError(f"no frame has a label of the kind {wanted!r}; ticks lack {dict(lacking)}")
            assemble(staging, paths, features_of(arm), fps, arm.name)
            told = [
                summary(recording, conversion, future and future.result())
                for recording, conversion, future in zip(recordings, conversions, again, strict=True)
            ]
        for bag in told:
            tell(bag)
        if chunk is None:
            print("  no chunk was recorded: demonstrations for a base policy; a head needs a policy's chunks for them")
        else:
            save_executed(staging, paths, identity["policy_id"])
        save_record(staging, paths, {"policy_id": identity["policy_id"], "label": wanted})
        if language := language_of(recordings):
            save_language(staging, identity["policy_id"], language)
        seconds = time.monotonic() - started_s
        recorded_s = sum(recording.seconds for recording in recordings)
        report = {
            **identity,
            "label": wanted,
            "frames": sum(episode.frames for recording in recordings for episode in recording.episodes),
            "seconds_recorded": round(recorded_s, 3),
            "seconds": round(seconds, 3),
            "times_real_time": round(recorded_s / seconds, 2),
            "bags": told,
            "machine": provenance.machine(),
            "versions": provenance.versions(),
        }
        (staging / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        staging.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {report['frames']} frames, {report['times_real_time']} times real time")
    return report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.from_bag",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("bags", type=Path, nargs="+", metavar="BAG", help="bag folders or files")
    p.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist")
    p.add_argument("--label", choices=LABELS, default="auto", help="what a frame's label is (default auto)")
    p.add_argument("--robot", type=Path, help="the run's profile on this machine, if it names a URDF beside it")
    p.add_argument("--no-parity", dest="parity", action="store_false", help="do not compute the runs again")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    build(args.bags, args.out, args.label, args.parity, args.robot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
