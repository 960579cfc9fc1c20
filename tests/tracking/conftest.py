import shutil

import pytest


@pytest.fixture
def database(template, tmp_path):
    """A database of this test's own, where runs look for it."""
    return shutil.copy(template, tmp_path / "mlflow.db")
