"""How far actions change from tick to tick, at the seams of chunks and between them."""

import numpy as np
import pytest

from a2c2_ros.core.seams import Change, ChangeMeter, Seams


def test_a_jump_of_the_chunks_that_the_command_does_not_make():
    meter = ChangeMeter()
    ticks = [  # chunk, base action, command
        (7, [0.0, 0.0], [0.0, 0.0]),
        (7, [0.1, -0.2], [0.1, -0.1]),
        (8, [0.1, 0.8], [0.1, 0.0]),
        (8, [0.1, 0.8], [0.1, 0.1]),
    ]
    changes = [meter.add(chunk, np.float32(base), np.float32(command), 0) for chunk, base, command in ticks]
    assert changes[0] is None
    assert [change.seam for change in changes[1:]] == [False, True, False]
    np.testing.assert_allclose([change.base for change in changes[1:]], [0.2, 1.0, 0.0], atol=1e-7)
    np.testing.assert_allclose([change.command for change in changes[1:]], [0.1, 0.1, 0.1], atol=1e-7)


@pytest.mark.parametrize("way", ["held", "nothing sent", "missed"])
def test_what_does_not_follow_on_a_tick_of_a_chunk_is_no_change(way):
    meter, zero, one = ChangeMeter(), np.zeros(2), np.ones(2)
    assert meter.add(1, zero, zero, 0) is None
    if way == "held":
        assert meter.add(0, zero, one, 0) is None
    elif way == "nothing sent":
        assert meter.add(1, one, None, 0) is None
    assert meter.add(1, one, one, 2 if way == "missed" else 0) is None
    assert meter.add(1, one, zero, 0) == Change(False, 0.0, 1.0)


def test_grippers_jump_on_purpose():
    meter = ChangeMeter(keep=(1,))
    meter.add(1, np.array([0.0, -1.0]), np.array([0.0, -1.0]), 0)
    assert meter.add(2, np.array([0.25, 1.0]), np.array([0.5, 1.0]), 0) == Change(True, 0.25, 0.5)
    only = ChangeMeter(keep=(0,))
    assert only.add(1, np.zeros(1), np.zeros(1), 0) is only.add(1, np.ones(1), np.ones(1), 0) is None


def test_another_robot_s_actions_are_not_compared():
    meter = ChangeMeter(keep=(6,))
    meter.add(1, np.zeros(7), np.zeros(7), 0)
    assert meter.add(1, np.ones(6), np.ones(6), 0) is None
    assert meter.add(1, np.zeros(6), np.zeros(6), 0) == Change(False, 1.0, 1.0)


def test_percentiles_by_place_and_none_without_a_measurement():
    seams = Seams()
    for base, command in ((1.0, 0.1), (3.0, 0.3)):
        seams.add(Change(True, base, command))
    assert seams.percentiles((50,)) == {
        "seam_base_p50": 2.0,
        "seam_command_p50": pytest.approx(0.2),
        "between_seams_base_p50": None,
        "between_seams_command_p50": None,
    }
