"""The rooms of src stand on floors, and an import goes down only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT

FLOORS = (
    ("common", "model"),
    ("data", "nonfinite"),
    ("training",),
    ("checkpoint",),
    ("external", "examples"),
    ("stability",),
    ("config",),
    ("cli",),
    ("generation", "conversion", "postmortem", "tracking"),
    ("run", "study"),
    ("sweep",),
    ("lab",),
    ("commands",),
)
"""From the ground up; a module at the root of src is a command."""

ALONE = ("common", "model", "nonfinite")
"""Rooms that import nothing of ours."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted((ROOT / "src").rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").parts
    return parts[0] if len(parts) > 1 else "commands"


def room_named(module: str, name: str) -> str | None:
    """The room that `from module import name` reaches; None where it is not ours."""
    parts = module.split(".")
    if parts[0] == "nonfinite":
        return "nonfinite"
    if parts[0] != "src":
        return None
    room = parts[1] if len(parts) > 1 else name
    return room if (ROOT / "src" / room).is_dir() else "commands"


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from, wherever in it."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {room_named(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {room_named(alias.name, "") for alias in node.names}
    return {room for room in found if room is not None}


def test_every_module_stands_on_a_floor():
    assert {room_of(path) for path in MODULES} == set(FLOOR_OF)


def test_an_import_goes_down():
    for path in MODULES:
        room = room_of(path)
        for other in imported(path) - {room}:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path} imports {other}"
            assert room not in ALONE, f"{path} imports {other}"


def test_the_library_is_imported_by_its_own_name_alone():
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("src.nonfinite") for name in names), path


def test_altair_is_imported_without_the_parsers_of_addresses():
    importing = [
        p for p in MODULES if re.search(r"^\s*(import|from) altair\b", p.read_text(), re.M)
    ]
    # `nonfinite` also runs in processes of others, whose parsers it leaves alone.
    assert [path.name for path in importing] == ["chart_library.py", "incident_files.py"]
    code = (
        "import sys; from src.study.report import charts;"
        " assert 'altair' in sys.modules and 'rfc3987_syntax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_name_of_a_module_is_there_once():
    several = ("__init__", "__main__", "base", "config")
    names = [p.stem for p in MODULES if p.stem not in several and room_of(p) != "examples"]
    assert sorted(names) == sorted(set(names))
