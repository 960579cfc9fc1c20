"""Disks that are full, read-only or gone: failures of the environment, told in one line."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""What no code but that which writes is told."""


def is_of(folder: Path, error: BaseException) -> bool:
    """Whether an error says that a folder cannot be written, and nothing about what is computed."""
    if not isinstance(error, OSError):
        return False
    if error.errno in OF_DISKS:
        return True
    # Gone, or no longer ours; of files elsewhere the code of a model may have asked.
    return isinstance(error.filename, str | Path) and Path(
        error.filename
    ).absolute().is_relative_to(folder.absolute())


def trouble(error: OSError, folder: Path | None = None) -> str:
    """One line: the place, why it cannot be used, and how much of its disk is free.

    Args:
        error: what was raised.
        folder: what was being written; None: the file that the error names.
    """
    reason = error.strerror or str(error) or type(error).__name__
    named = folder if folder is not None else error.filename
    if not isinstance(named, str | Path):
        return reason
    place = Path(named).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e6
    return f"{named}: cannot be used ({reason}; {free:,.1f} MB of its disk are free)"


@contextmanager
def tensors_to(file: Path) -> Iterator[None]:
    """Turns what torch raises where it cannot write a file into the OSError that it was."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        # Its own writer says where in its code it failed, and not why.
        if "enforce fail" in reason:
            reason = "the file could not be written whole"
        raise OSError(None, reason, str(file)) from error
