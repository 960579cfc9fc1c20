import pytest
import torch

from src.config.compose import compose
from src.training.loss import losses
from tests.builders import tokens, transformer
from tests.stability.harnessed import figure, first_difference, runs


def test_the_term_is_the_squared_log_partition():
    model, inputs = transformer(), tokens()
    expected = 0.5 * model(inputs).logsumexp(-1).square().mean()
    found = losses(model, inputs, inputs, z_loss_weight=0.5)
    torch.testing.assert_close(found["z_loss"], expected)
    assert set(losses(model, inputs, inputs, z_loss_weight=0.0)) == {"loss"}


def test_z_loss_acts_and_stands_beside_the_cross_entropy(tiny):
    assert compose("train", ["stability=z_loss"]).recipe.z_loss_weight == 1e-4
    plain, treated = runs(tiny, "z_loss", "recipe.precision=32-true")
    # The first step's cross-entropy is the baseline's; its gradient is not.
    assert first_difference(plain, treated) == 1
    assert figure(plain, "train/loss")[1] == figure(treated, "train/loss")[1]
    assert figure(treated, "train/z_loss")[1] == pytest.approx(1e-4 * 4.1**2, rel=0.2)
    assert figure(plain, "train/z_loss") == {}
