"""What a person gets of a run: the summary's keys and numbers, the pictures and the video."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rclpy")
av = pytest.importorskip("av")

import rclpy
from a2c2_ros.msg import ControlConfiguration, ControlStep, EpisodeStatus, PlannerTiming
from conftest import make_robot

from a2c2_ros.core.errors import SimulationError
from a2c2_ros.nodes.conversions import to_time
from a2c2_ros.nodes.episode_monitor import EpisodeMonitor, Statistics, summarise
from a2c2_ros.recording.film import BASE_COLOUR, COMMAND_COLOUR, VideoWriter, draw_frame, filmed


def test_statistics_of_control_steps():
    statistics = Statistics(keep=(1,))
    for episode in range(2):
        statistics.new_episode()
        for n in range(10):
            chunk = n // 5
            step = ControlStep(state=ControlStep.RUNNING if n else ControlStep.BASE_ONLY, slot=n, missed_ticks=n == 3)
            step.chunk_stamp = to_time((100 * episode + chunk + 1) * 10**9)
            step.chunk_delay_steps = float(chunk * 4)
            step.period_error_s = -0.002 if n == 5 else 0.001
            step.head_time_s = 0.003 if n else 0.0
            step.base_action, step.command = [0.25 * n + chunk, 9.0 * n], [0.125 * n, -9.0 * n]
            statistics.add(step)
    for ms in (10.0, 30.0):
        statistics.add_chunk(PlannerTiming(policy_id="flow-1", inference_time_s=ms / 1e3, transport_time_s=0.002))
    result = summarise(statistics)
    assert result == {
        "ticks": 20,
        "missed_ticks": 2,
        "period_error_ms_p50": 1.0,
        "period_error_ms_p99": 2.0,
        "head_ms_p50": 3.0,
        "head_ms_p99": 3.0,
        "chunk_delay_steps_p50": 4.0,
        "inference_ms_p50": 20.0,
        "inference_ms_p99": 29.8,
        "transport_ms_p50": 2.0,
        "seam_base_p50": 1.25,
        "seam_base_p99": 1.25,
        "seam_command_p50": 0.125,
        "seam_command_p99": 0.125,
        "between_seams_base_p50": 0.25,
        "between_seams_base_p99": 0.25,
        "between_seams_command_p50": 0.125,
        "between_seams_command_p99": 0.125,
        "policy_ids": ["flow-1"],
        "states": {"base_only": 2, "running": 18},
    }, "the first chunk of an episode is waited for and does not count as a delay"


def test_nothing_measured_is_none_and_not_zero():
    result = summarise(Statistics())
    assert result["ticks"] == 0
    assert result["head_ms_p50"] is result["chunk_delay_steps_p50"] is result["period_error_ms_p99"] is None
    assert result["seam_command_p99"] is None


def test_frame_shows_base_and_executed_action():
    images = [np.zeros((128, 128, 3), np.uint8)] * 2
    frame = draw_frame(images, ("x", "y"), np.array([1.0, 0.0]), np.array([-1.0, 0.0]), ["line"])
    assert frame.shape == (256, 768, 3)
    centre = (64 + 246) // 2 + 512
    base = (frame == BASE_COLOUR).all(axis=2)
    command = (frame == COMMAND_COLOUR).all(axis=2)
    assert base[:, centre + 5 :].sum() > 100 and not base[:, : centre - 5].any(), "to the right"
    assert command[:, : centre - 5].sum() > 100 and not command[:, centre + 5 :].any(), "to the left"


def test_video_appears_when_it_is_closed(tmp_path):
    path = tmp_path / "episode.mp4"
    writer = VideoWriter(path, rate_hz=20)
    for level in (0, 80, 160, 240):
        writer.add(np.full((64, 96, 3), level, np.uint8))
    assert not path.exists()
    writer.close()
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert frames == pytest.approx([0, 80, 160, 240], abs=6)


@pytest.mark.parametrize("frames", [0, 3])
def test_an_exception_leaves_no_video(tmp_path, frames):
    robot = make_robot()
    step = SimpleNamespace(state=0, chunk_id=1, slot=0, horizon=50, base_action=np.zeros(2), command=None)
    images = {name: np.zeros((8, 8, 3), np.uint8) for name in robot.cameras}
    with pytest.raises(SimulationError, match="boom"), filmed(tmp_path / "e.mp4", robot, "title") as on_step:
        for _ in range(frames):
            on_step(step, images)
        raise SimulationError("boom")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def monitor(tmp_path):
    """The node, told in the test's own words what it hears."""
    rclpy.init(args=["--ros-args", "-p", f"out:={tmp_path}"], domain_id=101)
    node = EpisodeMonitor()
    for images in node._images.values():
        images[0] = np.zeros((128, 128, 3), np.uint8)
    yield node
    node.close()
    node.destroy_node()
    rclpy.shutdown()


