import pytest
import torch

from src.config.compose import compose
from src.stability.adam_eps import AdamEpsConfig
from tests.runs import assert_same_tree, last_checkpoint
from tests.stability.harnessed import figure, first_difference, runs


def test_adam_eps_changes_the_epsilon_alone():
    plain, treated = compose("train", []), compose("train", ["stability=adam_eps"])
    assert plain.recipe.eps == 1e-8
    assert treated.recipe.eps == 1e-15
    treated.recipe.eps = plain.recipe.eps
    assert treated.recipe == plain.recipe
    assert treated.notes == []


def test_at_the_baselines_own_value_it_says_that_it_changes_nothing():
    notes = compose("train", ["stability=adam_eps", "stability.adam_eps.eps=1e-8"]).notes
    assert notes == ["stability=adam_eps changes nothing here: recipe.eps is 1e-08 already"]


@pytest.mark.parametrize("eps", [0.0, 1.0, -1e-8, float("nan")])
def test_a_value_that_is_no_epsilon_is_refused(eps):
    with pytest.raises(ValueError, match="eps="):
        AdamEpsConfig(eps=eps)


def test_it_acts_in_every_group(tiny):
    plain, treated = runs(
        tiny, "adam_eps", "stability.adam_eps.eps=1e-3", "recipe.decay_params=matrices"
    )
    # The first step's loss is that of the initial weights.
    assert first_difference(plain, treated) == 1
    assert figure(plain, "train/loss")[1] == figure(treated, "train/loss")[1]
    assert figure(plain, "train/loss")[2] != figure(treated, "train/loss")[2]
    assert set(figure(treated, "stability/adam_eps_value").values()) == {1e-3}
    groups = last_checkpoint(treated)["optimizer_states"][0]["param_groups"]
    assert len(groups) == 2
    assert {group["eps"] for group in groups} == {1e-3}


def test_set_to_the_recipes_own_value_training_is_bitwise_the_baseline(tiny):
    plain, treated = runs(tiny, "adam_eps", "stability.adam_eps.eps=1e-8")
    one, two = last_checkpoint(plain), last_checkpoint(treated)
    for name in ("state_dict", "optimizer_states"):
        assert_same_tree(one[name], two[name])


def test_the_update_is_the_papers():
    """One step by torch and by the equation, with an epsilon that matters."""
    torch.manual_seed(0)
    gradient, eps, rate = torch.randn(5) * 1e-3, 1e-3, 0.1
    weight = torch.nn.Parameter(torch.zeros(5))
    weight.grad = gradient.clone()
    torch.optim.AdamW([weight], lr=rate, eps=eps, weight_decay=0.0).step()
    # After one step the bias-corrected moments are g and g^2.
    expected = -rate * gradient / (gradient.abs() + eps)
    torch.testing.assert_close(weight.detach(), expected)
