"""Files and disks: cached file hashes, and one-line errors for disks that are full or gone."""

import csv
import errno
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""Error numbers that only a write to a disk raises."""


def is_of(folder: Path, error: BaseException) -> bool:
    """Whether an error means that `folder` cannot be written, rather than a fault in the model."""
    if not isinstance(error, OSError):
        return False
    if error.errno in OF_DISKS:
        return True
    # Inside the folder any OSError counts; files elsewhere may have been opened by a model's code.
    return isinstance(error.filename, str | Path) and Path(
        error.filename
    ).absolute().is_relative_to(folder.absolute())


def trouble(error: OSError, folder: Path | None = None) -> str:
    """One line that says which path cannot be used, why, and how much of its disk is free.

    Args:
        error: the error that was raised.
        folder: the folder that was being written; None: the file that the error names.
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
    """Turns the RuntimeError that torch raises for a failed write back into an OSError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        # torch's zip writer reports the place in its own code, not the reason.
        if "enforce fail" in reason:
            reason = "the file could not be written whole"
        raise OSError(None, reason, str(file)) from error


def file_digest(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content, cached by its path, size and modification time."""
    facts = file.stat()
    key = f"{file.resolve()}/{facts.st_size}/{facts.st_mtime_ns}"
    note = cache / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    known = note.read_text(encoding="utf-8") if note.is_file() else ""
    # A kill or a full disk may have cut the cached hash short; then it is computed again.
    if re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest, encoding="utf-8")
    return digest


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV file whose columns are the keys of the first row, with its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
