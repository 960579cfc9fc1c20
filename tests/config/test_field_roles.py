"""One table says what each field means for the hash, the folder, MLflow, branches and sweeps."""

import dataclasses

import pytest

from src.common.nested_values import replaced, value_at
from src.config.compose import compose
from src.config.field_roles import OFF, ROLES, role_of, set_by, switched_on, without_off
from src.config.schema import DescribeSchema
from src.config.variant_name import Variant


def value(parts, dotted):
    for name in dotted.split("."):
        parts = parts[name]
    return parts


def test_every_row_names_a_field_that_exists():
    config = compose("train", [])
    plain = config.plain() | {"notes": [], "config_hash": ""}
    known = {field.name for field in dataclasses.fields(DescribeSchema)}
    for field in sorted(set(ROLES) - {"model.source"}):  # only external models have a source
        if field.partition(".")[0] in plain:
            value(plain, field)
        else:
            assert field in known, field


def test_a_field_has_the_role_of_its_section_unless_it_has_its_own():
    assert role_of("tracking.uri") is ROLES["tracking"]
    assert role_of("recipe.checkpoint_every") is not role_of("recipe.batch_size")
    assert role_of("model.init_std").is_hashed


@pytest.mark.parametrize(
    ("typed", "is_hashed", "is_named"),
    [
        ("recipe.batch_size=8", True, True),
        ("recipe.checkpoint_every=7", False, False),
        ("trainer.threads=2", True, True),
        ("watch.routers_every=3", False, False),
        ("model.sizes.kv_latent_dim=16", True, True),
        ("model.sizes.writeup_bias_rate=9.0", False, True),
        ("seed=3", True, False),
        ("study=other", False, False),
    ],
)
def test_hash_and_name_follow_the_table(typed, is_hashed, is_named):
    plain, other = compose("train", []), compose("train", [typed])
    assert (plain.config_hash() != other.config_hash()) == is_hashed
    assert (plain.variant_name != other.variant_name) == is_named


def test_a_field_that_is_off_is_absent_and_one_that_is_on_is_not():
    config = compose("train", [])
    parts = {name: getattr(config, name) for name in ("model", "attention", "ffn")}
    assert switched_on(parts) is None
    for field, off in OFF.items():
        assert value_at(parts, field) == off
        *above, name = field.split(".")
        assert name not in value(config.plain(), ".".join(above)), field
    router = {"router": {"softcap": 3.0, "norm_eps": 0.0}, "top_k": 2}
    assert without_off("ffn", router) == router
    assert without_off("ffn", {"router": {"softcap": None}}) == {"router": {}}
    on = replaced(config.ffn, ["router", "softcap"], 3.0)
    assert switched_on({**parts, "ffn": on}) == "ffn.router.softcap=3.0"


def test_a_choice_sets_the_sections_that_say_so():
    assert {"recipe", "data", "tokenizer"} <= set(set_by("preset"))
    assert "recipe" not in set_by("model")
    assert {field.name for field in dataclasses.fields(Variant)} >= {"model", "preset"}
