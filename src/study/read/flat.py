"""The fields of a configuration by their dotted names."""

from collections.abc import Mapping, Sequence
from typing import Any


def flat(config: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """Every field of some sections, as `recipe.betas`; a section that is missing has none."""
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        else:
            found[name] = value

    for section in sections:
        if section in config:
            walk(section, config[section])
    return found
