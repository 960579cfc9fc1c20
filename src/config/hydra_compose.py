"""Composes the files in conf/ and typed overrides with Hydra.

This module imports nothing heavy. What it composes is checked for types only where
`src.config.schema` has been imported.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from src.common.errors import InputError
from src.common.override_grammar import allow_new_names

CONF = Path(__file__).parents[2] / "conf"

CONFIG_DIR = "SMOLDEEPSEEK_CONFIG_DIR"
"""The environment variable that holds the folder of --config-dir, so that the processes which this
one starts compose with it too."""

MAX_INTEGER = 2**63 - 1


class _UsersFolder(SearchPathPlugin):
    """Adds the folder of --config-dir to the places where Hydra looks for options."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in conf_folders()[1:]:
            search_path.append("command-line", f"file://{folder}")


@contextlib.contextmanager
def hydra_on_conf() -> Iterator[None]:
    """Inside, Hydra composes the files of conf/, and of the folder of --config-dir if typed."""
    plugins = Plugins.instance()
    # Each time, because a launcher that runs a job in this process, as with n_jobs=1, makes all
    # plugins anew and forgets this one.
    if _UsersFolder not in plugins.discover(SearchPathPlugin):
        plugins.register(_UsersFolder)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        yield


def conf_folders() -> list[Path]:
    """The folders with options: conf/, and that of --config-dir if it was typed."""
    return [CONF, *(Path(folder) for folder in [os.environ.get(CONFIG_DIR)] if folder)]


def use_config_dir(text: str) -> None:
    """Adds a folder with options and experiments, laid out like conf/.

    Raises:
        InputError: it is not a folder, or one of its files has the name of a file in conf/.
    """
    folder = Path(text).expanduser().resolve()
    if not text or not folder.is_dir():
        raise InputError(f"--config-dir={text}: no such folder")
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder)
        if (CONF / name).is_file() and folder != CONF.resolve():
            # Hydra would take one of the two without a word.
            raise InputError(f"--config-dir={text}: conf/ has {name} too; give yours another name")
    os.environ[CONFIG_DIR] = str(folder)


def option_names(group: str) -> list[str]:
    """The names of the options of a group, sorted."""
    return sorted({file.stem for conf in conf_folders() for file in (conf / group).glob("*.yaml")})


def is_own_option(group: str, option: str) -> bool:
    """Whether an option comes from the folder of --config-dir."""
    return any((conf / group / f"{option}.yaml").is_file() for conf in conf_folders()[1:])


def choices_of(composed: DictConfig) -> dict[Any, Any]:
    """The option selected in each group."""
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(choices, dict)
    return choices


def compose_plain(config_name: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The fields of a command other than train and describe, as plain values.

    Args:
        config_name: the command's file in conf/.
        arguments: overrides; None: no overrides, and fields may lack a value.

    Raises:
        Exceptions of Hydra and OmegaConf, which `readable` turns into one line.
    """
    composed = composed_config(config_name, arguments or [])
    del composed["hydra"]
    is_complete = arguments is not None
    plain = OmegaConf.to_container(composed, resolve=is_complete, throw_on_missing=is_complete)
    assert isinstance(plain, dict)
    check_integers(plain)
    return {str(key): value for key, value in plain.items()}


def check_integers(value: Any, field: str = "") -> None:
    """Raises InputError if an integer anywhere in `value` needs more than 64 bits."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_integers(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            check_integers(inner, field)
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise InputError(f"{field}={_cut(value)}: must be an integer of at most 64 bits")


def _cut(value: int) -> str:
    # str() refuses integers of more than 4300 digits.
    return str(value) if abs(value) < 10**40 else "..."


def composed_config(config_name: str, arguments: Sequence[str]) -> DictConfig:
    """The composed configuration, including Hydra's own section `hydra` with the choices."""
    with hydra_on_conf():
        composed = hydra.compose(
            config_name, overrides=allow_new_names(arguments), return_hydra_config=True
        )
    OmegaConf.set_struct(composed, False)
    return composed
