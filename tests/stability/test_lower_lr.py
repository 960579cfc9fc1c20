import pytest

from tests.stability.harnessed import figure, first_difference, runs


def test_stability_lower_lr_multiplies_every_rate(tiny):
    plain, lower = runs(tiny, "lower_lr", "recipe.learning_rate=0.004")
    assert first_difference(plain, lower) == 1
    base, rates = figure(plain, "lr"), figure(lower, "lr")
    assert {s: rates[s] / base[s] for s in base} == pytest.approx(dict.fromkeys(base, 0.3))
    assert set(figure(lower, "stability/lower_lr_factor").values()) == {0.3}
