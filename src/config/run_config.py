"""From a command line to one checked, typed configuration of a run.

A DictConfig exists in `compose` and in `src.config.hydra_compose` only.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nonfinite.config import GuardConfig, WatchConfig
from src.checkpoint.init_from import Init
from src.checkpoint.rebuild import ExternalPart, kinds_of
from src.common.storage import file_digest
from src.config.field_roles import ROLES, hashed_fields
from src.config.fork import Fork
from src.config.schema import PathsConfig, TrackingConfig, TrainerConfig
from src.config.variant_name import Variant
from src.data import DataConfig, TokenizerConfig
from src.external.model import ExternalConfig, ExternalModel
from src.model import ModelConfig
from src.model.architecture import Architecture, ModelParts
from src.model.attention import AttentionConfig
from src.model.ffn import FeedForwardConfig
from src.stability import REMEDIES, RemedyConfig
from src.training.recipe import RecipeConfig

SECTIONS = (
    *("attention", "ffn", "stability", "model", "tokenizer", "recipe", "guard"),
    *("data", "trainer", "watch", "tracking", "paths"),
)
"""Those with fields of their own, in the order of config.yaml."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that one run needs to know. Nobody assigns to it."""

    attention: AttentionConfig | ExternalPart
    """How a token looks at others."""
    ffn: FeedForwardConfig | ExternalPart
    """What is done to each token by itself."""
    remedies: dict[str, RemedyConfig]
    """The options that are on, by name."""
    model: ModelConfig | ExternalConfig
    """Sizes and initialisation, or a model that is not ours."""
    data: DataConfig
    """The text, and how much of it is held out."""
    tokenizer: TokenizerConfig
    """From text to ids."""
    recipe: RecipeConfig
    """Length, optimizer, schedule, precision, clipping."""
    guard: GuardConfig
    """What becomes of a step that is not finite."""
    watch: WatchConfig
    """Intervals of the instruments; they change no number."""
    trainer: TrainerConfig
    """Device and threads."""
    tracking: TrackingConfig
    """Whether and where MLflow mirrors the run folder."""
    paths: PathsConfig
    """Folders of runs and of corpora."""
    compile: bool
    """Whether the training step is compiled; auto is decided."""
    seed: int
    """Fixes initial weights and the order of the data; from 0."""
    repeat: int
    """The same seed with other draws of the options that draw; from 0."""
    study: str
    """The folder below paths.runs, and the experiment in MLflow."""
    init: Init | None
    """The saved model with whose weights it begins; None: from nothing."""
    resume: str
    """auto, never, or the path of a checkpoint."""
    rerun: bool
    """Moves a finished run of the same hash aside and trains anew."""
    fork: Fork | None
    """The saved state from which it begins; None: from nothing."""
    save_at: list[int]
    """Steps after which the whole state is kept, for forks."""
    validate_at: list[int]
    """Steps after which it validates beside its own, 0 for before the first: no part of best or
    final."""
    observers: dict[str, RemedyConfig]
    """Options that look on without being part of the run, by name."""
    arguments: list[str]
    """What was typed, or inherited from the run that is forked."""
    variant: Variant
    """Attention, ffn, stability, model and preset by name."""
    variant_name: str
    """The folder below the study: the variant and whatever else was chosen."""
    choices: dict[str, str]
    """The option chosen in each group."""
    notes: list[str]
    """What a reader of the result must know, such as an option that changes nothing."""
    extra: dict[str, Any]
    """Fields of the command that are none of the run's, such as describe's format."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        run = f"seed-{self.seed}" + (f"-repeat-{self.repeat}" if self.repeat else "")
        return Path(self.paths.runs) / self.study / self.variant_name / run

    @property
    def architecture(self) -> Architecture:
        """What the model is built from."""
        if isinstance(self.model, ExternalConfig):
            return ExternalModel(config=self.model, seq_len=self.recipe.seq_len)
        # Checked in compose: neither part is external where the model is not.
        assert not isinstance(self.attention, ExternalPart)
        assert not isinstance(self.ffn, ExternalPart)
        return ModelParts(
            model=self.model, attention=self.attention, ffn=self.ffn, seq_len=self.recipe.seq_len
        )

    @property
    def all_remedies(self) -> list[RemedyConfig]:
        """Those of the run, and those that it carries for other runs."""
        return [*self.remedies.values(), *self.observers.values()]

    @property
    def default_start_step(self) -> int:
        """Steps that the options leave as they are in a run from nothing; all where none is on."""
        parts = {"recipe": self.recipe}
        starts = [remedy.start_step(parts) for remedy in self.remedies.values()]
        return min(starts, default=self.recipe.max_steps)

    @property
    def last_step(self) -> int:
        """The step after which the run ends; before max_steps where an option stops it."""
        parts = {"recipe": self.recipe}
        ends = [remedy.last_step(parts) for remedy in self.remedies.values()]
        return min(ends, default=self.recipe.max_steps)

    @property
    def is_branch(self) -> bool:
        """Whether the fork makes another run than the same configuration makes from nothing.

        It does not where no option, of this run or of its source, acts before the fork's step, and
        all else is the same.
        """
        if self.fork is None:
            return False
        source, ours = self.fork.source_config(), self.plain()
        theirs = [
            REMEDIES[name](**fields).start_step({"recipe": self.recipe})
            for name, fields in source["stability"].items()
        ]
        same = all(
            hashed_fields(name, source[name]) == hashed_fields(name, ours[name])
            for name in (*SECTIONS, "kinds")
            if ROLES[name].is_hashed and name != "stability"
        )
        # Runs of before there was the choice say nothing.
        same = same and source.get("compile", False) == self.compile
        return not same or self.fork.step > min([self.default_start_step, *theirs])

    @property
    def start_step(self) -> int:
        """Steps that are bitwise the baseline's; 0 for a baseline, which acts nowhere."""
        if not self.remedies:
            return 0
        if self.fork is not None and self.is_branch:
            return self.fork.step
        return self.default_start_step

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate of the optimizer step after `step` others."""
        factors = [r.lr_factor(step, self.recipe.max_steps) for r in self.remedies.values()]
        return self.recipe.lr_factor(step) * math.prod(factors)

    def plain(self) -> dict[str, Any]:
        """The resolved configuration as plain values, for files."""
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
        if name == "model":
            return dataclasses.asdict(self.model) | self.architecture.facts()
        return dataclasses.asdict(getattr(self, name))

    def _init(self) -> dict[str, str]:
        assert self.init is not None
        digest = file_digest(self.init.file, Path(self.paths.cache))
        return {"path": self.init.path, "digest": digest[:16]}

    def config_hash(self, corpus: str | None = None) -> str:
        """A hash of all that changes numbers, and of nothing else.

        Args:
            corpus: the fingerprint of the data; None: it is computed, which reads them.
        """
        content: dict[str, Any] = {
            name: hashed_fields(name, self._section(name))
            for name in SECTIONS
            if ROLES[name].hashed == "value"
        }
        if self.guard.on_alarm != "stop":
            content["guard"].pop("on_alarm")
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
