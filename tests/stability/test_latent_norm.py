import pytest

from src.common.errors import InputError
from src.config.compose import compose
from tests.stability.harnessed import figure, first_difference, runs


def test_latent_norm_acts_from_the_first_step(tiny):
    assert compose("train", ["stability=latent_norm"]).attention.latent_norm
    plain, treated = runs(tiny, "latent_norm")
    assert first_difference(plain, treated) == 1
    assert set(figure(treated, "stability/latent_norm_modules").values()) == {2.0}


def test_an_attention_without_latents_is_refused_by_name():
    with pytest.raises(InputError, match=r"needs attention.latent_norm, which attention=gqa"):
        compose("train", ["attention=gqa", "stability=latent_norm"])
