from src.common import terminal
from src.training.progress import ProgressBar
from tests.training.harness import Harness, recipe_config


def test_the_bar_shows_the_figures_that_matter(monkeypatch):
    shown = []
    monkeypatch.setattr(
        terminal.StepProgress, "update", lambda self, step, figures: shown.append((step, figures))
    )
    run = Harness(recipe=recipe_config(max_steps=2))
    latest = {"train/loss": 3.21, "grad/norm": 0.987, "speed/tokens_per_second": 12345.6}
    run.callbacks = [ProgressBar(latest=latest, guard=run.step_guard, max_steps=2)]
    run.fit()
    figures = {"loss": "3.21", "grad": "0.987", "skipped": "0", "tok/s": "12,346"}
    assert shown == [(1, figures), (2, figures)]


def test_nothing_is_printed_where_nobody_looks(capsys):
    run = Harness(recipe=recipe_config(max_steps=2))
    run.callbacks = [ProgressBar(latest={}, guard=run.step_guard, max_steps=2)]
    run.fit()
    assert capsys.readouterr().out == ""
