"""What stability options change outside their own fields."""

from collections.abc import Sequence
from typing import Any

from src.checkpoint.rebuild import kinds_of
from src.common.errors import InputError
from src.common.nested_values import replaced, value_at
from src.common.override_grammar import Override
from src.stability import RemedyConfig


def apply_remedy_overrides(
    parts: dict[str, Any], remedies: dict[str, RemedyConfig], typed: Sequence[Override]
) -> list[str]:
    """Sets what the options claim; two claims on one field, or a typed one, are an error.

    Returns:
        Notes on options that change nothing.
    """
    owner: dict[str, str] = {}
    before = dict(parts)
    for option, remedy in remedies.items():
        for needed in (*remedy.needs(), *remedy.config_overrides(before)):
            if not _has_field(before, needed):
                section = needed.partition(".")[0]
                kind = kinds_of(before["attention"], before["ffn"])[section]
                raise InputError(
                    f"stability={option}: needs {needed}, which {section}={kind} has not"
                )
        for field, value in remedy.config_overrides(before).items():
            if field in owner:
                raise InputError(
                    f"stability=[{owner[field]},{option}]: both set {field}; choose one of them"
                )
            for override in typed:
                if override.key == field:
                    raise InputError(
                        f"{field}={override.text}: stability={option} sets it to {value};"
                        " leave one of the two out"
                    )
            owner[field] = option
            section, _, path = field.partition(".")
            try:
                parts[section] = replaced(parts[section], path.split("."), value)
            except ValueError as error:
                raise InputError(f"stability={option}: {section}.{error}") from error
    reasons = {}
    for option, remedy in remedies.items():
        try:
            remedy.check(parts)
        except ValueError as error:
            raise InputError(f"stability.{option}.{error}") from error
        # A claim is compared with what stood there; anything else with what stands there now.
        reasons[option] = remedy.no_op(before if remedy.config_overrides(before) else parts)
    return [
        f"stability={option} changes nothing here: {reason}"
        for option, reason in reasons.items()
        if reason is not None
    ]


def _has_field(parts: dict[str, Any], dotted: str) -> bool:
    try:
        value_at(parts, dotted)
    except AttributeError:
        return False
    return True
