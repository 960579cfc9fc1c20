import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from tests.runs import metrics, train, weights


def test_clip03_claims_the_bound_and_nothing_else():
    plain, clipped = compose("train", []), compose("train", ["stability=clip03"])
    assert plain.recipe.clip_norm == 1.0
    assert clipped.recipe.clip_norm == 0.3
    one, two = plain.plain(), clipped.plain()
    assert two["recipe"] == one["recipe"] | {"clip_norm": 0.3}
    assert {
        k: v for k, v in one.items() if k not in ("recipe", "stability", "choices", "arguments")
    } == {k: v for k, v in two.items() if k not in ("recipe", "stability", "choices", "arguments")}


def test_clip05_is_the_looser_one():
    assert compose("train", ["stability=clip05"]).recipe.clip_norm == 0.5


def test_the_bound_can_be_typed():
    config = compose("train", ["stability=clip03", "stability.clip03.norm=0.4"])
    assert config.recipe.clip_norm == 0.4
    assert config.variant_name.endswith("@norm-0.4")


def test_a_typed_bound_and_the_option_are_an_error():
    with pytest.raises(InputError, match=r"recipe.clip_norm=0.5: stability=clip03 sets it to 0.3"):
        compose("train", ["stability=clip03", "recipe.clip_norm=0.5"])


def test_it_acts_and_says_how_often(tiny):
    plain = train(tiny, "stability=none")
    clipped = train(tiny, "stability=clip03")
    assert not torch.equal(
        weights(plain)["model.head.weight"], weights(clipped)["model.head.weight"]
    )
    assert metrics(plain)[0]["grad/norm"] == metrics(clipped)[0]["grad/norm"]
    fracs = [sum(line["grad/clip_frac"] for line in metrics(run)) for run in (plain, clipped)]
    assert fracs[1] > fracs[0]


def test_off_is_bitwise_absent(tiny):
    """The option at the baseline's bound is the baseline."""
    plain = train(tiny, "stability=none")
    same = train(tiny, "stability=clip03", "stability.clip03.norm=1.0")
    assert metrics(plain) == metrics(same)
