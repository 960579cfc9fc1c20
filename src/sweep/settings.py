"""The settings of a sweep as a whole, from conf/sweep.yaml."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from src.cli.hydra_errors import readable
from src.cli.name_checks import PRIMARIES, SWEEP_SWITCHES, unknown_option
from src.common.errors import InputError
from src.common.override_grammar import parse_all, quote_free_text
from src.common.tracking_address import take_typed
from src.config.hydra_compose import hydra_on_conf

MAX_JOBS = 1024

JOBS_AT_A_TIME = ("hydra.launcher.n_jobs", "hydra.launcher.array_parallelism")
"""The names that launchers use for n_jobs."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How a sweep is run."""

    experiment: str | None
    """The experiment in conf/experiment whose axes are swept."""
    n_jobs: int
    """Number of jobs at a time."""
    timeout: float | None
    """Seconds after which a job is ended; None: never."""
    share_prefix: bool
    """Whether arms that act late start from a state of their baseline."""
    sequential: bool
    """Whether arms are trained on more seeds only while they are undecided."""
    primary: str
    """The endpoint that the study is about, of PRIMARIES."""
    plan: bool
    """Whether to print what would be run, and stop."""
    launcher: str
    """The option in conf/hydra/launcher that starts the jobs."""
    launcher_fields: dict[str, Any]
    """The fields of the launcher."""
    axes: list[str]
    """The experiment's arguments."""
    typed: list[str]
    """The typed arguments that belong to the sweep as a whole."""

    def __post_init__(self) -> None:
        if type(self.n_jobs) is not int or not 1 <= self.n_jobs <= MAX_JOBS:
            raise InputError(f"n_jobs={self.n_jobs}: must be an integer from 1 to {MAX_JOBS}")
        if self.timeout is not None and (
            type(self.timeout) not in (int, float) or not 0 < self.timeout < math.inf
        ):
            raise InputError(f"timeout={self.timeout}: must be seconds above 0, or null")
        if self.primary not in PRIMARIES:
            raise InputError(f"primary={self.primary}: must be one of {', '.join(PRIMARIES)}")
        for field in SWEEP_SWITCHES:
            value = getattr(self, field)
            if type(value) is not bool:
                raise InputError(f"{field}={value}: must be true or false")


def compose_settings(arguments: Sequence[str]) -> SweepSettings:
    """Composes conf/sweep.yaml with the arguments of the sweep and of its launcher.

    Raises:
        InputError: there is a mistake in the arguments.
    """
    with readable("sweep", arguments):
        for override in parse_all(arguments):
            if override.is_sweep_override():
                raise InputError(f"{override.input_line}: must be a single value")
            if override.key_or_group in JOBS_AT_A_TIME:
                raise InputError(f"{override.input_line}: type n_jobs=<number> instead")
            if override.key_or_group == "hydra.launcher":
                raise InputError(f"{override.input_line}: type hydra/launcher=<name>, with a slash")
            if override.input_line == "hydra/launcher=submitit_slurm":
                raise unknown_option("hydra/launcher", "submitit_slurm")
            if override.key_or_group == "experiment" and override.value() is None:
                raise InputError(
                    "experiment=null: must be the name of a file in conf/experiment; leave it out"
                    " otherwise"
                )
        composed = compose_sweep(arguments)
        params: dict[str, Any] = dict(composed.hydra.sweeper.params or {})
        choices = composed.hydra.runtime.choices
        experiment, launcher = choices.get("experiment"), choices["hydra/launcher"]
        fields = OmegaConf.to_container(composed.hydra.launcher, resolve=False)
        assert isinstance(fields, dict)
    return SweepSettings(
        experiment=experiment,
        n_jobs=composed.n_jobs,
        timeout=composed.timeout,
        share_prefix=composed.share_prefix,
        sequential=composed.sequential,
        primary=composed.primary,
        plan=composed.plan,
        launcher=launcher,
        launcher_fields={str(name): value for name, value in fields.items()},
        axes=[
            quote_free_text(take_typed(f"{key}={_text(value)}")) for key, value in params.items()
        ],
        typed=list(arguments),
    )


def compose_sweep(arguments: Sequence[str]) -> DictConfig:
    """The composed conf/sweep.yaml, including Hydra's own section `hydra`."""
    with hydra_on_conf():
        composed = hydra.compose("sweep", overrides=list(arguments), return_hydra_config=True)
    OmegaConf.set_struct(composed, False)
    return composed


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
