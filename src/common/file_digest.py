"""Hashes of files, remembered."""

import hashlib
import re
from pathlib import Path


def file_digest(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content, remembered by its place, size and time of change."""
    facts = file.stat()
    key = f"{file.resolve()}/{facts.st_size}/{facts.st_mtime_ns}"
    note = cache / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    known = note.read_text(encoding="utf-8") if note.is_file() else ""
    # A file that a kill or a full disk has cut short is written again.
    if re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest, encoding="utf-8")
    return digest
