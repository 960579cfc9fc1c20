"""The checked, typed configuration of a run.

Nothing here is a DictConfig: only `src.config.compose` and `src.config.hydra_compose` handle those.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonfinite.config import GuardConfig, WatchConfig
from src.checkpoint.init_from import Init
from src.checkpoint.rebuild import ExternalPart, kinds_of
from src.common.storage import file_digest
from src.config.field_roles import ROLES, hashed_fields, without_off
from src.config.fork import Fork
from src.config.schema import PathsConfig, TrackingConfig, TrainerConfig
from src.config.variant_name import Variant, run_folder
from src.data import DataConfig, PoisonConfig, TokenizerConfig
from src.external.model import ExternalConfig, ExternalModel
from src.model import ModelConfig
from src.model.architecture import Architecture, ModelParts
from src.model.attention import AttentionConfig
from src.model.ffn import FeedForwardConfig
from src.stability import REMEDIES, RemedyConfig
from src.training.recipe import RecipeConfig

SECTIONS = (
    *("attention", "ffn", "stability", "model", "tokenizer", "recipe", "guard"),
    *("data", "poison", "trainer", "watch", "tracking", "paths"),
)
"""Sections of config.yaml that have fields of their own, in order."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that one run needs to know; immutable."""

    attention: AttentionConfig | ExternalPart
    """The attention layer."""
    ffn: FeedForwardConfig | ExternalPart
    """The feed-forward layer."""
    remedies: dict[str, RemedyConfig]
    """The remedies that are on, by name."""
    model: ModelConfig | ExternalConfig
    """Sizes and initialisation, or an external model."""
    data: DataConfig
    """The text, and how much of it is held out for validation."""
    poison: PoisonConfig
    """Training batches that are spoilt on purpose."""
    tokenizer: TokenizerConfig
    """The tokenizer."""
    recipe: RecipeConfig
    """Length, optimizer, schedule, precision, clipping."""
    guard: GuardConfig
    """What happens to a non-finite step."""
    watch: WatchConfig
    """Intervals of the instruments, which only measure."""
    trainer: TrainerConfig
    """Device and threads."""
    tracking: TrackingConfig
    """Whether and where MLflow mirrors the run folder."""
    paths: PathsConfig
    """Folders of runs and of corpora."""
    compile: bool
    """Whether the training step is compiled; compile=auto is already resolved."""
    seed: int
    """Fixes initial weights and the order of the data; from 0."""
    repeat: int
    """Varies only the draws of remedies that draw random numbers; from 0."""
    study: str
    """The folder below paths.runs, and the experiment in MLflow."""
    init: Init | None
    """The saved model whose weights the run starts with; None: random weights."""
    resume: str
    """auto, never, or the path of a checkpoint."""
    rerun: bool
    """Whether an earlier run of the same hash is moved aside, and the run trained anew."""
    audit: bool
    """Whether the model is audited before its first step."""
    fork: Fork | None
    """The saved state that the run starts from; None: it starts at step 0."""
    save_at: list[int]
    """Steps after which the whole state is saved, for branches."""
    validate_at: list[int]
    """Additional steps after which the run validates; 0: before the first. These values do not
    count for best or final."""
    observers: dict[str, RemedyConfig]
    """Passive remedies that the run carries for branches, without being treated, by name."""
    arguments: list[str]
    """The typed arguments, including those inherited by a branch."""
    variant: Variant
    """The names of attention, ffn, stability, model and preset."""
    variant_name: str
    """The name of the folder below the study: the variant and all other typed fields."""
    choices: dict[str, str]
    """The option selected in each group."""
    notes: list[str]
    """What a reader of the result must know, such as a remedy without effect."""
    extra: dict[str, Any]
    """Fields of the command that do not belong to the run, such as describe's format."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        runs, study, name = self.paths.runs, self.study, self.variant_name
        return run_folder(runs, study, name, seed=self.seed, repeat=self.repeat)

    @property
    def architecture(self) -> Architecture:
        """The parts that the model is built from."""
        if isinstance(self.model, ExternalConfig):
            recipe = self.recipe
            return ExternalModel(
                config=self.model, seq_len=recipe.seq_len, precision=recipe.precision
            )
        # check_parts in compose ensures that no part is external unless the model is.
        assert not isinstance(self.attention, ExternalPart)
        assert not isinstance(self.ffn, ExternalPart)
        return ModelParts(
            model=self.model, attention=self.attention, ffn=self.ffn, seq_len=self.recipe.seq_len
        )

    @property
    def all_remedies(self) -> list[RemedyConfig]:
        """Remedies and observers."""
        return [*self.remedies.values(), *self.observers.values()]

    @property
    def default_start_step(self) -> int:
        """The steps before any remedy acts, in a run from step 0; all steps without a remedy."""
        parts = {"recipe": self.recipe}
        starts = [remedy.start_step(parts) for remedy in self.remedies.values()]
        return min(starts, default=self.recipe.max_steps)

    @property
    def last_step(self) -> int:
        """The step after which the run ends: max_steps unless a remedy stops it earlier."""
        parts = {"recipe": self.recipe}
        ends = [remedy.last_step(parts) for remedy in self.remedies.values()]
        return min(ends, default=self.recipe.max_steps)

    @property
    def is_branch(self) -> bool:
        """Whether the fork gives a different run than the same configuration from step 0.

        It gives the same run, bitwise, if both configurations are equal apart from remedies and no
        remedy of either acts before the step of the fork.
        """
        if self.fork is None:
            return False
        source, ours = self.fork.source_config(), self.plain()
        theirs = [
            REMEDIES[name](**fields).start_step({"recipe": self.recipe})
            for name, fields in source["stability"].items()
        ]
        same = all(
            # Early versions could not spoil batches, and recorded nothing about it.
            hashed_fields(name, source.get(name, {})) == hashed_fields(name, ours[name])
            for name in (*SECTIONS, "kinds")
            if ROLES[name].is_hashed and name != "stability"
        )
        # Early versions could not compile, and did not record it.
        same = same and source.get("compile", False) == self.compile
        return not same or self.fork.step > min([self.default_start_step, *theirs])

    @property
    def start_step(self) -> int:
        """The number of steps that are bitwise the baseline's; 0 for a baseline itself."""
        if not self.remedies:
            return 0
        if self.fork is not None and self.is_branch:
            return self.fork.step
        return self.default_start_step

    def lr_factor(self, step: int) -> float:
        """Factor on recipe.learning_rate after `step` optimizer steps: schedule times remedies."""
        factors = [r.lr_factor(step, self.recipe.max_steps) for r in self.remedies.values()]
        return self.recipe.lr_factor(step) * math.prod(factors)

    def replace_optimizer(
        self, optimizer: torch.optim.Optimizer, module: nn.Module
    ) -> torch.optim.Optimizer:
        """The optimizer that the remedies train with in place of the recipe's."""
        for remedy in self.remedies.values():
            optimizer = remedy.replace_optimizer(optimizer, module)
        return optimizer

    def plain(self) -> dict[str, Any]:
        """The resolved configuration as plain values; config.yaml and checkpoints hold them."""
        plain: dict[str, Any] = {name: self._section(name) for name in SECTIONS}
        plain["choices"] = dict(self.choices)
        plain["kinds"] = kinds_of(self.attention, self.ffn)
        plain["compile"] = self.compile
        plain["seed"], plain["repeat"], plain["study"] = self.seed, self.repeat, self.study
        plain["init"] = None if self.init is None else self._init()
        plain["fork"] = None if self.fork is None else f"{self.fork.source}@{self.fork.step}"
        plain["save_at"], plain["validate_at"] = list(self.save_at), list(self.validate_at)
        plain["observe"] = {k: dataclasses.asdict(v) for k, v in self.observers.items()}
        plain["arguments"] = list(self.arguments)
        return plain

    def _section(self, name: str) -> dict[str, Any]:
        if name == "stability":
            return {key: dataclasses.asdict(remedy) for key, remedy in self.remedies.items()}
        if name == "poison" and not self.poison.is_on:
            return {}
        if name == "model":
            values = dataclasses.asdict(self.model) | self.architecture.facts()
        else:
            values = dataclasses.asdict(getattr(self, name))
        return without_off(name, values)

    def _init(self) -> dict[str, str]:
        assert self.init is not None
        digest = file_digest(self.init.file, Path(self.paths.cache))
        return {"path": self.init.path, "digest": digest[:16]}

    def config_hash(self, corpus: str | None = None) -> str:
        """A hash of everything that changes the numbers of the run, and of nothing else.

        Args:
            corpus: the fingerprint of the data; None: computed here, which reads the data.
        """
        content: dict[str, Any] = {
            name: hashed_fields(name, self._section(name))
            for name in SECTIONS
            if ROLES[name].hashed == "value"
        }
        # Values that early versions did not have are left out at their default, so that the
        # hashes of old runs stay valid.
        if self.guard.on_alarm != "stop":
            content["guard"].pop("on_alarm")
        if not self.poison.is_on:
            content.pop("poison")
        content["kinds"] = kinds_of(self.attention, self.ffn)
        content["tokenizer"] = self.tokenizer.key()
        content["data"] = corpus or self.data.fingerprint(Path(self.paths.cache))
        content["device"] = self.trainer.device_type
        content["threads"] = self.trainer.threads
        content["seed"], content["repeat"] = self.seed, self.repeat
        if self.compile:
            content["compile"] = True
        if self.init is not None:
            content["init"] = self._init()["digest"]
        if self.fork is not None and self.is_branch:
            content["fork"] = [self.fork.source_config()["config_hash"], self.fork.step]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
