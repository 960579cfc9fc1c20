"""The one exception that means: the user's input cannot be used."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Bad input, in one line that names the field, the value and what is allowed; exit code 2."""


class DamagedError(InputError):
    """A file that a command has written itself cannot be read any more."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`did you mean X?`, or an empty string where nothing is near."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"did you mean {found[0]}? " if found else ""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns the refusal of a file system into an InputError.

    Args:
        what: field and file, which begin its line.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be read ({error.strerror or error})") from error
