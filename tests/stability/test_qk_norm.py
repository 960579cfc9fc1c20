import pytest

from src.config import compose
from tests.stability.harnessed import first_difference, runs


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_qk_norm_sets_the_field_for_both_attentions(attention):
    assert compose("train", [f"attention={attention}", "stability=qk_norm"]).attention.qk_norm
    assert not compose("train", [f"attention={attention}"]).attention.qk_norm


def test_it_acts_from_the_first_step(tiny):
    assert first_difference(*runs(tiny, "qk_norm")) == 1
