"""Node ``episode_monitor``: what a person sees of a run. A table row and a video per episode, a summary at the end."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from a2c2_ros.core.config import Parameters, parameter
from a2c2_ros.core.errors import ConfigError, ObservationError
from a2c2_ros.core.safety import EXECUTING, State
from a2c2_ros.core.seams import ChangeMeter, Seams
from a2c2_ros.core.timing import Window
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.msg import ControlConfiguration, ControlStep, EpisodeStatus, PlannerTiming
from a2c2_ros.nodes.conversions import to_ns
from a2c2_ros.nodes.observation_source import Converter, sensor_topics
from a2c2_ros.nodes.runtime import EdgeLog, NodeParameters, PlainNode, latched_qos, reliable_qos, run, sensor_qos
from a2c2_ros.recording.film import VIDEO_HZ, VideoWriter, captions, draw_frame

RESULTS = {
    EpisodeStatus.SUCCEEDED: "success",
    EpisodeStatus.FAILED: "failure",
    EpisodeStatus.ABORTED: "aborted",
}
COLUMNS = {
    "episode": 7,
    "task": 4,
    "state": 5,
    "result": 7,
    "steps": 5,
    "missed": 6,
    "period error [ms]": 17,
    "head [ms]": 15,
    "delay [steps]": 13,
    "controller states": 24,
}
"""Column name to width; times are p50 / p99."""
IMAGES_KEPT = 400
IMAGES_KEPT_BETWEEN = 40  # episodes; a real robot may have none at all
LAST_STEP_WAIT_S = 1.0


@dataclass(frozen=True)
class MonitorConfig(Parameters):
    """Parameters of ``episode_monitor``: where the results go, and what the run was started with."""

    out: str = parameter("runs/latest", "Run folder", dynamic=False)
    headless: bool = parameter(True, "Show no window", dynamic=False)
    robot: str = parameter("libero", "Robot profile", dynamic=False)
    task: int = parameter(0, "Task the run was started with", dynamic=False)
    episodes: int = parameter(0, "Episodes of the run; 0: until stopped", low=0, high=100_000, dynamic=False)
    seed: int = parameter(0, "Seed of the run", dynamic=False)
    execution_horizon: int = parameter(40, "e [steps]", dynamic=False)
    inference_delay: int = parameter(10, "d [steps]", dynamic=False)
    inference_delay_jitter: int = parameter(0, "[steps]", dynamic=False)
    chunking: str = parameter("asynchronous", "How chunks follow each other", dynamic=False)
    motion: str = parameter("none", "What the plate does", dynamic=False)
    correction: bool = parameter(True, "Whether the head corrects", dynamic=False)
    lockstep: bool = parameter(True, "Whether the simulation waits for commands", dynamic=False)
    record: bool = parameter(False, "Whether a bag is written", dynamic=False)


class Statistics:
    """What is measured over an episode or a run.

    Args:
        keep: Channels of grippers, whose changes do not count.
    """

    def __init__(self, keep: Sequence[int] = ()) -> None:
        self.ticks = 0
        self.missed = 0
        self.period_error_ms = Window()
        self.head_ms = Window()
        self.chunk_delay_steps = Window()
        self.inference_ms = Window()
        self.transport_ms = Window()
        self.policies: set[str] = set()
        self.states: Counter[str] = Counter()
        self.seams = Seams()
        self._keep = keep
        self.new_episode()

    def add(self, step: ControlStep) -> None:
        """Take one control step."""
        self.ticks += 1
        self.missed += step.missed_ticks
        self.period_error_ms.add(abs(step.period_error_s) * 1e3)
        if step.head_time_s:
            self.head_ms.add(step.head_time_s * 1e3)
        self.states[State(step.state).name.lower()] += 1
        chunk = to_ns(step.chunk_stamp)
        executed = chunk if step.state in EXECUTING else 0
        command = np.array(step.command) if step.command else None
        change = self._meter.add(executed, np.array(step.base_action), command, step.missed_ticks)
        if change is not None:
            self.seams.add(change)
        if chunk != self._chunk and step.slot >= 0:
            if self._chunk:  # the first chunk of an episode is waited for: its delay is no delay
                self.chunk_delay_steps.add(step.chunk_delay_steps)
            self._chunk = chunk

    def add_chunk(self, timing: PlannerTiming) -> None:
        """Take the timing of one chunk."""
        self.policies.add(timing.policy_id)
        self.inference_ms.add(timing.inference_time_s * 1e3)
        self.transport_ms.add(timing.transport_time_s * 1e3)

    def new_episode(self) -> None:
        """The next chunk is the first of an episode."""
        self._chunk = 0  # stamp of its observation [ns]
        self._meter = ChangeMeter(self._keep)


class EpisodeMonitor(PlainNode):
    """Listens only; ends itself, and so the run, after the last episode."""

    def __init__(self) -> None:
        super().__init__("episode_monitor")
        self._settings = NodeParameters(self, MonitorConfig())
        config = self._settings.value
        self._log = EdgeLog(self)
        self._profile = load_profile(config.robot)
        self._out = Path(config.out)
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out is {config.out!r} and cannot be made: {error}") from error
        self._run = Statistics(self._profile.robot.hold.keep)
        self._episode_statistics = Statistics(self._profile.robot.hold.keep)
        self._rows: list[dict[str, object]] = []
        self._started: EpisodeStatus | None = None
        self._ended: EpisodeStatus | None = None
        self._number = 0
        self._rate_hz: float = VIDEO_HZ
        self._images: dict[str, dict[int, np.ndarray]] = {c.name: {} for c in self._profile.cameras}
        self._video: VideoWriter | None = None
        self._wait_timer = None
        topics = sensor_topics(self._profile)
        for camera in self._profile.cameras:
            topic, qos = topics[camera.name], sensor_qos(config.lockstep)
            self.create_subscription(
                topic.message_type, topic.name, partial(self._on_image, camera.name, topic.convert), qos, raw=True
            )
        self.create_subscription(ControlConfiguration, "control_configuration", self._on_configuration, latched_qos(10))
        self.create_subscription(ControlStep, "control_step", self._on_step, reliable_qos(1000))
        self.create_subscription(PlannerTiming, "planner_timing", self._on_chunk, reliable_qos(10))
        self.create_subscription(EpisodeStatus, "episode", self._on_episode, latched_qos(10))
        print(f"results: {self._out}", flush=True)

    def close(self) -> None:
        """Write what there is; the node is about to be destroyed."""
        self._close_video()
        print(self._write_summary(), flush=True)
        if not self._settings.value.headless:
            cv2.destroyAllWindows()

    def _on_image(self, camera: str, convert: Converter, serialized: bytes) -> None:
        try:
            stamp_ns, image = convert(serialized)
        except ObservationError as error:
            self._log.problem(camera, str(error))
            return
        images = self._images[camera]
        images[stamp_ns] = image
        while len(images) > (IMAGES_KEPT if self._started else IMAGES_KEPT_BETWEEN):
            del images[next(iter(images))]

    def _on_configuration(self, message: ControlConfiguration) -> None:
        self._rate_hz = json.loads(message.parameters)["control_rate_hz"]

    def _on_episode(self, message: EpisodeStatus) -> None:
        if message.phase == EpisodeStatus.STARTED:
            self._finish_episode()
            self._started, self._ended = message, None
            self._number = self._free_number(message)
            self._episode_statistics = Statistics(self._profile.robot.hold.keep)
            self._run.new_episode()
            return
        if self._started is None:
            return
        self._ended = message
        if self._wait_timer is None:  # the last control step may come after the end of the episode
            self._wait_timer = self.create_timer(LAST_STEP_WAIT_S, self._finish_episode, clock=self.system_clock)
        self._finish_if_complete()

    def _free_number(self, started: EpisodeStatus) -> int:
        """The episode's own number, or the next that no row and no film has: a person does not count."""
        number, taken = started.episode, {row["episode"] for row in self._rows}
        while number in taken or self._film(number, started.task).exists():
            number += 1
        return number

    def _film(self, number: int, task: int) -> Path:
        return self._out / f"episode{number:03d}_task{task}.mp4"

    def _on_step(self, step: ControlStep) -> None:
        stamp_ns = to_ns(step.header.stamp)
        if self._started is None or stamp_ns < to_ns(self._started.header.stamp):
            return
        if self._ended is not None and not self._ended.steps and stamp_ns > to_ns(self._ended.header.stamp):
            return  # a robot that nobody resets goes on
        self._episode_statistics.add(step)
        self._run.add(step)
        self._draw(step)
        self._finish_if_complete()

    def _on_chunk(self, timing: PlannerTiming) -> None:
        self._episode_statistics.add_chunk(timing)
        self._run.add_chunk(timing)

    def _finish_if_complete(self) -> None:
        if self._ended is not None and 0 < self._ended.steps <= self._episode_statistics.ticks:
            self._finish_episode()

    def _finish_episode(self) -> None:
        if self._wait_timer is not None:
            self.destroy_timer(self._wait_timer)
            self._wait_timer = None
        started, ended, self._started, self._ended = self._started, self._ended, None, None
        self._close_video()
        if ended is None:
            return
        self._rows.append(self._row(started, ended))
        self._print_row()
        self._write_summary()
        finished = sum(row["result"] != "aborted" for row in self._rows)
        if ended.episodes and finished >= ended.episodes:
            raise SystemExit(0)

    def _row(self, started: EpisodeStatus, ended: EpisodeStatus) -> dict[str, object]:
        statistics = self._episode_statistics
        return {
            "episode": self._number,
            "task": ended.task,
            "initial_state": ended.initial_state,
            "instruction": started.instruction,
            "result": RESULTS[ended.phase],
            "steps": ended.steps or statistics.ticks,
            "timeouts": ended.timeouts,
            **summarise(statistics),
        }

    def _print_row(self) -> None:
        """The table grows by a row per episode, which every terminal and log can show."""
        row = self._rows[-1]
        cells = (
            row["episode"],
            row["task"],
            row["initial_state"],
            row["result"],
            row["steps"],
            row["missed_ticks"],
            f"{_number(row['period_error_ms_p50'])} / {_number(row['period_error_ms_p99'])}",
            f"{_number(row['head_ms_p50'])} / {_number(row['head_ms_p99'])}",
            _number(row["chunk_delay_steps_p50"]),
            " ".join(f"{name} {n}" for name, n in row["states"].items()),
        )
        if len(self._rows) == 1:
            print("  ".join(f"{name:>{width}}" for name, width in COLUMNS.items()), flush=True)
        print("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)), flush=True)

    def _write_summary(self) -> str:
        """Write ``summary.json``; returns the result in one line."""
        config = asdict(self._settings.value)
        del config["headless"], config["robot"], config["out"]
        finished = [row for row in self._rows if row["result"] != "aborted"]
        summary = config | {
            "episodes": len(finished),
            "successes": sum(row["result"] == "success" for row in finished),
            **summarise(self._run),
            "per_episode": self._rows,
        }
        path = self._out / "summary.json"
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        partial_path.replace(path)
        return f"{summary['successes']} of {len(finished)} episodes succeeded; {path}"

    def _draw(self, step: ControlStep) -> None:
        stamp_ns = to_ns(step.header.stamp)
        images = []
        for stamped in self._images.values():
            newest = max((s for s in stamped if s <= stamp_ns), default=None)
            if newest is None:
                return
            images.append(stamped[newest])
        started = self._started
        title = f"task {started.task}, initial state {started.initial_state}"
        names, lines = self._profile.robot.action_names, captions(title, step.tick, step)
        frame = draw_frame(images, names, np.array(step.base_action), np.array(step.command), lines)
        if self._video is None:
            self._video = VideoWriter(self._film(self._number, started.task), self._rate_hz)
        self._video.add(frame)
        if not self._settings.value.headless:
            cv2.imshow("a2c2_ros", frame[:, :, ::-1])
            cv2.waitKey(1)

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None


def summarise(statistics: Statistics) -> dict[str, object]:
    """The measured part of a summary; None where nothing was measured."""

    def rounded(window: Window, q: float) -> float | None:
        value = window.percentile(q)
        return None if value is None else round(value, 3)

    return {
        "ticks": statistics.ticks,
        "missed_ticks": statistics.missed,
        "period_error_ms_p50": rounded(statistics.period_error_ms, 50),
        "period_error_ms_p99": rounded(statistics.period_error_ms, 99),
        "head_ms_p50": rounded(statistics.head_ms, 50),
        "head_ms_p99": rounded(statistics.head_ms, 99),
        "chunk_delay_steps_p50": rounded(statistics.chunk_delay_steps, 50),
        "inference_ms_p50": rounded(statistics.inference_ms, 50),
        "inference_ms_p99": rounded(statistics.inference_ms, 99),
        "transport_ms_p50": rounded(statistics.transport_ms, 50),
        **{name: None if v is None else round(v, 4) for name, v in statistics.seams.percentiles((50, 99)).items()},
        "policy_ids": sorted(statistics.policies),
        "states": dict(statistics.states),
    }


def _number(value: object) -> str:
    return "-" if value is None else f"{value:g}"


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(EpisodeMonitor, args))


if __name__ == "__main__":
    main()
