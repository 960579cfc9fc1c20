"""What a conversion would lose is refused before anything is computed."""

import re
from dataclasses import replace

import pytest

from src.common.errors import InputError
from src.config.field_roles import OFF
from src.conversion.conversion_plan import EXPERTS, LATENT, plan
from src.conversion.llama_weights import llama_config
from src.model.architecture import ModelParts
from src.model.ffn.mlp import MLPConfig
from tests.builders import gqa_config, model_config, router_config

ON = {
    "attention.gated": True,
    "attention.softcap": 30.0,
    "ffn.swiglu_limit": 7.0,
    "model.head_softcap": 30.0,
}
"""Fields that are off by default, of models with gqa and mlp."""


@pytest.mark.parametrize("field", sorted(OFF))
def test_what_no_converted_layer_can_have_is_refused(field):
    parts = ModelParts(
        model=model_config(), attention=gqa_config(), ffn=MLPConfig(inner_dim=32), seq_len=16
    )
    if field == "ffn.router.softcap":
        # Only a mixture of experts has it, which is neither converted nor written for Llama.
        return
    section, name = field.split(".")
    on = replace(parts, **{section: replace(getattr(parts, section), **{name: ON[field]})})
    message = re.escape(f"{field}={ON[field]}")
    with pytest.raises(InputError, match=rf"^to=hf: .* have no {message}"):
        llama_config(on, end_ids=())
    given, router = dict.fromkeys((*LATENT, *EXPERTS, "attention", "ffn")), router_config()
    for wanted in ({"attention": "mlha"}, {"ffn": "moe", "inner_dim": 16, "num_routed": 2}):
        with pytest.raises(InputError, match=rf"^source: has {message}, which"):
            plan(on, given | wanted, router=router)
    # Without a conversion the copy has everything that the source has.
    assert plan(on, given, router=router).target == on
