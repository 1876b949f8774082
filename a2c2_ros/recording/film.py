"""Pictures of an episode: the cameras with the base and the corrected action drawn beside them, as a video."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from a2c2_ros.core.controller import ControlStep
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import State

OnStep = Callable[[ControlStep, Mapping[str, np.ndarray]], None]
VIDEO_HZ = 20
CAMERA_SIZE = 256
PANEL_WIDTH = 256
BASE_COLOUR = (150, 150, 150)
COMMAND_COLOUR = (40, 110, 220)
TEXT_COLOUR = (30, 30, 30)
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_frame(
    images: Sequence[np.ndarray],
    names: Sequence[str],
    base_action: np.ndarray,
    command: np.ndarray,
    lines: Sequence[str],
    limit: float = 1.0,
) -> np.ndarray:
    """One video frame: the cameras side by side, then a panel with text and two bars per action channel.

    Args:
        images: (h, w, 3) uint8 RGB each.
        names: Names of the A action channels.
        base_action: (A,) action of the chunk, grey bars.
        command: (A,) executed action, blue bars; empty if nothing was sent.
        lines: Text above the bars.
        limit: Action value at the end of a bar.

    Returns:
        (256, 256 * (cameras + 1), 3) uint8 RGB.
    """
    panel = np.full((CAMERA_SIZE, PANEL_WIDTH, 3), 255, np.uint8)
    for row, line in enumerate(lines):
        cv2.putText(panel, line, (8, 16 + 15 * row), FONT, 0.38, TEXT_COLOUR, 1, cv2.LINE_AA)
    top = 16 + 15 * len(lines)
    height = max(8, (CAMERA_SIZE - top - 8) // max(len(names), 1))
    left, right = 64, PANEL_WIDTH - 10
    centre, half = (left + right) // 2, (right - left) // 2
    for row, name in enumerate(names):
        y = top + row * height
        cv2.putText(panel, name, (8, y + height // 2 + 4), FONT, 0.36, TEXT_COLOUR, 1, cv2.LINE_AA)
        for values, colour, offset in ((base_action, BASE_COLOUR, 0.12), (command, COMMAND_COLOUR, 0.5)):
            if row < len(values):
                end = centre + int(np.clip(values[row] / limit, -1.0, 1.0) * half)
                upper = y + int(offset * height)
                cv2.rectangle(panel, (min(centre, end), upper), (max(centre, end), upper + height // 3), colour, -1)
        cv2.line(panel, (centre, y), (centre, y + height - 2), (200, 200, 200), 1)
    shown = [cv2.resize(image, (CAMERA_SIZE, CAMERA_SIZE), interpolation=cv2.INTER_LINEAR) for image in images]
    return np.concatenate([*shown, panel], axis=1)


def captions(title: str, tick: int, step: Any) -> tuple[str, ...]:
    """The text above the bars.

    Args:
        title: Which episode it is.
        tick: Number of the control step.
        step: The control step, of ``core.controller`` or the message.
    """
    return (
        title,
        f"{State(step.state).name.lower()}, tick {tick}",
        f"chunk {step.chunk_id}, slot {step.slot} of {step.horizon}",
        "grey: base action, blue: executed",
    )


class VideoWriter:
    """H.264 video in an MP4 file, written frame by frame; the file appears when it is closed.

    Args:
        path: Where the video goes.
        rate_hz: Frames per second.
    """

    def __init__(self, path: Path, rate_hz: float) -> None:
        self._path = path
        self._partial = path.with_suffix(".partial.mp4")
        self._container = av.open(str(self._partial), "w")
        self._stream = self._container.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(1000))
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "23", "preset": "veryfast"}

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, (even height, even width, 3) uint8 RGB, of the same size each time."""
        self._stream.height, self._stream.width = frame.shape[:2]
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
            self._container.mux(packet)

    def close(self) -> None:
        """Finish the file."""
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()
        self._partial.rename(self._path)

    def discard(self) -> None:
        """Leave no file."""
        self._container.close()
        self._partial.unlink(missing_ok=True)  # it appears with the first frame


@contextlib.contextmanager
def filmed(path: Path | None, robot: Robot, title: str) -> Iterator[OnStep | None]:
    """Gives what ``rollout.run_episode`` is to call with every control step so that a video of them is at ``path``.

    An exception leaves no video.

    Args:
        path: Where the video goes; None: there is none, and nothing to call.
        robot: Has the names of cameras and actions.
        title: First line of every frame.
    """
    if path is None:
        yield None
        return
    writer, ticks = VideoWriter(path, VIDEO_HZ), itertools.count()

    def on_step(step: ControlStep, observation: Mapping[str, np.ndarray]) -> None:
        lines = captions(title, next(ticks), step)
        command = np.zeros(0) if step.command is None else step.command
        images = robot.images(observation).values()
        writer.add(draw_frame(tuple(images), robot.action_names, step.base_action, command, lines))

    try:
        yield on_step
    except BaseException:
        writer.discard()
        raise
    writer.close()
