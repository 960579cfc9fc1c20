"""The notebooks run from top to bottom, and are stored without what they showed."""

import os
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.runs import ROOT
from tests.study import synthetic
from tests.study.synthetic import Arm

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_SECONDS = 600


def read(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def executed(tmp_path: Path, monkeypatch, *, study: str) -> nbformat.NotebookNode:
    """compare.ipynb after a run on a study below tmp_path."""
    monkeypatch.setenv("SMOL_STUDY", study)
    monkeypatch.setenv("SMOL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Nothing of the user's own: profiles and histories stay out of it.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(ROOT / "notebooks" / "compare.ipynb")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=TIMEOUT_SECONDS, resources=resources).execute()
    return notebook


def shown(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """All outputs together, by kind."""
    kinds: dict[str, str] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            for kind, content in data.items():
                kinds[kind] = kinds.get(kind, "") + content
    return kinds


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_notebooks_are_stored_without_output(file):
    notebook = read(file)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None


def test_the_comparison_shows_table_figures_and_differences_of_a_study(tmp_path, monkeypatch):
    arms = {"none": Arm(num_failing=4), "router_eps": Arm(loss=(2.0, 2.1)), "ema": Arm()}
    synthetic.study(tmp_path, arms, seeds=4)
    before = time.monotonic()
    found = shown(executed(tmp_path, monkeypatch, study=synthetic.NAME))
    assert time.monotonic() - before < TIMEOUT_SECONDS
    assert "4 of 4 runs" in found["text/markdown"]
    assert all(f">{arm}<" in found["text/html"] for arm in arms)
    # Four of the report, and the pairs; each is drawn, and drawn again by a script.
    assert found["text/html"].count('<svg role="img"') == 5
    assert found["text/html"].count("vegaEmbed(document") == 5
    # Four seeds pair; the baseline's losses are no losses of sound runs.
    assert "ema minus none, 4 seeds" in found["text/plain"]


def test_a_study_without_runs_is_answered_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError) as raised:
        executed(tmp_path, monkeypatch, study="nope")
    # The cell comes before the line of dashes that ends it.
    shown = raised.value.traceback.strip().splitlines()
    assert shown[-1].startswith("error: study=nope: has no runs in")
    assert "Traceback" not in raised.value.traceback
    assert shown[-2].strip("- ") == ""
