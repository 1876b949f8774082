"""Who imports whom, against the table in docs/architecture.md."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "a2c2_ros"
TABLE = (ROOT / "docs" / "architecture.md").read_text().split("\n## Layers\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines() if line.startswith("| `")]
KNOW_ROS = {"nodes", "benchmark", "faults", "training"}
ROS = ("rclpy", "builtin_interfaces", "a2c2_ros.msg", "a2c2_ros.srv")
READS_MESSAGES = {"nodes.conversions", "nodes.observation_source", "nodes.runtime"}


def folders(cell: str) -> list[str]:
    return re.findall(r"`(\w+)/`", cell)


def allowed() -> dict[str, set[str]]:
    may: dict[str, set[str]] = {}
    for names, _, imports in ROWS:
        above = set(may) if "every folder above" in imports else set()
        group = folders(names)
        may |= {name: {"core", *group, *above, *folders(imports)} for name in group}
    return may


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_the_table_has_every_folder():
    present = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(allowed()) == present - {"msg", "srv"}  # where the generated messages are


def modules_of(layer: str) -> list[tuple[Path, str]]:
    return [(path, module) for path in sorted((PACKAGE / layer).rglob("*.py")) for module in sorted(imported(path))]


@pytest.mark.parametrize("layer", sorted(allowed()))
def test_a_layer_imports_only_what_the_table_says(layer):
    wrong = []
    for path, module in modules_of(layer):
        first, *rest = module.split(".")
        if first == "a2c2_ros" and (PACKAGE / rest[0]).is_dir():
            of_nodes = rest[0] == "nodes" and layer in ("training", "evaluation")
            right = ".".join(rest[:2]) in READS_MESSAGES if of_nodes else rest[0] in allowed()[layer] | {"msg", "srv"}
        else:
            right = layer != "core" or first == "numpy" or first in sys.stdlib_module_names
        if not right:
            wrong.append(f"{path.relative_to(PACKAGE)}: {module}")
    assert wrong == []


@pytest.mark.parametrize("layer", sorted(allowed().keys() - KNOW_ROS))
def test_only_the_glue_knows_ros(layer):
    found = [(path.name, module) for path, module in modules_of(layer)]
    assert [pair for pair in found if pair[1].startswith(ROS) or "_msgs." in pair[1]] == []
