"""A run too large for a study: into the book, and what its page may say of it."""

import json

import pytest
import yaml

from src import book
from src.laboratory.chosen import UndecidedError
from src.laboratory.single import FIGURE, SingleRun
from tests.conftest import PACE
from tests.runs import metrics, train

PAGE = """\
> {{ command }}: {{ last_step }} of {{ steps }} steps, {{ failed }}, {{ at(9)['step'] | int }}

{{ predictions_table() }}
"""
PREDICTED = {"says": "it fails", "measure": "failed", "at_least": 1}
BROKEN = ["preset=crash", "recipe.max_steps=120", "recipe.num_validations=1", "tracking=local"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of one run, which nobody has made yet."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "whole"
    folder.mkdir(parents=True)
    (folder / "predictions.yaml").write_text(yaml.safe_dump([PREDICTED]))
    (folder / "README.md.jinja").write_text(PAGE)
    return folder


def described(folder, arguments):
    given = [*arguments, "study=whole"]
    (folder / "run.yaml").write_text(yaml.safe_dump({"arguments": given}))
    return given


ARGUMENTS = ("studies=[whole]", "paths.book=experiments")


def test_a_run_that_is_finite_is_brought_in(folder, shared_cache):
    given = described(folder, [*PACE, "ffn=moe"])
    run = train([*given, f"paths.cache={shared_cache}"])
    assert book.main([*ARGUMENTS]) == 0
    page = (folder / "README.md").read_text()
    assert page.startswith(f"> python -m src.train {' '.join(given)}: 12 of 12 steps, 0, 8")
    assert "| it fails | at least 1 | 0 | **wrong** |" in page
    logged = [line for line in metrics(run) if "train/loss" in line]
    rows = SingleRun(folder=folder).rows
    assert [row["loss"] for row in rows] == [line["train/loss"] for line in logged]
    assert all(row["topk_sum_min"] > 0 and row["nonfinite_batches"] == 0 for row in rows)
    assert "first at step" not in (folder / FIGURE).read_text()


def test_the_incident_of_a_run_is_brought_in_also_where_it_was_cut_off(folder, shared_cache):
    run = train([*described(folder, BROKEN), f"paths.cache={shared_cache}"])
    (run / "record.json").unlink()
    assert book.main([*ARGUMENTS]) == 0
    single = SingleRun(folder=folder)
    (first,) = (run / "incidents").glob("*/incident.json")
    assert single.incident == json.loads(first.read_text())
    words = single.words()
    assert words["failed"] == words["by_router_underflow"] == 1
    assert words["grad_norm_before"] == max(
        row["grad_norm"] for row in single.rows if row["step"] < words["first_nonfinite"]
    )
    assert f"first at step {words['first_nonfinite']}" in (folder / FIGURE).read_text()


def test_what_has_not_been_run_has_no_page_and_is_not_brought_in(folder, capsys):
    described(folder, PACE)
    assert book.main(["paths.book=experiments"]) == 0
    assert not (folder / "README.md").exists()
    with pytest.raises(UndecidedError, match="whole has not been run"):
        _ = SingleRun(folder=folder).rows
    capsys.readouterr()
    assert book.main([*ARGUMENTS]) == 2
    assert "must hold one run, holds 0" in capsys.readouterr().err
