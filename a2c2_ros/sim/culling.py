"""What lies outside a camera's view is not drawn: a software renderer transforms every vertex that it is given."""

from collections.abc import Iterable

import mujoco
import numpy as np

HIDDEN = 0
"""Group of the geoms that the renderer leaves out: in robosuite that of the collision shapes."""
_MARGIN = 1.001  # of the view's half angles


class ViewCulling:
    """Puts the geoms that a square image of a camera cannot show into the group that is not drawn.

    The images are the same bit for bit: a geom is left out only if a box around all of its vertices lies beyond one
    side of the view.

    Args:
        model: Compiled model with the meshes that are drawn; its ``geom_group`` is changed by :meth:`apply`.
        cameras: Names of its perspective cameras.
    """

    def __init__(self, model: mujoco.MjModel, cameras: Iterable[str]) -> None:
        self._model = model
        half_angles = {name: np.deg2rad(model.cam_fovy[model.camera(name).id]) / 2 for name in cameras}
        self._slopes = {name: _MARGIN * np.tan(angle) for name, angle in half_angles.items()}
        # A plane has no box.
        drawn = (model.geom_group != HIDDEN) & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE)
        self._geoms = np.flatnonzero(drawn)
        self._groups = model.geom_group[self._geoms]
        low, high = np.stack([_extent(model, geom) for geom in self._geoms], axis=1)
        corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(8, 3)
        self._corners = np.where(corners, high[:, None], low[:, None])  # (geoms, 8, 3) in the geom's frame [m]

    def apply(self, data: mujoco.MjData, camera: str) -> None:
        """Before the scene of this camera is updated.

        Args:
            data: Present positions.
            camera: One of the names given.
        """
        to_camera, slope = data.camera(camera).xmat.reshape(3, 3), self._slopes[camera]
        turned = self._corners @ data.geom_xmat[self._geoms].reshape(-1, 3, 3).transpose(0, 2, 1)
        seen = (turned + (data.geom_xpos[self._geoms] - data.camera(camera).xpos)[:, None]) @ to_camera
        depth = -slope * seen[..., 2]
        beyond = np.stack([seen[..., 0] - depth, -seen[..., 0] - depth, seen[..., 1] - depth, -seen[..., 1] - depth])
        outside = (beyond > 0).all(axis=2).any(axis=0)
        self._model.geom_group[self._geoms] = np.where(outside, HIDDEN, self._groups)


def _extent(model: mujoco.MjModel, geom: int) -> tuple[np.ndarray, np.ndarray]:
    """Two opposite corners (3,) [m] in the geom's frame; of a mesh those of what is drawn, simplified or not."""
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        faces = model.mesh_face[model.mesh_faceadr[mesh] :][: model.mesh_facenum[mesh]]
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] + np.unique(faces)]
        return vertices.min(axis=0), vertices.max(axis=0)
    centre, half = model.geom_aabb[geom].reshape(2, 3)
    return centre - half, centre + half
