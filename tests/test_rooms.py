"""The rooms of the package, and that each imports only those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import esft_jax

ROOT = Path(esft_jax.__file__).parent

# From the ground up. Rooms of one line do not import each other.
FLOORS = [
    {"errors", "huge_pages"},
    {"files", "memory", "serving"},
    {"accelerators", "host_memory", "lock", "processes", "progress", "strict_yaml", "terminal"},
    {"blocks", "sharding", "topology"},
    {"ops"},
    {"moe"},
    {"model"},
    {"data", "families"},
    {"adapt", "values"},
    {"data_config", "optimizer_config", "selection_config", "train_config"},
    {"checkpoint", "config", "decode"},
    {"routing"},
    {"training"},
    {"evaluation", "planning"},
    {"checking", "sweeping"},
    {"reporting"},
    {"cli"},
    {"adapters", "convert", "evaluate", "export", "generate", "harness", "plan"},
    {"chat", "push", "select", "selfcheck", "sweep", "train"},
    {"report", "score", "show_data"},
    {"__main__", "init"},
]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "esft_jax" and parts:
                yield parts[0]


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def test_every_room_has_a_floor():
    assert {room(path) for path in modules()} == set().union(*FLOORS)


def test_rooms_import_downwards_only():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upwards = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in modules()
        for target in imported(path)
        if target != room(path) and floor[target] >= floor[room(path)]
    ]
    assert upwards == []
