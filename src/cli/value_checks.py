"""Checks of values before PyTorch is imported: missing ones, and the kinds of numbers and switches.

What a field takes is known here from its default in conf/, whose kind is that of the dataclass, and
for the recipe from the dataclass itself, which also knows the range.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from src.common.errors import InputError
from src.common.nested_values import leaves
from src.common.override_grammar import GROUPS, parse_all
from src.config.field_roles import set_by
from src.config.hydra_compose import check_integers
from src.training.recipe import RecipeConfig

MISSING = "???"

EXAMPLES = {
    "data.path": "FILE",
    "model.target": "package.module:callable",
    "tokenizer.path": "RUN_FOLDER",
    "tokenizer.vocab_size": "<number>",
}
"""What to type for fields that have no default."""

KINDS: dict[Any, str] = {
    int: "must be an integer",
    float: "must be a number",
    bool: "must be true or false",
    str: "must be text",
    list: "must be a list, such as [a,b]",
    dict: "must be {name: value}",
}
"""What to type, by the type of a field."""

OTHER_KINDS = ("compile",)
"""Fields whose default says less than their check: compile takes auto, too."""

SWITCHES = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")

REPLICATES = ("seed", "repeat")


def missing_value(field: str) -> InputError:
    """The error for a field without a default that was not typed."""
    return InputError(f"{field}: has no value; type {field}={EXAMPLES.get(field, '<value>')}")


def check_values(fields: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raises InputError for a number or switch of the wrong kind, or a value that is missing.

    Args:
        fields: those of `fields_of` for the arguments.
        arguments: those of one run.

    Raises:
        Exceptions of OmegaConf about the recipe, which `readable` turns into one line.
    """
    overrides = parse_all(arguments)
    typed = [o.key_or_group for o in overrides if o.key_or_group not in GROUPS]
    defaults = dict(leaves(fields))
    from_init = set_by("init") if "init" in typed else []
    for field, default in defaults.items():
        is_given = any(field == key or field.startswith(f"{key}.") for key in (*typed, *from_init))
        if default == MISSING and not is_given:
            raise missing_value(field)
    check_kinds(fields, arguments)


def check_kinds(fields: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """The part of `check_values` that looks at each argument alone.

    Args:
        fields: the composed fields of one run.
        arguments: those of one run or of several; what `fields` lacks is left out.
    """
    defaults = dict(leaves(fields))
    schema = OmegaConf.create({"recipe": OmegaConf.structured(RecipeConfig)})
    recipe = OmegaConf.merge(schema, {"recipe": fields.get("recipe", {})})
    for argument, override in zip(arguments, parse_all(arguments), strict=True):
        field, value = override.key_or_group, override.value()
        check_integers(value, field)
        section, _, name = field.partition(".")
        if section == "recipe" and name:
            _check_recipe(recipe, name, value)
        elif field in defaults and field not in OTHER_KINDS:
            reason = _wrong_kind(_default(field, defaults), value)
            if reason is not None:
                hint = what_to_type(reason, field, argument.partition("=")[2])
                raise InputError(f"{argument}: {reason}{hint}")
        if field in REPLICATES and isinstance(value, int) and value < 0:
            raise InputError(f"{field}={value}: must be at least 0")


def _check_recipe(recipe: Any, name: str, value: Any) -> None:
    """Sets a field of the recipe and checks all of it, as `compose` does.

    Raises:
        InputError: a value is out of its range.
        Exceptions of OmegaConf: a value is of the wrong kind.
    """
    merged = OmegaConf.merge(recipe, {"recipe": {name: value}})
    try:
        OmegaConf.to_object(merged.recipe)
    except ValueError as error:
        # OmegaConf's own errors are subclasses of ValueError.
        if type(error) is not ValueError:
            raise
        raise InputError(f"recipe.{error}") from error


def _default(field: str, defaults: Mapping[str, Any]) -> Any:
    """The default of a field, which may be that of another: ${model.sizes.top_k}."""
    value = defaults.get(field)
    other = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return value if other is None else _default(other[1], defaults)


def _wrong_kind(default: Any, value: Any) -> str | None:
    """What a field with this default takes, if it does not take the value; None if it may."""
    text = str(value)
    # A reference to another field is resolved later, and null may be allowed.
    if value is None or "${" in text:
        return None
    fits = {
        bool: text.lower() in SWITCHES or type(value) is int,
        int: re.fullmatch(r"[+-]?\d+(_\d+)*", text.strip()) is not None,
        float: _is_number(text),
    }
    kind = type(default)
    return None if fits.get(kind, True) else KINDS[kind]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def what_to_type(reason: str, field: str, value: str) -> str:
    """What to type in place of a value of the wrong kind, where the value tells it; else empty.

    Args:
        reason: one of KINDS.
        field: dotted.
        value: as typed.
    """
    if not value:
        return "; type a value after ="
    # The only list of fractions, recipe.betas, needs two of them.
    if reason == KINDS[list] and not re.fullmatch(r"\d*\.\d+", value):
        return f"; type {field}=[{value}]"
    if reason in (KINDS[int], KINDS[float]) and value.startswith("["):
        return f"; to run each, type --multirun {field}={value.strip('[]').replace(' ', '')}"
    if reason == KINDS[int] and re.fullmatch(r"\d{1,9}(\.\d*)?(e\d)?", value, re.IGNORECASE):
        whole = float(value)
        return f"; type {field}={int(whole)}" if whole.is_integer() else ""
    return ""
