"""Text of message types, as bags carry it: a ``.msg`` file with everything that it uses."""

import re
from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

from a2c2_ros.core.errors import ConfigError

SEPARATOR = f"\n{'=' * 80}\nMSG: "
_FIELD_TYPE = re.compile(r"^\s*([A-Z]\w*|[a-z]\w*/(?:msg/)?\w+)[\[\s<]", re.MULTILINE)  # not the built-in types


def definition(type_name: str) -> str:
    """Definition of a type with all its dependencies, in the encoding ``ros2msg`` of rosbag2.

    Args:
        type_name: Such as ``sensor_msgs/msg/Image``.

    Raises:
        ConfigError: If the type, or one that it uses, is not installed.
    """
    texts: dict[str, str] = {}
    missing = [type_name]
    while missing:
        name = missing.pop(0)
        if name in texts:
            continue
        package = name.split("/")[0]
        texts[name] = _read(name)
        for used in _FIELD_TYPE.findall(texts[name]):
            used_package = used.split("/")[0] if "/" in used else package
            missing.append(f"{used_package}/msg/{used.split('/')[-1]}")
    first = texts.pop(type_name)
    return first + "".join(SEPARATOR + name.replace("/msg/", "/") + "\n" + text for name, text in texts.items())


def _read(type_name: str) -> str:
    package, _, name = type_name.split("/")
    try:
        return (Path(get_package_share_directory(package)) / "msg" / f"{name}.msg").read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError) as error:
        raise ConfigError(f"the definition of {type_name} is not installed: {error}") from error
