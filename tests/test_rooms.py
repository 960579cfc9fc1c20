"""Data flows one way: what each room of src may import."""

import ast

import pytest

from tests.runs import ROOT

ABOVE = {"config", "run", "sweep", "study", "conversion", "tracking", "generation", "cli"}
FORBIDDEN = {
    "model": {"*"},
    "data": ABOVE | {"training", "stability", "watch", "model"},
    "training": ABOVE | {"stability", "watch"},
    "stability": ABOVE | {"model"},
    "watch": ABOVE | {"model", "stability"},
    "examples": ABOVE | {"model", "training", "stability", "data"},
    "detection": {"sweep", "study", "conversion", "generation", "model"},
    "generation": {"config", "run", "sweep", "study", "conversion", "tracking", "cli"},
    "run": {"sweep", "study", "conversion", "cli"},
    "conversion": {"run", "sweep", "study", "cli"},
}


def imported(room: str) -> dict[str, set[str]]:
    """First parts of what the files of a room import from src, by file."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "src" / room).rglob("*.py")):
        names = found.setdefault(str(file.relative_to(ROOT)), set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "src":
                parts = (node.module or "").split(".")[1:]
                names |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_nothing_below_reaches_up(room):
    found = imported(room)
    assert any(found.values())
    for file, names in found.items():
        others = names - {room}
        reached = others if "*" in FORBIDDEN[room] else others & FORBIDDEN[room]
        assert not reached, f"{file} imports {', '.join(sorted(reached))}"
