"""The pages of the documentation lead somewhere, and name only what there is."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from src.common.override_grammar import GROUPS
from src.lab.__main__ import COMMANDS
from tests.runs import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "src" / "nonfinite" / "README.md"]

WIDTH = 90
"""Columns of a line of code that a page shows without a scroll bar."""

OPEN = ("with.", "model.kwargs", "model.sizes.", "hydra.launcher.")
"""Beginnings of fields that take any name."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[str]:
    """The code blocks of a page, fenced and indented, less the indentation."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:(?<=\n\n)|^)((?:    .*\n|\n(?=    ))+)", rest)
    return [*fenced, *(re.sub(r"^    ", "", one, flags=re.MULTILINE) for one in indented)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower())
        anchor = plain.strip().replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one) is not None for one in found)
        found.add(f"{anchor}-{same}" if same else anchor)
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command in the code blocks of a page, comments left out."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(python -m|\.venv/bin/python -m|make) ", line):
                # The shell would take <run folder> for a redirection; it is a placeholder.
                found.append(shlex.split(line.replace("<run folder>", "FOLDER"), comments=True))
    return found


def known_fields() -> set[str]:
    """The fields that docs/configuration.md has a row for."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    return set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_the_list_of_pages_has_each_page(page):
    contents = (ROOT / "docs" / "README.md").read_text()
    assert page.name == "README.md" or f"]({page.name})" in contents


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_line_of_code_is_not_too_wide(page):
    wide = [
        line
        for block in blocks(page.read_text())
        for line in block.splitlines()
        if len(line) > WIDTH
    ]
    assert not wide


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_exists(page):
    text = page.read_text()
    for module in re.findall(r"python -m (src(?:\.\w+)+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for command in re.findall(r"python -m src\.lab (\w+)", text):
        assert command in COMMANDS
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^    |`)make ([a-z0-9-]+)", text, re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_field_of_a_command_exists(page):
    known = {*known_fields(), *GROUPS, "hydra/launcher"}
    for words in commands(page.read_text()):
        if words[0] == "make" or not words[2].startswith("src."):
            continue
        for word in words[3:]:
            field, equals, _ = word.lstrip("+").partition("=")
            if equals and not field.startswith(OPEN):
                # A remedy of the reader's own has fields that are not among ours.
                assert field in known or field.startswith("stability.centre."), word


def test_the_laboratory_book_lists_every_experiment():
    text = (ROOT / "docs" / "laboratory_book.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert listed == {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}


def test_blocks_and_anchors_are_found():
    page = ROOT / "docs" / "sweeps.md"
    assert "branches" in anchors(page)
    assert any(block.startswith("make ablate") for block in blocks(page.read_text()))
    assert ["make", "ui", "PORT=5001"] in commands(page.read_text())


def test_the_picture_of_the_terminal_is_what_the_example_prints():
    folder = ROOT / "docs" / "images"
    spec = importlib.util.spec_from_file_location("drawing", folder / "draw_terminal.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert (folder / "terminal.svg").read_text(encoding="utf-8") == drawing.draw()
