"""What a correction head is to the control loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class HeadInput:
    """Inputs of one correction (paper equation 4).

    The chunk's parts (base action, slot, latent, language) all come from the chunk that owns the slot.
    """

    images: Mapping[str, np.ndarray]  # camera name -> (height, width, 3) uint8 RGB, upright; the newest of each camera
    state: np.ndarray  # (S,) float32, the newest robot state
    base_action: np.ndarray  # (A,) float32, action units
    time_feature: np.ndarray  # (2,) float32, features.time_feature of the slot
    latent: np.ndarray  # (Z,) float32, latent of the base policy for the chunk
    language: np.ndarray  # (L,) float32, embedding of the instruction


class CorrectionHead(Protocol):
    """A head that returns the residual to add to a base action (paper equation 5)."""

    def correct(self, inputs: HeadInput) -> np.ndarray:
        """Return the residual, (A,) float32 in action units. Called by the control loop's thread, once per tick."""
        ...
