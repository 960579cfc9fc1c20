"""The schema of a composed configuration, registered with Hydra on import.

The schema of a part is the dataclass beside the part's class.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from nonfinite.config import GuardConfig, WatchConfig
from src.checkpoint.rebuild import ExternalPart
from src.common.errors import InputError
from src.common.read_checkpoint import EXTERNAL
from src.common.tracking_address import keep
from src.data import SOURCES, TOKENIZERS, PoisonConfig
from src.external.model import ExternalConfig
from src.model import ModelConfig
from src.model.attention import ATTENTIONS
from src.model.ffn import FEED_FORWARDS
from src.stability import REMEDIES
from src.training.recipe import RecipeConfig

MAX_THREADS, MAX_DEVICES = 1024, 64


@dataclass(kw_only=True)
class TrainerConfig:
    """The devices of a run."""

    accelerator: str
    """auto (a GPU if there is one), cpu or gpu."""
    strategy: str
    """single: one device; ddp: several devices, each with all weights, share the rows of each step
    (arXiv 2006.15704)."""
    devices: int
    """Number of devices of one run; on the CPU, of processes. recipe.batch_size counts the rows of
    all devices together and must be a multiple."""
    threads: int
    """Number of CPU threads of PyTorch; the last bits of every number depend on it."""
    activation_checkpointing: bool
    """Keep only the input of each block and recompute the rest in the backward pass: less memory,
    at most a third more time, the same numbers (arXiv 1604.06174)."""

    def __post_init__(self) -> None:
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ValueError(f"accelerator={self.accelerator}: must be one of auto, cpu, gpu")
        if self.strategy not in ("single", "ddp"):
            raise ValueError(f"strategy={self.strategy}: must be one of single, ddp")
        if self.strategy == "single" and self.devices != 1:
            raise ValueError(
                f"devices={self.devices}: must be 1; type trainer=ddp to train a run on several"
            )
        if not 1 <= self.devices <= MAX_DEVICES:
            raise ValueError(f"devices={self.devices}: must be from 1 to {MAX_DEVICES}")
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads={self.threads}: must be from 1 to {MAX_THREADS}")

    def check_device(self) -> None:
        """Raises InputError if this machine lacks the devices. `describe` does not call this."""
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise InputError("trainer.accelerator=gpu: no GPU is available here; use cpu or auto")
        if self.device_type == "cuda" and self.devices > torch.cuda.device_count():
            raise InputError(
                f"trainer.devices={self.devices}: must be at most {torch.cuda.device_count()}, the"
                " number of GPUs here"
            )

    @property
    def device_type(self) -> str:
        """cpu or cuda. Only auto looks at this machine: with gpu the run may be for another."""
        if self.accelerator == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cuda" if self.accelerator == "gpu" else "cpu"


@dataclass(kw_only=True)
class TrackingConfig:
    """Whether and where MLflow mirrors a run. The run folder is always written."""

    mlflow: bool
    """Mirror the run into MLflow."""
    uri: str | None
    """Server or database, without user and password; null: MLFLOW_TRACKING_URI if set, otherwise
    mlflow.db in the current folder."""
    parent_run_id: str | None
    """The MLflow run of the sweep that this run belongs to; set by the sweep; null: none."""
    sweep_id: str | None
    """The sweep that this run belongs to; set by the sweep, even if that has no MLflow run; null:
    none."""

    def __post_init__(self) -> None:
        if self.uri is not None:
            # Secrets were already taken out of typed arguments, but an interpolated address, or one
            # from a config.yaml of an early version, may still hold some.
            self.uri = keep(self.uri)
        if self.sweep_id is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", self.sweep_id):
            raise ValueError(f"sweep_id={self.sweep_id}: may contain only letters, digits, _ and -")


@dataclass(kw_only=True)
class PathsConfig:
    """Folders, relative to the current folder."""

    runs: str
    """Folder of all runs; a run folder is <runs>/<study>/<variant>/seed-<n>."""
    cache: str
    """Folder of downloads and tokenised corpora."""


StabilityConfig = dataclasses.make_dataclass(
    "StabilityConfig",
    [(name, config | None, dataclasses.field(default=None)) for name, config in REMEDIES.items()],
)
"""One field for each registered remedy; null if the remedy is off."""


@dataclass
class Schema:
    """The composed configuration of a run."""

    attention: Any = MISSING
    ffn: Any = MISSING
    stability: StabilityConfig = dataclasses.field(default_factory=StabilityConfig)  # type: ignore[valid-type]
    model: Any = MISSING
    data: Any = MISSING
    tokenizer: Any = MISSING
    poison: PoisonConfig = MISSING
    recipe: RecipeConfig = MISSING
    guard: GuardConfig = MISSING
    watch: WatchConfig = MISSING
    trainer: TrainerConfig = MISSING
    tracking: TrackingConfig = MISSING
    paths: PathsConfig = MISSING
    compile: Any = MISSING
    seed: int = MISSING
    repeat: int = MISSING
    study: str = MISSING
    init: str | None = MISSING
    resume: str = MISSING
    rerun: bool = MISSING
    audit: bool = MISSING
    fork: str | None = MISSING
    save_at: list[int] = MISSING
    validate_at: list[int] = MISSING
    observe: Any = MISSING


@dataclass
class DescribeSchema(Schema):
    """The configuration of `src.describe`: a run's, and the command's own fields."""

    format: str = MISSING
    tokens_per_second: float | None = MISSING


def register() -> None:

    store = ConfigStore.instance()
    store.store(name="schema_train", node=Schema)
    store.store(name="schema_describe", node=DescribeSchema)
    for group, options in (
        ("model", {"transformer": ModelConfig, EXTERNAL: ExternalConfig}),
        ("attention", {**ATTENTIONS, EXTERNAL: ExternalPart}),
        ("ffn", {**FEED_FORWARDS, EXTERNAL: ExternalPart}),
        ("data", SOURCES),
        ("tokenizer", TOKENIZERS),
    ):
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)


register()
