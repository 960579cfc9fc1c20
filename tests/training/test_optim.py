import pytest
import torch

from src.training.task import parameter_groups
from tests.builders import moe_config, router_config, transformer


@pytest.mark.parametrize("decay_params", ["all", "matrices"])
def test_every_trainable_parameter_is_in_exactly_one_group(decay_params):
    model = transformer(
        ffn=moe_config(router=router_config(bias_trainable=True, bias_use="multiply"))
    )
    model.embedding.weight.requires_grad_(False)
    groups = parameter_groups(model.parameters(), weight_decay=0.1, decay_params=decay_params)
    grouped = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(trainable)
    assert {id(p) for p in grouped} == {id(p) for p in trainable}


def test_matrices_alone_decay_where_asked():
    weight, gain = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = parameter_groups([weight, gain], weight_decay=0.1, decay_params="matrices")
    assert [(g["params"], g["weight_decay"]) for g in groups] == [([weight], 0.1), ([gain], 0.0)]
    (group,) = parameter_groups([weight, gain], weight_decay=0.1, decay_params="all")
    assert group["params"] == [weight, gain]
