"""Creates MLflow's SQLite database, completely or not at all."""

import shutil
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

import filelock

from src.common import terminal

LOCK_SECONDS = 60.0
"""How long another process may take to create the database."""
BUSY_SECONDS = 5.0
"""How long to wait for a process that has locked the database itself."""
STILL_SECONDS = 5.0
"""An incomplete database that has not changed for this long is not being created any more."""

_SIBLINGS = ("-journal", "-wal", "-shm")


def ensure_database(database: Path) -> None:
    """Creates the database if it is missing, and moves an incomplete one aside.

    MLflow creates its tables in about fifty migrations, which take several seconds. A process that
    is killed meanwhile leaves a file that MLflow can neither use nor complete. Therefore the tables
    are created in a file of another name, which is renamed when it is complete. A lock is held,
    because processes that migrate the same database at the same time all fail.

    Raises:
        FileNotFoundError: the folder does not exist.
        filelock.Timeout: another process takes too long to create it.
        sqlite3.Error, OSError, errors of sqlalchemy: it cannot be read or created.
    """
    if not database.parent.is_dir():
        # MLflow would retry for a minute.
        raise FileNotFoundError(f"{database.parent}: no such folder")
    with filelock.FileLock(database.with_suffix(".lock"), timeout=LOCK_SECONDS):
        if database.exists() and _is_abandoned(database):
            aside = database.with_name(
                f"{database.name}.half-made-{time.strftime('%Y%m%d-%H%M%S')}"
            )
            database.rename(aside)
            terminal.warn(
                f"{database}: is incomplete and holds no run; it was renamed to {aside.name}, and a"
                " new one is created"
            )
        if not database.exists():
            _create(database)


def _create(database: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    prefix = f".{database.name}.making-"
    for left in database.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    # A new name each time, because MLflow caches the connection of a failed attempt by its name.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=database.parent) as folder:
        draft = Path(folder) / database.name
        store = SqlAlchemyStore(f"sqlite:///{draft}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        # An open connection would look for its journal under the old name.
        store.engine.dispose()
        # SQLite would apply a journal left by an earlier database of this name.
        for suffix in _SIBLINGS:
            database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)
        draft.replace(database)


def _is_abandoned(database: Path) -> bool:
    """Whether the database is incomplete and no process is creating it.

    `mlflow server` may be creating it without our lock, so the age of the file decides.
    """
    while _is_half_made(database):
        age = time.time() - database.stat().st_mtime
        if not 0 <= age < STILL_SECONDS:
            return True
        time.sleep(0.2)
    return False


def _is_half_made(database: Path) -> bool:
    """Whether MLflow has not finished creating the database.

    MLflow adds the first experiment when all tables exist, and never deletes the last one. So a
    database without an experiment is incomplete, and cannot hold a run either.
    """
    with closing(sqlite3.connect(database, timeout=BUSY_SECONDS)) as connection:
        found = connection.execute("select name from sqlite_master where type = 'table'")
        tables = {name for (name,) in found}
        # During a migration the table may exist under a temporary name only.
        copies = [name for name in ("experiments", "_alembic_tmp_experiments") if name in tables]
        counts = [
            connection.execute(f"select count(*) from {name}").fetchone()[0] for name in copies
        ]
    # A database of another program must not be moved.
    is_of_mlflow = bool(copies) or not tables
    return is_of_mlflow and not any(counts)
