"""What the checks of values before PyTorch know about a field is what its dataclass says."""

from typing import get_args

import pytest
from omegaconf import OmegaConf

import src.config.schema  # noqa: F401  registers the dataclasses
from src.cli.value_checks import OTHER_KINDS, check_kinds, check_values
from src.common.errors import InputError
from src.common.nested_values import leaves
from src.config.field_names import fields_of
from src.config.hydra_compose import composed_config, option_names
from src.train import main

GROUPS = ("attention", "ffn", "stability", "model", "data", "tokenizer", "trainer", "tracking")
OPTIONS = [f"{group}={option}" for group in GROUPS for option in option_names(group)]


@pytest.mark.parametrize("option", [o for o in OPTIONS if not o.endswith("=external")])
def test_a_default_is_of_the_kind_of_its_field(option):
    """Otherwise a value that the dataclass takes would be refused, or the line would be wrong."""
    composed = composed_config("train", [option])
    wrong = []
    for field, value in leaves(fields_of("train", [option])):
        section, _, name = field.rpartition(".")
        parent = OmegaConf.select(composed, section) if section else composed
        if type(value) not in (bool, int, float) or OmegaConf.get_type(parent) is dict:
            continue
        node = parent._get_node(name)
        kind = node._metadata.ref_type
        kinds = [k for k in get_args(kind) if k is not type(None)] or [kind]
        if kinds != [type(value)] and field not in OTHER_KINDS:
            wrong.append((field, value, kind))
    assert wrong == []


@pytest.mark.parametrize(
    "argument",
    [
        *("seed=3", "rerun=yes", "compile=auto", "recipe.max_steps=7", "recipe.clip_norm=null"),
        *("ffn.top_k=1", "attention.rope_dim=${model.sizes.gqa_rope_dim}", "data.val_frac=1e-1"),
        *("recipe.learning_rate=1", "model.head_dim=8", "watch.gradients_every=null"),
    ],
)
def test_what_a_field_takes_passes(argument):
    check_values(fields_of("train", []), [argument])


def test_all_values_of_a_sweep_are_looked_at_and_fields_of_other_options_left_alone():
    fields = fields_of("train", ["attention=gqa"])
    check_kinds(fields, ["attention.q_latent_dim=x", "seed=1"])
    with pytest.raises(InputError, match="seed=x: must be an integer"):
        check_kinds(fields, ["seed=1", "seed=x"])


def test_a_missing_value_says_what_to_type(capsys):
    for line, what in (
        ("data=text", "type data.path=FILE"),
        ("model=external", "type model.target=package.module:callable"),
        ("tokenizer=checkpoint", "type tokenizer.path=RUN_FOLDER"),
    ):
        assert main([line]) == 2
        assert f"has no value; {what}\n" in capsys.readouterr().err
