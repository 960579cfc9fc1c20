from src.config.compose import compose
from tests.stability.harnessed import figure, runs


def test_beta2_changes_the_second_decay_alone():
    config = compose("train", ["stability=beta2", "preset=hot"])
    assert compose("train", ["preset=hot"]).recipe.betas == [0.9, 0.999]
    assert config.recipe.betas == [0.9, 0.95]
    assert config.notes == []


def test_at_the_baselines_own_value_it_says_that_it_changes_nothing():
    notes = compose("train", ["stability=beta2"]).notes
    assert notes == ["stability=beta2 changes nothing here: recipe.betas is [0.9, 0.95] already"]


def test_it_acts(tiny):
    plain, treated = runs(tiny, "beta2", "stability.beta2.beta2=0.5")
    # AdamW's first step does not depend on its decays; the second does, and the third shows it.
    one, two = (figure(run, "train/loss") for run in (plain, treated))
    assert next(step for step in one if one[step] != two[step]) == 3
    assert set(figure(treated, "stability/beta2_value").values()) == {0.5}
