"""Options from the user's folder (--config-dir), which are treated by the values that they set."""

from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.common.errors import InputError
from src.common.nested_values import leaves
from src.common.override_grammar import Override, parse, value_text
from src.common.read_checkpoint import EXTERNAL
from src.config.hydra_compose import (
    CONF,
    choices_of,
    composed_config,
    is_own_option,
    option_names,
)

TYPED_GROUPS = ("model", "attention", "ffn", "data", "tokenizer")
"""Groups whose options name their dataclass, as schema, in the first lines of the file."""


def check_schemas(composed: DictConfig) -> None:
    """Raises InputError if an option's file does not name the dataclass that it configures."""
    choices = choices_of(composed)
    for group in TYPED_GROUPS:
        if OmegaConf.get_type(composed, group) is not dict:
            continue
        example = min({file.stem for file in (CONF / group).glob("*.yaml")} - {EXTERNAL})
        raise InputError(
            f"{group}={choices[group]}: the file must begin with defaults:"
            f" [/schema/{group}/<name>@_here_, _self_], as conf/{group}/{example}.yaml does"
        )


def fields_set_by_own_remedies(
    config_name: str, arguments: Sequence[str], composed: DictConfig
) -> list[Override]:
    """What the user's own files of remedies set, as if it had been typed.

    A run folder is named after its remedies, not after the files that turn them on, so that a value
    which is not the remedy's default must become part of the name.

    Args:
        config_name: the command's file in conf/.
        arguments: everything that `composed` was composed from.
        composed: the composed configuration.

    Raises:
        InputError: the user's file changes nothing.
    """
    # Hydra records no choice for a list of options.
    typed = [override.text for override in parse(arguments) if override.key == "stability"]
    chosen = str(choices_of(composed).get("stability", typed[-1] if typed else ""))
    if not any(is_own_option("stability", option) for option in chosen.strip("[]").split(",")):
        return []
    remedies = sorted(name for name, fields in composed.stability.items() if fields is not None)
    # The same run with each remedy as its own file has it.
    usual = [name for name in remedies if name in option_names("stability")]
    others = [a for a in arguments if not _is_of_absent(a, usual)]
    standard = composed_config(config_name, [*others, f"stability=[{','.join(usual)}]"])
    before = dict(leaves(_plain(standard)))
    changed = [
        Override(key=key, text=value_text(value))
        for key, value in leaves(_plain(composed))
        if key not in before or before[key] != value
    ]
    if not changed and not remedies:
        raise InputError(
            f"stability={chosen}: changes nothing; its file must set fields of a remedy below the"
            " remedy's name, such as clip03: {norm: 0.1}"
        )
    return changed


def _is_of_absent(argument: str, remedies: Iterable[str]) -> bool:
    """Whether an argument chooses remedies, or sets a field of one that is not among `remedies`."""
    section, _, rest = argument.partition("=")[0].partition(".")
    return section == "stability" and (not rest or rest.partition(".")[0] not in remedies)


def _plain(composed: DictConfig) -> dict[str, Any]:
    # Hydra's own section refers to a job, which does not exist here.
    own = OmegaConf.masked_copy(composed, [str(name) for name in composed if name != "hydra"])
    sections = OmegaConf.to_container(own, resolve=True, throw_on_missing=False)
    assert isinstance(sections, dict)
    return {str(name): value for name, value in sections.items()}
