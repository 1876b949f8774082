"""Fewer triangles for the cameras: a software renderer's time goes into triangles smaller than a pixel.

LIBERO's bowls have 42,000 triangles each and cover some hundred pixels. Meshes for rendering are simplified here by
quadric edge collapses (fast-simplification); collision shapes, materials and textures stay as they are.
"""

import fast_simplification
import mujoco
import numpy as np
from scipy.spatial import cKDTree

LARGE_FACES = 8000
"""Meshes of fewer faces are left alone."""
KEPT_SHARE = 0.12
_NEIGHBOURS = 24
_DISTANCE_M = 0.004  # counts as much as a right angle between normals
_TEXTURE = 0.125  # distance in texture coordinates that counts as much


def simplify_meshes(model: mujoco.MjModel) -> None:
    """Leave ``KEPT_SHARE`` of the faces of a model's large meshes, those that only cameras see.

    Same model, same result, in any process.

    Args:
        model: Compiled model, changed in place, before a renderer is made of it.
    """
    meshes = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    for mesh in np.setdiff1d(model.geom_dataid[meshes], model.geom_dataid[meshes & solid]):
        if model.mesh_facenum[mesh] >= LARGE_FACES:
            _simplify(model, int(mesh))


def _simplify(model: mujoco.MjModel, mesh: int) -> None:
    """The model keeps its arrays; the rest of the mesh's part of them is not used any more."""
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    first_vertex = model.mesh_vertadr[mesh]
    vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]]
    corners = vertices[model.mesh_face[faces].reshape(-1)]
    corner_normals = model.mesh_facenormal[faces].reshape(-1)
    corner_textures = model.mesh_facetexcoord[faces].reshape(-1)
    normals = model.mesh_normal[model.mesh_normaladr[mesh] + corner_normals]

    # The faces share no vertices as they are stored, which would make every edge a border.
    points, welded = np.unique(corners, axis=0, return_inverse=True)
    triangles = welded.reshape(-1, 3).astype(np.int32)
    distinct = (triangles != np.roll(triangles, 1, axis=1)).all(axis=1)
    points, triangles = fast_simplification.simplify(
        points, triangles[distinct], target_count=round(KEPT_SHARE * model.mesh_facenum[mesh])
    )

    # Every new corner takes normal and texture coordinates of an original corner near by: of those, one that looks
    # where the face looks, and that lies on the same side of a seam of the texture as the middle of the face.
    tree = cKDTree(corners)
    distances, near = tree.query(points, k=_NEIGHBOURS)
    edges = np.diff(points[triangles], axis=1)
    directions = np.cross(edges[:, 0], edges[:, 1])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True) + 1e-12
    candidates, distances = near[triangles], distances[triangles]  # (faces, 3, neighbours)
    score = np.einsum("fckx,fx->fck", normals[candidates], directions)
    score -= (distances - distances.min(axis=2, keepdims=True)) / _DISTANCE_M
    if model.mesh_texcoordnum[mesh]:
        textures = model.mesh_texcoord[model.mesh_texcoordadr[mesh] + corner_textures]
        middles = textures[tree.query(points[triangles].mean(axis=1))[1]]
        score -= np.linalg.norm(textures[candidates] - middles[:, None, None], axis=3) / _TEXTURE
    chosen = np.take_along_axis(candidates, score.argmax(axis=2)[:, :, None], axis=2)[:, :, 0]

    kept = slice(faces.start, faces.start + len(triangles))
    vertices[: len(points)] = points
    model.mesh_face[kept] = triangles
    model.mesh_facenormal[kept] = corner_normals[chosen]
    model.mesh_facetexcoord[kept] = corner_textures[chosen]
    model.mesh_facenum[mesh] = len(triangles)
