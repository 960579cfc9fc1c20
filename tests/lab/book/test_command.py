import csv

import pytest
import yaml

from tests.conftest import TINY
from tests.runs import lab

PAGE = "{{ num_runs() }} runs, {{ failing('none') }} fail.\n\n![x](figures/final-loss.svg)\n"


@pytest.fixture
def tiny_book(tmp_path, monkeypatch):
    """A study of two arms and two seeds, a second each."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "small"
    folder.mkdir(parents=True)
    sweep = [*TINY, "recipe.max_steps=4", "stability=none,shaken_full", "seed=1000,1001"]
    plan = {"sweeps": [sweep], "short": ["seed=1000"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    (folder / "predictions.yaml").write_text("[]")
    (folder / "README.md.jinja").write_text(PAGE)
    return folder


ARGUMENTS = ("studies=small", "paths.book=experiments")


@pytest.mark.slow
def test_a_study_is_run_brought_into_the_book_and_repeated_bitwise(tiny_book, capsys):
    assert lab("reproduce")([*ARGUMENTS, "plan=true"]) == 0
    assert "4 runs, about" in capsys.readouterr().out
    assert not (tiny_book.parent.parent / "runs").exists()
    assert lab("reproduce")([*ARGUMENTS]) == 0
    assert "not in the book" in capsys.readouterr().out
    assert lab("book")([*ARGUMENTS]) == 0
    assert (tiny_book / "README.md").read_text().startswith("4 runs, 0 fail.")
    assert (tiny_book / "figures" / "final-loss.svg").is_file()
    capsys.readouterr()

    assert lab("reproduce")([*ARGUMENTS]) == 0
    shown = capsys.readouterr().out
    assert "0 runs, about" in shown and "4 of 4" in shown

    with (tiny_book / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[0]["loss"] = "9.0"
    rows.append({**rows[1], "seed": "1002"})
    with (tiny_book / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert lab("reproduce")([*ARGUMENTS]) == 1
    shown = capsys.readouterr().out
    assert "3 of 5, 1 not run" in shown and "loss" in shown


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("studies=nothing", "studies=nothing: must be one of small"),
        ("n_jobs=0", "n_jobs=0: must be at least 1"),
        ("plan=flase", "plan=flase: must be true or false"),
        ("studies=[small,nothing]", "studies=nothing: must be one of small"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(argument, message, tiny_book, capsys):
    assert lab("reproduce")(["paths.book=experiments", argument]) == 2
    assert message in capsys.readouterr().err
    assert not (tiny_book.parent.parent / "runs").exists()


def test_a_study_without_runs_cannot_be_brought_in(tiny_book, capsys):
    assert lab("book")([*ARGUMENTS]) == 2
    assert "has no runs in runs" in capsys.readouterr().err
    assert not (tiny_book / "results.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweeps: 3\n", "study.yaml: must have sweeps and short"),
        (
            "sweeps: [experiment=control]\nshort: []\n",
            "study.yaml: sweeps must be one or more lists",
        ),
        ("sweeps: []\nshort: []\n", "study.yaml: sweeps must be one or more lists"),
    ],
)
def test_a_damaged_plan_is_named(text, message, tiny_book, capsys):
    (tiny_book / "study.yaml").write_text(text)
    assert lab("reproduce")([*ARGUMENTS]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reproduce", "book"])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("paths=3", "paths=3: has the wrong type"),
        ("paths.runs=null", "paths.runs=null: must be a folder"),
        ("paths.book=nowhere", "paths.book=nowhere: no such folder"),
        ("studies=[]", "studies=[]: is empty"),
    ],
)
def test_bad_folders_and_no_studies_are_one_line(command, argument, message, tiny_book, capsys):
    given = [a for a in ARGUMENTS if a.partition("=")[0] != argument.partition("=")[0]]
    assert lab(command)([*(a for a in given if argument != "paths=3"), argument]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "variant,seed\nx,1\n", "variant\n"])
def test_damaged_results_are_named_before_anything_runs(text, tiny_book, capsys):
    (tiny_book / "results.csv").write_text(text)
    assert lab("reproduce")([*ARGUMENTS]) == 2
    assert "results.csv: " in capsys.readouterr().err
    assert not (tiny_book.parent.parent / "runs").exists()


def test_of_pages_that_cannot_all_be_made_none_is_written(tiny_book, capsys):
    (tiny_book.parent / "A.md.jinja").write_text("fine\n")
    (tiny_book.parent / "B.md.jinja").write_text("{{ nothing }}\n")
    assert lab("book")(["paths.book=experiments"]) == 2
    assert "B.md.jinja: UndefinedError" in capsys.readouterr().err
    assert not (tiny_book.parent / "A.md").exists()


def test_a_withdrawn_study_is_run_only_if_it_is_named(tiny_book, capsys):
    plan = yaml.safe_load((tiny_book / "study.yaml").read_text())
    second = tiny_book.parent / "other"
    second.mkdir()
    (second / "study.yaml").write_text(yaml.safe_dump({**plan, "withdrawn": "too few seeds"}))
    assert lab("reproduce")(["paths.book=experiments", "plan=true"]) == 0
    assert "4 runs, about" in capsys.readouterr().out
    assert lab("reproduce")(["paths.book=experiments", "studies=other", "plan=true"]) == 0
    assert "4 runs, about" in capsys.readouterr().out
