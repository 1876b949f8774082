"""Robot state vector of the policy and the head, from what robot drivers publish."""

import numpy as np

from a2c2_ros.core.errors import ObservationError


def rotation_vector(quaternion_xyzw: np.ndarray, reference_xyzw: np.ndarray) -> np.ndarray:
    """Axis-angle of a rotation relative to a reference orientation, in the fixed (world) frame.

    The axis-angle of a gripper that points down is near pi, where its sign flips from one step to the next. Relative
    to the nominal gripper orientation it stays near zero and continuous.

    Args:
        quaternion_xyzw: (4,) orientation, any sign, need not be normalised.
        reference_xyzw: (4,) reference orientation.

    Returns:
        (3,) float64 [rad], ``log(R · R_referenceᵀ)``, norm in [0, pi].

    Raises:
        ObservationError: If the quaternion is not four finite numbers or has no direction.
    """
    q = _unit(quaternion_xyzw, "quaternion")
    r = _unit(reference_xyzw, "reference quaternion")
    vector = r[3] * q[:3] - q[3] * r[:3] - np.cross(q[:3], r[:3])
    scalar = q[3] * r[3] + q[:3] @ r[:3]
    if scalar < 0.0:
        vector, scalar = -vector, -scalar
    sine = np.linalg.norm(vector)
    if sine < 1e-9:
        return 2.0 * vector
    return vector * (2.0 * np.arctan2(sine, scalar) / sine)


def state_vector(ee_pose: np.ndarray, gripper_position: np.ndarray, reference_xyzw: np.ndarray) -> np.ndarray:
    """The 8-D state of the paper (section 4.1.2): end-effector position, orientation and the gripper's two fingers.

    Args:
        ee_pose: (7,) position x, y, z [m] and orientation x, y, z, w, in the robot's world frame.
        gripper_position: (2,) finger positions [m].
        reference_xyzw: (4,) nominal gripper orientation, see :func:`rotation_vector`.

    Returns:
        (8,) float32: position 3 [m], axis-angle relative to the reference 3 [rad], fingers 2 [m].

    Raises:
        ObservationError: On a wrong shape or a value that is not finite.
    """
    pose = np.asarray(ee_pose, dtype=np.float64)
    fingers = np.asarray(gripper_position, dtype=np.float64)
    if pose.shape != (7,):
        raise ObservationError(f"ee_pose has shape {pose.shape}, allowed is (7,): x y z qx qy qz qw")
    if fingers.shape != (2,):
        raise ObservationError(f"gripper_position has shape {fingers.shape}, allowed is (2,)")
    state = np.concatenate([pose[:3], rotation_vector(pose[3:], reference_xyzw), fingers])
    if not np.isfinite(state).all():
        raise ObservationError(f"the robot state is not finite: {state.tolist()}")
    return state.astype(np.float32)


def _unit(quaternion: np.ndarray, name: str) -> np.ndarray:
    q = np.asarray(quaternion, dtype=np.float64)
    if q.shape != (4,) or not np.isfinite(q).all():
        raise ObservationError(f"the {name} is {q.tolist()}, allowed are four finite numbers x y z w")
    norm = np.linalg.norm(q)
    if norm < 1e-6:
        raise ObservationError(f"the {name} {q.tolist()} has no direction (norm {norm:.1e})")
    return q / norm
