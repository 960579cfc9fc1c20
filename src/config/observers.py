"""Options that look on without being part of a run: observe={<option>: {<its fields>}}."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import omegaconf.errors
from omegaconf import OmegaConf

from src.common.errors import InputError
from src.stability import REMEDIES, RemedyConfig


def observers_of(values: Any, remedies: Mapping[str, RemedyConfig]) -> dict[str, RemedyConfig]:
    """The options that look on, from {name: fields}."""
    allowed = [name for name, kind in REMEDIES.items() if kind.is_passive]
    observers: dict[str, RemedyConfig] = {}
    if values is not None and not isinstance(values, Mapping):
        raise InputError(f"observe={values}: must be {{<option>: {{<its fields>}}}}")
    for name, fields in (values or {}).items():
        if name not in allowed:
            raise InputError(f"observe={name}: must be one of {', '.join(allowed)}")
        if name in remedies:
            raise InputError(f"observe={name}: stability={name} is on already; choose one of them")
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
