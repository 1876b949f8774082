"""Inputs of the correction head that are computed, not measured."""

import numpy as np


def time_feature(slot: int, horizon: int) -> np.ndarray:
    """Position inside the chunk, ``(sin 2πk/H, cos 2πk/H)`` (paper section 3.1).

    Args:
        slot: k, 0 <= k < horizon.
        horizon: H, slots of the chunk.

    Returns:
        (2,) float32, sine first.
    """
    angle = 2.0 * np.pi * slot / horizon
    return np.array([np.sin(angle), np.cos(angle)], dtype=np.float32)
