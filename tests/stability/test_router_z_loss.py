import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from tests.builders import DIMS, moe_config, router_config
from tests.stability.harnessed import figure, first_difference, runs


def test_the_term_is_the_squared_log_partition_of_the_gate():
    router = moe_config(router=router_config(z_loss_weight=2.0)).build(DIMS).router
    torch.nn.init.normal_(router.weight)
    x_SD = torch.randn(9, DIMS.hidden_dim)
    router(x_SD)
    expected = 2.0 * (x_SD @ router.weight.T).logsumexp(-1).square().mean()
    torch.testing.assert_close(router.take_extra_losses()["router_z_loss"], expected)
    assert router.take_extra_losses() == {}


def test_router_z_loss_acts_and_is_logged(tiny):
    plain, treated = runs(tiny, "router_z_loss")
    assert first_difference(plain, treated) == 1
    assert figure(treated, "train/router_z_loss")[1] > 0


def test_it_needs_a_router():
    with pytest.raises(InputError, match=r"needs ffn.router.z_loss_weight, which ffn=mlp lacks"):
        compose("train", ["ffn=mlp", "stability=router_z_loss"])
