import pytest

from src.common.errors import InputError
from src.config.compose import compose
from tests.runs import metrics, record
from tests.stability.harnessed import first_difference, runs


def test_stability_early_stop_ends_after_exactly_the_step_and_is_the_baseline_until_then(tiny):
    plain, stopped = runs(tiny, "early_stop", "recipe.schedule=linear")
    assert first_difference(plain, stopped) is None
    made = record(stopped)
    assert made["steps"] == 14  # round(7/11 * 22)
    assert (made["status"], made["outcome"]) == ("finished", "clean")
    last = metrics(stopped)[-1]
    assert last["stability/early_stop_step"] == last["step"] == 14
    # It is validated where it stops, planned or not.
    assert "val/loss" in last


def test_the_last_line_is_whole_between_two_logged_steps(tiny):
    _, stopped = runs(tiny, "early_stop", "recipe.log_every=10")
    last = metrics(stopped)[-1]
    assert last["step"] == 14
    assert {"guard/skipped", "grad/norm", "train/loss", "val/loss"} <= set(last)


def test_stopping_before_the_first_step_is_refused():
    with pytest.raises(InputError, match=r"stability.early_stop.stop_frac=0.0: must be above 0"):
        compose("train", ["stability=early_stop", "stability.early_stop.stop_frac=0"])
