"""What Hydra makes of the files in conf/ and of overrides."""

from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from src.overrides import allow_new_names
from src.schema import CONF


def choices_of(composed: DictConfig) -> dict[Any, Any]:
    """The option chosen in each group."""
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(choices, dict)
    return choices


def compose_plain(config_name: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The fields of a command that has its own, as plain values.

    Args:
        config_name: the command's file in conf/.
        arguments: overrides; None: none, and a field without a value is no error.

    Raises:
        Hydra's and OmegaConf's exceptions, which the command line turns into one line.
    """
    composed = composed_config(config_name, arguments or [])
    del composed["hydra"]
    must = arguments is not None
    plain = OmegaConf.to_container(composed, resolve=must, throw_on_missing=must)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def composed_config(config_name: str, arguments: Sequence[str]) -> DictConfig:
    """What conf/ and overrides come to, with what Hydra says of the choices."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        composed = hydra.compose(
            config_name, overrides=allow_new_names(arguments), return_hydra_config=True
        )
    OmegaConf.set_struct(composed, False)
    return composed
