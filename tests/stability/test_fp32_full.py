import torch

from src.config.compose import compose
from tests.runs import train, weights
from tests.stability.harnessed import PACE, figure, first_difference, runs


def test_stability_fp32_full_is_the_run_that_was_float32_from_the_start(tiny):
    plain, treated = runs(tiny, "fp32_full")
    assert first_difference(plain, treated) == 1
    assert set(figure(treated, "stability/fp32_full_active").values()) == {1.0}
    typed = train(tiny, *PACE, "recipe.precision=32-true")
    assert all(torch.equal(weights(typed)[n], w) for n, w in weights(treated).items())


def test_it_claims_precision_and_exact_products():
    config = compose("train", ["stability=fp32_full", "recipe.max_steps=9"])
    assert (config.recipe.precision, config.recipe.matmul_precision) == ("32-true", "highest")
    on_float32 = compose("train", ["stability=fp32_full", "preset=stress"])
    assert "changes nothing" in on_float32.notes[0]
