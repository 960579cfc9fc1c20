import pytest

from src.config.compose import compose
from tests.stability.harnessed import figure, first_difference, runs


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_qk_norm_sets_the_field_for_both_attentions(attention):
    assert compose("train", [f"attention={attention}", "stability=qk_norm"]).attention.qk_norm
    assert not compose("train", [f"attention={attention}"]).attention.qk_norm


def test_it_acts_from_the_first_step(tiny):
    plain, treated = runs(tiny, "qk_norm")
    assert first_difference(plain, treated) == 1
    # One norm on queries and one on keys, in the one layer.
    assert set(figure(treated, "stability/qk_norm_modules").values()) == {2.0}
    assert figure(plain, "stability/qk_norm_modules") == {}
