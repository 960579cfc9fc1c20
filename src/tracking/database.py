"""MLflow's SQLite database: made whole or not at all."""

import shutil
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

import filelock

from src.common import terminal

LOCK_SECONDS = 60.0
"""Time another process may take to make the database."""
BUSY_SECONDS = 5.0
"""Time to wait for a process that has locked the database itself."""
STILL_SECONDS = 5.0
"""A database that has not changed for so long is not being made any more."""

_SIBLINGS = ("-journal", "-wal", "-shm")


def ensure(database: Path) -> None:
    """Makes the database where it is missing, and moves one aside that was only half made.

    MLflow makes its tables in some fifty migrations over several seconds. A process that is killed
    in between leaves a file that MLflow can neither use nor complete. So the tables are made under
    another name, and the file is renamed once it is whole. Everything happens under a lock, because
    processes that migrate one database together all fail.

    Raises:
        FileNotFoundError: there is no such folder.
        filelock.Timeout: another process takes too long to make it.
        sqlite3.Error, OSError, sqlalchemy's errors: it cannot be read or made.
    """
    if not database.parent.is_dir():
        # MLflow would try again for a minute.
        raise FileNotFoundError(f"{database.parent}: no such folder")
    with filelock.FileLock(database.with_suffix(".lock"), timeout=LOCK_SECONDS):
        if database.exists() and _is_abandoned(database):
            aside = database.with_name(
                f"{database.name}.half-made-{time.strftime('%Y%m%d-%H%M%S')}"
            )
            database.rename(aside)
            terminal.warn(
                f"{database}: was only half made and holds no run; it is now {aside.name}, and a"
                " new one is made"
            )
        if not database.exists():
            _make(database)


def _make(database: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    prefix = f".{database.name}.making-"
    for left in database.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    # A name that is new each time: MLflow keeps the connection of an attempt that failed.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=database.parent) as folder:
        draft = Path(folder) / database.name
        store = SqlAlchemyStore(f"sqlite:///{draft}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        # A connection that is still open would look for its journal under the old name.
        store.engine.dispose()
        # SQLite would apply a journal that an earlier database of this name has left.
        for suffix in _SIBLINGS:
            database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)
        draft.replace(database)


def _is_abandoned(database: Path) -> bool:
    """Whether it is half made, and nobody is making it: MLflow's own command takes no lock."""
    while _is_half_made(database):
        age = time.time() - database.stat().st_mtime
        if not 0 <= age < STILL_SECONDS:
            return True
        time.sleep(0.2)
    return False


def _is_half_made(database: Path) -> bool:
    """Whether MLflow has not finished making it.

    MLflow adds the first experiment when all tables are there, and never deletes the last one. So a
    database without an experiment is not finished, and cannot hold a run either.
    """
    with closing(sqlite3.connect(database, timeout=BUSY_SECONDS)) as connection:
        found = connection.execute("select name from sqlite_master where type = 'table'")
        tables = {name for (name,) in found}
        # A migration copies a table to a name of its own and drops the old one.
        copies = [name for name in ("experiments", "_alembic_tmp_experiments") if name in tables]
        counts = [
            connection.execute(f"select count(*) from {name}").fetchone()[0] for name in copies
        ]
    # Tables of another program are not ours to move.
    is_ours = bool(copies) or not tables
    return is_ours and not any(counts)
