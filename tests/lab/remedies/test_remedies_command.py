"""`python -m src.lab remedies` on a small book, whose runs are trained here."""

import pytest
import yaml
from joblib.externals.loky import get_reusable_executor

from src.lab.__main__ import main

SHORT = [
    "recipe.max_steps=6",
    "recipe.batch_size=2",
    "recipe.seq_len=16",
    "recipe.num_validations=1",
    "recipe.val_windows=4",
    "model.num_layers=1",
]

FAILURE = {
    "shows_as": "loss",
    "says": "It starts too fast.",
    "reports": "nowhere",
    "arguments": ["preset=no_warmup", *SHORT],
    "healthy": ["recipe.warmup_frac=0.5"],
}

PLAN = {
    "failures": ["fast_start"],
    "remedies": ["clip03"],
    "seeds": "0,1",
    "short": [],
    "family": "baseline",
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A book with the results of one failure and one remedy."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.chdir(home)
        # Workers that a test before this one has left stand in its folder.
        get_reusable_executor().shutdown()
        study = home / "book" / "remedies"
        (study / "failures").mkdir(parents=True)
        (study / "study.yaml").write_text(yaml.safe_dump(PLAN))
        (study / "failures" / "fast_start.yaml").write_text(yaml.safe_dump(FAILURE))
        assert main(["reproduce", "paths.book=book"]) == 0
        assert main(["book", "paths.book=book", "studies=remedies"]) == 0
        yield home
        get_reusable_executor().shutdown()


@pytest.mark.slow
def test_a_remedy_that_is_added_is_trained_on_each_failure(book, monkeypatch, capsys):
    monkeypatch.chdir(book)
    assert main(["remedies", "paths.book=book", "add=lower_lr", "plan=true"]) == 0
    assert "8 runs" in " ".join(capsys.readouterr().out.split())
    assert main(["remedies", "paths.book=book", "add=lower_lr"]) == 0
    table = capsys.readouterr().out
    assert "what lower_lr does to each failure" in table
    # Its place among the remedies that the book knows, of which there is one.
    assert "of 2" in table
    assert "clip03" in table


@pytest.mark.slow
def test_a_failure_that_is_added_is_trained_with_each_remedy(book, monkeypatch, capsys):
    monkeypatch.chdir(book)
    mine = FAILURE | {"says": "It starts much too fast.", "healthy": ["recipe.warmup_frac=0.9"]}
    (book / "mine.yaml").write_text(yaml.safe_dump(mine))
    assert main(["remedies", "paths.book=book", "add=mine.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "mine: It starts much too fast." in shown
    assert "clip03" in shown


@pytest.mark.slow
def test_the_book_is_shown_as_a_whole_and_by_failure(book, monkeypatch, capsys):
    monkeypatch.chdir(book)
    assert main(["remedies", "paths.book=book"]) == 0
    assert "fast_start" in capsys.readouterr().out
    assert main(["remedies", "paths.book=book", "failure=fast_start"]) == 0
    assert "It starts too fast." in capsys.readouterr().out


def test_a_remedy_that_is_added_is_not_tried_on_repeats(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "book" / "remedies"
    (study / "failures").mkdir(parents=True)
    plan = PLAN | {"failures": ["fast_start", "again"]}
    (study / "study.yaml").write_text(yaml.safe_dump(plan))
    again = FAILURE | {"repeats": "fast_start", "arguments": ["preset=dense", *SHORT]}
    for name, content in {"fast_start": FAILURE, "again": again}.items():
        (study / "failures" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert main(["remedies", "paths.book=book", "add=lower_lr", "plan=true"]) == 0
    # Of two seeds: untreated, A/A control, remedy, and healthy.
    assert "8 runs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["add=qk_nrm"], "qk_norm"),
        (["add=mine.yaml"], "mine.yaml: cannot be read"),
        (["failure=no_warm"], "no_warmup"),
        (["add=qk_norm", "failure=no_warmup"], "leave it out with add=qk_norm"),
        (["paths.book=nowhere"], "paths.book=nowhere: no such folder"),
    ],
)
def test_what_cannot_be_shown_or_added_is_told_in_one_line(
    tmp_path, monkeypatch, capsys, arguments, told
):
    monkeypatch.chdir(tmp_path)
    assert main(["remedies", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
