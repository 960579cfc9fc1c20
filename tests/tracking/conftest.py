import os
import shutil
import subprocess
import sys

import filelock
import pytest


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An empty database, made once for all workers: creating one takes seconds.

    By two processes at the same time, as two runs would: without a lock both crash.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "mlflow-template"
    uri = f"sqlite:///{folder}/mlflow.db"
    code = (
        f"from src.tracking.client import Server; assert Server({uri!r}).connection_error() is None"
    )
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            makers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
            assert [maker.wait(120) for maker in makers] == [0, 0]
    return folder / "mlflow.db"


@pytest.fixture
def database(template, tmp_path):
    """A database of this test's own, where runs look for it."""
    return shutil.copy(template, tmp_path / "mlflow.db")
