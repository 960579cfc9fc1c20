"""The notebooks run from top to bottom, and are stored without what they showed."""

import os
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


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client that has executed compare.ipynb on a study; its kernel is still there."""
    folder = tmp_path_factory.mktemp("notebook")
    arms = {"none": Arm(num_failing=4), "router_eps": Arm(loss=(2.0, 2.1)), "ema": Arm()}
    synthetic.study(folder, arms, seeds=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOL_STUDY", synthetic.NAME)
        patch.setenv("SMOL_RUNS", str(folder / "runs"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # Nothing of the user's own: profiles and histories stay out of it.
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        found = NotebookClient(
            read(ROOT / "notebooks" / "compare.ipynb"),
            timeout=TIMEOUT_SECONDS,
            resources={"metadata": {"path": str(folder)}},
        )
        with found.setup_kernel():
            execute(found)
            yield found


def execute(client: NotebookClient, *before: str) -> None:
    """Executes lines of code, and then the whole notebook."""
    cells = [*map(nbformat.v4.new_code_cell, before), *client.nb.cells]
    for number, cell in enumerate(cells):
        client.execute_cell(cell, number)


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


def test_the_comparison_shows_table_figures_and_differences_of_a_study(client):
    found = shown(client.nb)
    assert "4 of 4 runs" in found["text/markdown"]
    assert all(f">{arm}<" in found["text/html"] for arm in ("none", "router_eps", "ema"))
    # Four of the report, and the pairs; each is drawn, and drawn again by a script.
    assert found["text/html"].count('<svg role="img"') == 5
    assert found["text/html"].count("vegaEmbed(document") == 5
    # Four seeds pair; the baseline's losses are no losses of sound runs.
    assert "ema minus none, 4 seeds" in found["text/plain"]


def test_a_study_without_runs_is_answered_in_one_line(client):
    with pytest.raises(CellExecutionError) as raised:
        execute(client, "os.environ['SMOL_STUDY'] = 'nope'")
    # The cell comes before the line of dashes that ends it.
    shown = raised.value.traceback.strip().splitlines()
    assert shown[-1].startswith("error: study=nope: has no runs in")
    assert "Traceback" not in raised.value.traceback
    assert shown[-2].strip("- ") == ""
