"""A tiny run in a folder with a module of the user's own."""

import pytest

from tests.conftest import PACE
from tests.external.own import DECORATOR, OWN


@pytest.fixture
def pace(tmp_path, monkeypatch, shared_cache):
    """Arguments of a tiny run in a folder with a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_model.py").write_text(OWN)
    (tmp_path / "own_decorator.py").write_text(DECORATOR)
    (tmp_path / "own_leaves.py").write_text("raise SystemExit(0)")
    monkeypatch.delitem(__import__("sys").modules, "own_model", raising=False)
    return [*PACE, f"paths.cache={shared_cache}"]