def say(monitor, phase, seconds, **values):
    """As ``operate episode`` does, which knows no number, task or step."""
    message = EpisodeStatus(phase=phase, **values)
    message.header.stamp = to_time(round(seconds * 1e9))
    monitor._on_episode(message)


def step(monitor, seconds, **values):
    message = ControlStep(base_action=[0.0] * 7, command=[0.0] * 7, **values)
    message.header.stamp = to_time(round(seconds * 1e9))
    monitor._on_step(message)


def test_every_episode_of_a_person_has_a_row_and_a_film(monitor, tmp_path):
    (tmp_path / "episode000_task0.mp4").write_text("of an earlier run")
    monitor._on_configuration(ControlConfiguration(parameters='{"control_rate_hz": 50.0}'))
    episodes = [(10, "open it", EpisodeStatus.SUCCEEDED), (20, "close it", EpisodeStatus.ABORTED)]
    for done, (begin_s, instruction, phase) in enumerate(episodes):
        say(monitor, EpisodeStatus.STARTED, begin_s, instruction=instruction)
        step(monitor, begin_s + 1)
        step(monitor, begin_s + 2)
        say(monitor, phase, begin_s + 5)
        step(monitor, begin_s + 4)  # decided before the end, told after it
        step(monitor, begin_s + 6)  # the robot goes on
        assert len(monitor._rows) == done, "the last steps are waited for"
    say(monitor, EpisodeStatus.STARTED, 30)

    rows = json.loads((tmp_path / "summary.json").read_text())["per_episode"]
    told = [(row["episode"], row["instruction"], row["result"], row["steps"], row["ticks"]) for row in rows]
    assert told == [(1, "open it", "success", 3, 3), (2, "close it", "aborted", 3, 3)]
    assert (tmp_path / "episode000_task0.mp4").read_text() == "of an earlier run"
    for number in (1, 2):
        with av.open(str(tmp_path / f"episode{number:03d}_task0.mp4")) as film:
            assert film.streams.video[0].average_rate == 50, "it plays as fast as the robot was"


def test_an_aborted_episode_neither_counts_nor_ends_the_run(monitor, tmp_path):
    episodes = [(10, EpisodeStatus.ABORTED), (20, EpisodeStatus.FAILED), (30, EpisodeStatus.SUCCEEDED)]
    for begin_s, phase in episodes:
        say(monitor, EpisodeStatus.STARTED, begin_s)
        step(monitor, begin_s + 1)
        last = phase == EpisodeStatus.SUCCEEDED
        with pytest.raises(SystemExit) if last else contextlib.nullcontext():
            say(monitor, phase, begin_s + 2, steps=1, episodes=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["result"] for row in summary["per_episode"]] == ["aborted", "failure", "success"]
    assert (summary["episodes"], summary["successes"]) == (2, 1)


def test_the_first_chunk_of_no_episode_has_a_delay(monitor, tmp_path):
    """It is waited for."""
    for begin_s, delays in ((10, (9, 2)), (20, (7,)), (30, (8, 4))):
        say(monitor, EpisodeStatus.STARTED, begin_s)
        for n, delay in enumerate(delays, start=1):
            step(monitor, begin_s + n, chunk_stamp=to_time((begin_s + n) * 10**9), chunk_delay_steps=float(delay))
        say(monitor, EpisodeStatus.SUCCEEDED, begin_s + 5, steps=len(delays))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["chunk_delay_steps_p50"] == 3.0
    assert [row["chunk_delay_steps_p50"] for row in summary["per_episode"]] == [2.0, None, 4.0]
