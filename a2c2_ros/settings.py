"""What identifies a run that can be continued, so that work of other settings is never mixed in."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a2c2_ros.core.errors import ConfigError


def differing(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Names the settings of ``mine`` that ``theirs`` has not or has otherwise, with both values."""
    return [f"{k}: there {theirs.get(k)!r}, here {v!r}" for k, v in mine.items() if theirs.get(k) != v]


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue a run of other settings; the first run leaves its settings in the file.

    Raises:
        ConfigError: Naming what differs, or the file if it cannot be read.
    """
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(settings), encoding="utf-8")
        temporary.replace(path)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error}); remove {path.parent} or choose another --out") from error
    if wrong := differing(theirs, settings):
        raise ConfigError(
            f"{path.parent} holds work of other settings ({'; '.join(wrong)}); remove it or choose another --out"
        )
