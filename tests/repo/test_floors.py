"""The house stays a house: imports run down the floors, files stay short, heavy libraries wait, configs load."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import CONFIGS, ROOT

PACKAGE = ROOT / "rlsafe"
MAX_LINES = 350

FLOORS = [
    {"config"},
    {"types"},
    {"policy", "data", "losses", "endpoints"},
    {"defenses", "rollouts", "rewards", "organism"},
    {"engine", "evaluate"},
    {"compare"},
    {"cli", "arguments", "doctor", "features", "progress", "settings", "__main__", "__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str, package: list[str]) -> list[tuple[int, str]]:
    """(line, room of rlsafe) for every import in a module of `package`, those inside functions and type checks too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            # `from rlsafe import x` reaches the room x; deeper ones are told by their second step
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "rlsafe":
                found.append((node.lineno, parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"))
    return found


def imports_of(path: Path) -> list[tuple[int, str]]:
    return imported_rooms(path.read_text(encoding="utf-8"), ["rlsafe", *path.relative_to(PACKAGE).parts[:-1]])


def test_every_room_stands_on_a_floor():
    assert {room_of(path) for path in modules()} <= set(FLOOR)


def test_imports_never_run_up_the_floors():
    # __init__ hands out the public names of every room, and each top module may read the version from it.
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {room}"
        for path in modules()
        for line, room in imports_of(path)
        if FLOOR[room] > FLOOR[room_of(path)] and room_of(path) != "__init__"
    ]
    assert upward == []


def test_rooms_of_one_floor_import_each_other_in_one_direction_only():
    graph: dict[str, set[str]] = {}
    for path in modules():
        mine = room_of(path)
        if mine != "__init__":
            graph.setdefault(mine, set()).update(room for _, room in imports_of(path) if room not in (mine, "__init__"))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' -> '.join(error.args[1])}")


ROOMS_WITHIN = {
    "engine": ["plan", "record", "train", "run"],
    "evaluate": ["ask", "judge", "measure", "commands"],
    "compare": ["grid", "verdicts", "report", "run"],
}
"""The rooms inside a room, from the ground up."""


def imported_files(name: str, files: dict[str, Path]) -> set[str]:
    """The modules that one module imports, inside functions too, but not for type checks only. A name that a room's
    `__init__` hands out counts as the module it comes from."""
    tree = ast.parse(files[name].read_text(encoding="utf-8"))
    checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    unseen = {id(node) for check in checks for node in ast.walk(check)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in unseen:
            found |= {origin(node.module, alias.name, files) for alias in node.names}
        elif isinstance(node, ast.Import) and id(node) not in unseen:
            found |= {alias.name for alias in node.names}
    return (found & set(files)) - {name}


def origin(package: str, name: str, files: dict[str, Path]) -> str:
    """The module behind `from package import name`."""
    if f"{package}.{name}" in files or package not in files or files[package].name != "__init__.py":
        return f"{package}.{name}" if f"{package}.{name}" in files else package
    for node in ast.walk(ast.parse(files[package].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and name in {a.asname or a.name for a in node.names}:
            return origin(node.module, name, files)
    return package


def files_and_imports() -> dict[str, set[str]]:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()
    }
    return {name: imported_files(name, files) for name, path in files.items() if path.name != "__init__.py"}


def test_files_never_call_each_other_in_a_circle():
    """Imports inside functions count: what is called is imported somewhere."""
    try:
        TopologicalSorter(files_and_imports()).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' -> '.join(error.args[1])}")


def test_rooms_within_a_room_stand_on_each_other_in_one_direction():
    upward = []
    for name, imports in files_and_imports().items():
        _, room, *inner = name.split(".")
        order = ROOMS_WITHIN.get(room, [])
        for other in imports:
            parts = other.split(".")
            if order and len(inner) == 2 and len(parts) == 4 and parts[1] == room:
                if order.index(parts[2]) > order.index(inner[0]):
                    upward.append(f"{name} imports {other}")
    assert not upward


def test_the_import_reader_sees_what_it_must():
    source = (
        "import rlsafe.engine.train.loop\n"
        "from rlsafe.compare import grid\n"
        "from rlsafe import evaluate, train\n"
        "def f():\n"
        "    from ..policy import load\n"
        "    from . import sibling\n"
        "import torch\n"
    )
    assert sorted(imported_rooms(source, ["rlsafe", "defenses"])) == [
        *((1, "engine"), (2, "compare"), (3, "__init__"), (3, "evaluate"), (5, "policy"), (6, "defenses"))
    ]


def test_files_fit_on_a_few_screens():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


HEAVY = ("torch", "transformers", "vllm", "trl", "peft", "accelerate", "datasets", "openai", "matplotlib", "scipy")


def test_importing_the_front_door_loads_nothing_heavy():
    doors = "import rlsafe, rlsafe.types, rlsafe.cli, rlsafe.doctor"
    probe = f"import sys; {doors}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_public_names_stay_what_they_are_once_every_room_is_imported():
    """A function and a room of one name would take turns: importing the room puts the module in its place."""
    probe = (
        "import rlsafe, types\n"
        "first = {name: getattr(rlsafe, name) for name in rlsafe.__all__}\n"
        "import rlsafe.engine, rlsafe.evaluate, rlsafe.compare\n"
        "changed = [name for name, value in first.items() if getattr(rlsafe, name) is not value]\n"
        "print(*changed, *[name for name, value in first.items() if isinstance(value, types.ModuleType) and not callable(value)])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr[-500:]


def load(path: Path) -> None:
    from rlsafe.config import load_compare, load_run, load_tree
    from rlsafe.evaluate.commands.extract_persona import load_settings

    tree, _ = load_tree(path)
    if "run" in tree:
        load_compare(path)
        load_compare(path, quick=True)
    elif "pairs" in tree:
        load_settings(path)
    else:
        load_run(path)


def test_shipped_configs_load():
    from rlsafe.config import UserError

    shipped = sorted(CONFIGS.rglob("*.yaml"))
    shipped = [
        path for path in shipped if not {"parts", "accelerate", "questions"} & set(path.relative_to(CONFIGS).parts)
    ]
    errors = []
    for path in shipped:
        try:
            load(path)
        except UserError as error:
            errors.append(f"{path.relative_to(ROOT)}: {error}")
    assert errors == [] and len(shipped) > 60
