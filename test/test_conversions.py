"""Messages to arrays."""

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image

from a2c2_ros.core.errors import ObservationError
from a2c2_ros.nodes.conversions import (
    ImageView,
    array_to_image,
    array_to_pose,
    image_to_array,
    pose_to_array,
    serialized_to_image,
)


def image(frame_id="camera", encoding="rgb8"):
    message = Image(height=3, width=5, encoding=encoding, step=15, is_bigendian=1)
    message.header.frame_id = frame_id
    message.header.stamp.sec, message.header.stamp.nanosec = -3, 77
    message.data = np.arange(45, dtype=np.uint8).tobytes()
    return message


@pytest.mark.parametrize("frame_id", ["", "a", "abc", "wrist/optical"])
@pytest.mark.parametrize("encoding", ["rgb8", "mono16x", ""])
def test_a_serialised_image_is_read_as_the_library_reads_it(frame_id, encoding):
    message = image(frame_id, encoding)
    for view in (serialized_to_image(serialize_message(message)), ImageView.of(message)):
        assert (view.stamp_ns, view.height, view.width) == (-2_999_999_923, 3, 5)
        assert (view.encoding, view.step, bytes(view.data)) == (encoding, 15, bytes(range(45)))


def test_a_damaged_serialised_image_is_refused():
    serialized = serialize_message(image())
    for damaged in [serialized[:length] for length in range(len(serialized) - 3)] + [b"\xff\xff" + serialized[2:]]:
        with pytest.raises(ObservationError, match="image message"):
            serialized_to_image(damaged)


def test_a_pose_is_taken_in_the_frame_that_is_asked_for_and_in_no_other():
    values = np.array([0.1, -0.2, 0.3, 0.0, 0.6, 0.0, 0.8])
    for asked, frame in (("base_link", "base_link"), ("", "base"), ("", "")):
        np.testing.assert_array_equal(pose_to_array(array_to_pose(values, 0, frame), asked), values)
    for frame in ("base", "/base_link", ""):
        with pytest.raises(ObservationError, match=f"pose is in frame '{frame}', allowed is 'base_link'"):
            pose_to_array(array_to_pose(values, 0, frame), "base_link")


def test_an_image_in_bgr_is_one_that_torch_takes():
    message = array_to_image(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), 0, "camera")
    message.encoding = "bgr8"
    image = image_to_array(message, 2, 4)
    assert image.flags.c_contiguous and image[0, 0].tolist() == [2, 1, 0]
