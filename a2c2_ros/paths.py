"""Where the package's data files are: in the installed share folder, or in the source tree."""

import os
from pathlib import Path

from a2c2_ros.core.errors import ConfigError


def share_directory() -> Path:
    """Folder that holds ``config``, ``models`` and ``launch``.

    The source tree when the package is imported from it, else the share folder of the colcon installation.
    """
    source = Path(__file__).resolve().parents[1]
    if (source / "package.xml").is_file():
        return source
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        share = Path(prefix) / "share" / "a2c2_ros"
        if (share / "config").is_dir():
            return share
    raise ConfigError("the share folder of a2c2_ros was not found: source install/setup.bash first")


def robot_profile(name_or_path: str) -> Path:
    """Path of a robot profile given by name (``libero``) or path.

    Raises:
        ConfigError: If there is no such file, naming the profiles that exist.
    """
    folder = share_directory() / "config" / "robots"
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else folder / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(f"robot profile {name_or_path!r} does not exist ({path}), shipped are {names}")
    return path


def model_path(name_or_path: str) -> Path:
    """Path of a model file or folder: as given if it exists, else inside the package's ``models``.

    Raises:
        ConfigError: If it is in neither place, or cannot be looked for.
    """
    shipped = share_directory() / "models"
    try:
        for path in (Path(name_or_path).expanduser(), shipped / name_or_path):
            if name_or_path and path.exists():
                return path
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user has no home
        raise ConfigError(f"model {name_or_path!r} cannot be looked for: {error}") from error
    names = sorted(path.name for path in shipped.iterdir() if path.is_dir())
    raise ConfigError(f"model {name_or_path!r} does not exist, neither as a path nor in the package's models {names}")
