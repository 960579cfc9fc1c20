"""Remedies in a configuration: the fields they set elsewhere, and those that only observe."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import omegaconf.errors
from omegaconf import OmegaConf

from src.checkpoint.rebuild import kinds_of
from src.common.errors import InputError
from src.common.nested_values import replaced, value_at
from src.common.override_grammar import Override
from src.common.read_checkpoint import EXTERNAL
from src.stability import REMEDIES, RemedyConfig


def apply_remedy_overrides(
    parts: dict[str, Any], remedies: dict[str, RemedyConfig], typed: Sequence[Override]
) -> list[str]:
    """Applies `config_overrides` of all remedies to `parts`, in place.

    Returns:
        A note for each remedy that has no effect in this configuration.

    Raises:
        InputError: a remedy needs a field that the model lacks, two remedies set the same field, or
            a remedy sets a field that was typed, or does not fit the configuration.
    """
    owner: dict[str, str] = {}
    before = dict(parts)
    for name, remedy in remedies.items():
        for needed in (*remedy.needs(), *remedy.config_overrides(before)):
            if not _has_field(before, needed):
                section = needed.partition(".")[0]
                # Of the kinds of models, only an external one lacks a field.
                kinds = {"model": EXTERNAL, **kinds_of(before["attention"], before["ffn"])}
                kind = kinds[section]
                raise InputError(f"stability={name}: needs {needed}, which {section}={kind} lacks")
        for field in (*remedy.replaces(), *remedy.config_overrides(before)):
            if field in owner:
                raise InputError(
                    f"stability=[{owner[field]},{name}]: both set {field}; choose one of them"
                )
            owner[field] = name
        for field, value in remedy.config_overrides(before).items():
            for override in typed:
                if override.key == field:
                    raise InputError(
                        f"{field}={override.text}: stability={name} sets it to {value};"
                        " leave one of the two out"
                    )
            section, _, path = field.partition(".")
            try:
                parts[section] = replaced(parts[section], path.split("."), value)
            except ValueError as error:
                raise InputError(f"stability={name}: {section}.{error}") from error
    reasons = {}
    for name, remedy in remedies.items():
        try:
            remedy.check(parts)
        except InputError:
            # The value that does not fit is not one of the remedy's own.
            raise
        except ValueError as error:
            raise InputError(f"stability.{name}.{error}") from error
        # A remedy's overrides are compared with the values before they were applied; otherwise
        # every override would look like no change.
        reasons[name] = remedy.no_op(before if remedy.config_overrides(before) else parts)
    return [
        f"stability={name} changes nothing here: {reason}"
        for name, reason in reasons.items()
        if reason is not None
    ]


def observers_of(values: Any, remedies: Mapping[str, RemedyConfig]) -> dict[str, RemedyConfig]:
    """The remedies that a run carries without being treated by them.

    Args:
        values: the field `observe`: {<remedy>: {<its fields>}}; None: none.
        remedies: those that the run is treated by.

    Raises:
        InputError: a name or a field is wrong, or a remedy is not passive.
    """
    allowed = [name for name, kind in REMEDIES.items() if kind.is_passive]
    observers: dict[str, RemedyConfig] = {}
    if values is not None and not isinstance(values, Mapping):
        raise InputError(f"observe={values}: must be {{<remedy>: {{<its fields>}}}}")
    for name, fields in (values or {}).items():
        if name not in allowed:
            raise InputError(f"observe={name}: must be one of {', '.join(allowed)}")
        if name in remedies:
            raise InputError(f"observe={name}: stability={name} is already on; choose one of them")
        known = {field.name for field in dataclasses.fields(REMEDIES[name])}
        if not isinstance(fields, Mapping) or set(fields) != known:
            raise InputError(
                f"observe.{name}={fields}: must have the fields {', '.join(sorted(known))}"
            )
        try:
            node = OmegaConf.merge(OmegaConf.structured(REMEDIES[name]), fields)
            observers[name] = cast(RemedyConfig, OmegaConf.to_object(node))
        except omegaconf.errors.OmegaConfBaseException as error:
            raise InputError(f"observe.{name}: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            raise InputError(f"observe.{name}.{error}") from error
    return observers


def _has_field(parts: dict[str, Any], dotted: str) -> bool:
    try:
        value_at(parts, dotted)
    except AttributeError:
        return False
    return True
