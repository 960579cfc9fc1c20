"""InputError, the one exception for unusable input, and helpers that raise it."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml


class InputError(ValueError):
    """Bad input, in one line that names the field, the value and what is allowed; exit code 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback."""
        return [f"error: {self}"]


class DamagedError(InputError):
    """A file that this project wrote is damaged."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`did you mean X? `, or an empty string if no allowed word is similar; case is ignored."""
    by_lower = {name.lower(): name for name in allowed}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"did you mean {by_lower[found[0]]}? " if found else ""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an OSError raised inside into an InputError.

    Args:
        what: field and file; the error line begins with them.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be read ({error.strerror or error})") from error


@contextlib.contextmanager
def damaged(
    file: Path, *, advice: str = "rerun=true moves the folder aside", line: int | None = None
) -> Iterator[None]:
    """Turns the errors that parsing a damaged file raises into one DamagedError.

    Args:
        file: the file being read.
        advice: what the user can do about it.
        line: number of the line being read; None for the whole file.
    """
    try:
        yield
    # RecursionError: a few kilobytes of nested brackets exceed the recursion limit of the JSON
    # and YAML parsers.
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        if isinstance(error, InputError):
            raise
        place = "" if line is None else f" in line {line}"
        raise DamagedError(f"{file}: is damaged{place}; {advice}") from error
