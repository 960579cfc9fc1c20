"""A run too large for a study: into the book, and what its page may say of it."""

import json

import pytest
import yaml

from src.lab.book.select_arms import UndecidedError
from src.lab.book.single import FIGURE, SingleRun
from tests.conftest import PACE
from tests.runs import lab, metrics, train

PAGE = """\
> {{ command }}: {{ last_step }} of {{ steps }} steps, {{ failed }}, {{ at(9)['step'] | int }}

{{ predictions_table() }}
"""
PREDICTED = {"says": "it fails", "measure": "failed", "at_least": 1}
BROKEN = [
    *(
        "preset=crash",
        "ffn=moe_writeup_add",
        "tracking=local",
        "model.num_layers=3",
        "data.max_chars=20000",
    ),
    *("recipe.max_steps=120", "recipe.seq_len=32", "recipe.num_validations=1"),
    "recipe.val_windows=8",
]


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
    (folder / "incident.json").write_text("of a run before")
    assert lab("book")([*ARGUMENTS]) == 0
    page = (folder / "README.md").read_text()
    assert page.startswith(f"> python -m src.train {' '.join(given)}: 12 of 12 steps, 0, 8")
    assert "| it fails | at least 1 | 0 | **wrong** |" in page
    assert not (folder / "incident.json").exists()
    single = SingleRun(folder=folder)
    logged = [line for line in metrics(run) if "train/loss" in line]
    assert [row["loss"] for row in single.curve] == [line["train/loss"] for line in logged]
    assert single.words["first_nonfinite"] is None
    norms = {line["step"]: line["grad/norm"] for line in metrics(run) if "grad/norm" in line}
    assert single.words["grad_norm_before"] == max(norms.values())
    assert single.recipe.warmup_steps == 1
    later = [norm for step, norm in norms.items() if step > 1]
    assert single.words["grad_norm_after_warmup"] == max(later) < max(norms.values())
    stats = [line for line in metrics(run) if "moe/layer_0/topk_sum_min" in line]
    for column, pick in (("topk_sum_min", min), ("max_violation", max)):
        for row in single.curve:
            layers = [
                value
                for line in stats
                for name, value in line.items()
                if line["step"] == row["step"] and name.endswith(column)
            ]
            assert row[column] == pick(layers)
    later = [row["max_violation"] for row in single.curve if row["step"] > 1]
    assert single.words["least_max_violation"] == min(later)
    assert "first at step" not in (folder / FIGURE).read_text()


@pytest.mark.drawn
def test_the_incident_of_a_run_is_brought_in_also_where_it_was_cut_off(folder, shared_cache):
    run = train([*described(folder, BROKEN), f"paths.cache={shared_cache}"])
    (run / "record.json").unlink()
    (first,) = (run / "incidents").glob("*/incident.json")
    # A spike is an incident, and no failure.
    (run / "incidents" / "step-3").mkdir()
    spike = json.loads(first.read_text()) | {"kind": "spike", "step": 3}
    (run / "incidents" / "step-3" / "incident.json").write_text(json.dumps(spike))
    assert lab("book")([*ARGUMENTS]) == 0
    single = SingleRun(folder=folder)
    assert (folder / "incident.json").read_bytes() == first.read_bytes()
    words = single.words
    assert words["failed"] == words["by_router_underflow"] == 1
    assert words["first_nonfinite"] == json.loads(first.read_text())["step"]
    assert words["grad_norm_before"] == max(
        row["grad_norm"] for row in single.curve if row["step"] < words["first_nonfinite"]
    )
    assert f"first at step {words['first_nonfinite']}" in (folder / FIGURE).read_text()


def test_what_has_not_been_run_has_no_page_and_is_not_brought_in(folder, capsys):
    described(folder, PACE)
    assert lab("book")(["paths.book=experiments"]) == 0
    assert not (folder / "README.md").exists()
    with pytest.raises(UndecidedError, match="whole has not been run"):
        _ = SingleRun(folder=folder).curve
    capsys.readouterr()
    assert lab("book")([*ARGUMENTS]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert lab("reproduce")([*ARGUMENTS, "plan=true"]) == 2
    assert "studies=whole: is a single large run" in capsys.readouterr().err


DAMAGED = {
    "run.yaml": ("[", "", "arguments: text", "arguments: [study=another]"),
    "results.csv": ("", "step,loss\n", "step,loss\n1,x\n", "loss\n1.0\n"),
    "incident.json": ("{", "{}", "[]"),
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts]
)
def test_a_damaged_file_is_one_line(name, text, folder, capsys):
    described(folder, PACE)
    (folder / "results.csv").write_text("step,loss,grad_norm\n1,2.0,1.0\n")
    (folder / name).write_text(text)
    assert lab("book")(["paths.book=experiments"]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1
