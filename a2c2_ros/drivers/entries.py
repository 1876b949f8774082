"""Entries of a YAML file: each is read once, by name and kind; every error names the file and the entry's path."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from a2c2_ros.core.errors import ConfigError

TOPIC = re.compile(r"(?!.*__)(~?/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")
"""Names that ROS 2 accepts for a topic or action."""
REQUIRED: Any = object()
"""Default of an entry that has none."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with libyaml


class Entries:
    """The entries below one path of a YAML file.

    Owns the rule that nothing is ignored: an entry that is missing, wrong, given twice or, when :meth:`finish` is
    called, was never asked for is a :class:`ConfigError` such as ``robot.yaml: entry 'cameras.front.height' is -1,
    allowed is a whole number above 0``. Without a default an entry is required.
    """

    def __init__(self, file: Path, values: Any, path: str = "") -> None:
        self._file = file
        self._path = path
        self._sections: dict[str, Entries] = {}
        self._asked: dict[str, None] = {}  # in the order in which they were asked for
        if not isinstance(values, Mapping):
            raise ConfigError(f"{file}: {f'entry {path!r}' if path else 'it'} is {values!r}, allowed are named entries")
        self._values = values

    @classmethod
    def load(cls, file: Path) -> "Entries":
        """Entries of a YAML file.

        Raises:
            ConfigError: If it cannot be read, is not YAML, or names an entry twice.
        """
        try:
            loader = LOADER(file.read_text(encoding="utf-8"))
            root = loader.get_single_node()
            _refuse_doubled(file, root, "", set())  # before construction, which merges what << names
            values = None if root is None else loader.construct_document(root)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{file}: cannot be read as YAML: {error}") from error
        return cls(file, values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def names(self) -> list[str]:
        """Names of the entries."""
        return list(self._values)

    def wrong(self, key: str, allowed: str, *value: object) -> ConfigError:
        """The error of an entry; the value is only needed where ``key`` goes on below it, as ``lower[2]``."""
        (value,) = value or (self._values.get(key),)
        return ConfigError(f"{self._file}: entry {self._at(key)!r} is {value!r}, allowed is {allowed}")

    def missing(self, key: str) -> ConfigError:
        """The error of an entry that should be there."""
        return ConfigError(f"{self._file}: entry {self._at(key)!r} is missing")

    def section(self, key: str) -> "Entries":
        """The entries below an entry; one that is missing has none."""
        if key not in self._sections:
            self._sections[key] = Entries(self._file, self._get(key, {}), self._at(key))
        return self._sections[key]

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A text that is not empty."""
        value = self._get(key, default)
        if value is not default and (not isinstance(value, str) or not value.strip()):
            raise self.wrong(key, "a text")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: Any = REQUIRED) -> str:
        """One of some words."""
        value = self._get(key, default)
        if value not in allowed:
            raise self.wrong(key, f"one of {list(allowed)}")
        return value

    def topic(self, key: str) -> str:
        """Name of a topic or action."""
        value = self._get(key)
        if not isinstance(value, str) or not TOPIC.fullmatch(value):
            raise self.wrong(key, "the name of a topic")
        return value

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def count(self, key: str) -> int:
        """A whole number above 0."""
        value = self._get(key)
        if type(value) is not int or value <= 0:
            raise self.wrong(key, "a whole number above 0")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number."""
        value = self._get(key, default)
        if value is not default and not _is_number(value):
            raise self.wrong(key, "a number")
        return value if value is default else float(value)

    def positive(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number above 0."""
        value = self.number(key, default)
        if value is not default and value <= 0.0:
            raise self.wrong(key, "a number above 0")
        return value

    def list(self, key: str, default: Any = REQUIRED) -> Sequence[Any]:
        """A list of anything."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def numbers(self, key: str, size: int, default: Any = REQUIRED) -> tuple[float, ...]:
        """Finite numbers, as many as ``size``."""
        values = self.list(key, default)
        if values is not default and len(values) != size:
            raise self.wrong(key, f"a list of {size} numbers")
        for i, value in enumerate(values):
            if not _is_number(value):
                raise self.wrong(f"{key}[{i}]", "a number", value)
        return tuple(float(value) for value in values)

    def table(self, key: str, names: Sequence[str], null: bool = False) -> dict[str, float | None]:
        """Finite numbers by name: from a list with one for each of the names, or from entries for some of them.

        Args:
            key: The entry; it may be missing.
            names: What the numbers belong to.
            null: A number may be null.
        """
        values = self._get(key, {})
        if isinstance(values, list):
            if len(values) != len(names):
                raise self.wrong(key, f"one number for each of {list(names)}")
            items = {name: (f"{key}[{i}]", values[i]) for i, name in enumerate(names)}
        else:
            section = self.section(key)
            section._asked.update(dict.fromkeys(names))
            items = {name: (f"{key}.{name}", section._values[name]) for name in names if name in section}
        for path, value in items.values():
            if not _is_number(value) and not (null and value is None):
                raise self.wrong(path, f"a number{' or null' if null else ''}", value)
        return {name: value for name, (_, value) in items.items()}

    def name_list(self, key: str, default: Any = REQUIRED, among: Sequence[str] | None = None) -> tuple[str, ...]:
        """Different names, each one of ``among`` if that is given."""
        values = self.list(key, default)
        for i, value in enumerate(values):
            if not isinstance(value, str) or not value:
                raise self.wrong(f"{key}[{i}]", "a name", value)
            if value in values[:i]:
                raise self.wrong(f"{key}[{i}]", "a name that is not there yet", value)
            if among is not None and value not in among:
                raise self.wrong(f"{key}[{i}]", f"one of {list(among)}", value)
        return tuple(values)

    def finish(self) -> None:
        """Every entry was asked for.

        Raises:
            ConfigError: If one was not: it is a slip of the pen, or does not belong here.
        """
        for key in self._values:
            if key not in self._asked:
                raise ConfigError(
                    f"{self._file}: entry {self._at(key)!r} is not known or not used here, used are {list(self._asked)}"
                )
        for section in self._sections.values():
            section.finish()

    def _get(self, key: str, default: Any = REQUIRED) -> Any:
        self._asked[key] = None
        if key in self._values:
            return self._values[key]
        if default is REQUIRED:
            raise self.missing(key)
        return default

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else str(key)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _refuse_doubled(file: Path, node: yaml.Node, path: str, seen: set[int]) -> None:
    """PyYAML takes the last of two entries of one name without a word."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _refuse_doubled(file, item, f"{path}[{i}]", seen)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            if str(key.value) in keys:
                raise ConfigError(f"{file}: entry {below!r} is given twice")
            keys.add(str(key.value))
            _refuse_doubled(file, value, below, seen)
