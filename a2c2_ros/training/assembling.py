"""Writing a LeRobotDataset v3 from one file per episode."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.core.robot import Robot
from a2c2_ros.sim import conventions
from a2c2_ros.training.dataset import IMAGE_PREFIX


def features_of(robot: Robot) -> dict[str, dict[str, object]]:
    """Features of a data set of this robot: cameras, state, label and what was executed."""
    images = {
        f"{IMAGE_PREFIX}{name}": {
            "dtype": "video",
            "shape": robot.streams[name].shape,
            "names": ["height", "width", "channels"],
        }
        for name in robot.cameras
    }
    state = {"dtype": "float32", "shape": (len(robot.state_names),), "names": list(robot.state_names)}
    action = {"dtype": "float32", "shape": (len(robot.action_names),), "names": list(robot.action_names)}
    return images | {"observation.state": state, "action": action, "action.executed": dict(action)}


def assemble(
    out: Path,
    parts: Sequence[Path],
    features: Mapping[str, Mapping[str, object]],
    fps: int = conventions.CONTROL_RATE_HZ,
    robot_type: str = "panda",
) -> None:
    """Write the LeRobotDataset v3 of these episode files; it appears at ``out`` only when it is complete.

    Args:
        out: Folder.
        parts: One ``.npz`` file per episode with the features, time first, and ``instruction``.
        features: As LeRobot describes them.
        fps: Control steps per second.
        robot_type: Name of the robot.

    Raises:
        A2C2Error: If a video lacks a frame.
    """
    import av
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # the encoder tells its settings for every video
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dataset = LeRobotDataset.create(
        repo_id=f"a2c2_ros/{out.name}",
        fps=fps,
        features=dict(features),
        root=partial,
        robot_type=robot_type,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=18, g=2, preset="veryfast"),
        streaming_encoding=True,
        # A frame that waits longer than 0.1 s for a place in the queue is dropped: the queue takes a whole episode.
        encoder_queue_maxsize=max(map(_length, parts)) + 1,
    )
    for path in tqdm(parts, unit="episode", desc="assemble"):
        with np.load(path, allow_pickle=False) as part:
            frames = {name: part[name] for name in features}
            instruction = str(part["instruction"])
        for index in range(len(frames["action"])):
            dataset.add_frame({name: values[index] for name, values in frames.items()} | {"task": instruction})
        dataset.save_episode()
    dataset.finalize()
    check_videos(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _length(part: Path) -> int:
    with np.load(part, allow_pickle=False) as file:
        return len(file["action"])


def check_videos(root: Path) -> None:
    """Check that every episode has as many frames in each video as it has steps.

    Raises:
        A2C2Error: Naming the episode, the camera and both numbers.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata(f"a2c2_ros/{root.name}", root=root)
    for row in meta.episodes:
        for key in meta.video_keys:
            frames = round((row[f"videos/{key}/to_timestamp"] - row[f"videos/{key}/from_timestamp"]) * meta.fps)
            if frames != row["length"]:
                raise A2C2Error(
                    f"episode {row['episode_index']}: {frames} frames in the video {key}, {row['length']} steps"
                )
