"""From a command line to one checked, typed configuration of a run.

A DictConfig exists in `compose` and in `src.composed` only.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.claims import apply_claims
from src.compiling import is_compiled
from src.composed import check_integers, choices_of, composed_config
from src.data import DataConfig, TokenizerConfig
from src.digests import file_digest
from src.errors import InputError
from src.external import ExternalConfig, ExternalModel, check_parts, parts_for
from src.forks import Fork, inherited, parse_fork
from src.initial import Init, adopt, check_fit, options_of
from src.model import ModelConfig
from src.model.architecture import Architecture, ModelParts
from src.model.attention import AttentionConfig
from src.model.ffn import FeedForwardConfig
from src.model.kinds import ExternalPart, kinds_of
from src.naming import MAX_NAME, MAX_PATH, ROOM, Variant, check_study, variant_name
from src.observers import observers_of
from src.overrides import GROUPS, Override, parse
from src.schema import PathsConfig, Schema, TrackingConfig, TrainerConfig
from src.stability import REMEDIES, RemedyConfig
from src.tracking.client import check_address, default_uri
from src.training.recipe import GuardConfig, RecipeConfig
from src.watch.config import WatchConfig

HASHED = ("attention", "ffn", "stability", "model", "tokenizer", "recipe", "guard")
"""Sections that change numbers; data and tokenizer join by content, trainer by device, threads."""

UNHASHED = ("watch", "tracking", "paths")
"""Sections that change no number."""

UNCOMPARED = (*UNHASHED, "arguments", "fork", "save_at", "validate_at", "observe", "study")
"""Entries of config.yaml in which runs of one hash may differ."""


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
    def natural_start(self) -> int:
        """Steps that the options leave as they are in a run from nothing; all where none is on."""
        parts = {"recipe": self.recipe}
        starts = [remedy.acts_from(parts) for remedy in self.remedies.values()]
        return min(starts, default=self.recipe.max_steps)

    @property
    def last_step(self) -> int:
        """The step after which the run ends; before max_steps where an option stops it."""
        parts = {"recipe": self.recipe}
        ends = [remedy.last_step(parts) for remedy in self.remedies.values()]
        return min(ends, default=self.recipe.max_steps)

    @property
    def is_counterfactual(self) -> bool:
        """Whether the fork makes another run than the same configuration makes from nothing.

        It does not where no option, of this run or of its source, acts before the fork's step, and
        all else is the same.
        """
        if self.fork is None:
            return False
        source, ours = self.fork.source_config(), self.plain()
        theirs = [
            REMEDIES[name](**fields).acts_from({"recipe": self.recipe})
            for name, fields in source["stability"].items()
        ]
        same = all(
            _that_counts(source[name]) == _that_counts(ours[name])
            for name in (*HASHED, "trainer", "kinds")
            if name != "stability"
        )
        # Runs of before there was the choice say nothing.
        same = same and source.get("compile", False) == self.compile
        return not same or self.fork.step > min([self.natural_start, *theirs])

    @property
    def acts_from(self) -> int:
        """Steps that are bitwise the baseline's; 0 for a baseline, which acts nowhere."""
        if not self.remedies:
            return 0
        if self.fork is not None and self.is_counterfactual:
            return self.fork.step
        return self.natural_start

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate of the optimizer step after `step` others."""
        factors = [r.lr_factor(step, self.recipe.max_steps) for r in self.remedies.values()]
        return self.recipe.lr_factor(step) * math.prod(factors)

    def plain(self) -> dict[str, Any]:
        """The resolved configuration as plain values, for files."""
        fields = (*HASHED, "data", "trainer", *UNHASHED)
        plain: dict[str, Any] = {name: self._section(name) for name in fields}
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

    def config_hash(self) -> str:
        """A hash of all that changes numbers, and of nothing else. Reads the corpus."""
        content: dict[str, Any] = {name: self._section(name) for name in HASHED}
        # Sizes that no chosen part took change nothing.
        content["model"].pop("sizes", None)
        content["recipe"].pop("checkpoint_every")
        if self.guard.on_alarm != "stop":
            content["guard"].pop("on_alarm")
        content["kinds"] = self.plain()["kinds"]
        content["tokenizer"] = self.tokenizer.key()
        content["data"] = self.data.fingerprint(Path(self.paths.cache))
        content["device"] = self.trainer.device_type
        content["threads"] = self.trainer.threads
        content["seed"], content["repeat"] = self.seed, self.repeat
        if self.compile:
            content["compile"] = True
        if self.init is not None:
            content["init"] = self._init()["digest"]
        if self.fork is not None and self.is_counterfactual:
            content["fork"] = [self.fork.source_config()["config_hash"], self.fork.step]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _that_counts(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of config.yaml without what changes no number."""
    idle = ("sizes", "checkpoint_every", "strategy", "devices", "activation_checkpointing")
    return {k: v for k, v in section.items() if k not in idle}


def compose(config_name: str, arguments: Sequence[str]) -> RunConfig:
    """Composes and checks the configuration of one run.

    Args:
        config_name: the command's file in conf/.
        arguments: overrides in Hydra's grammar, without sweeps.

    Raises:
        InputError: in one line, whatever is wrong.
    """
    arguments = inherited(parse(arguments), arguments)
    typed = parse(arguments)
    _check_groups(typed)
    init, brought = _initial(config_name, arguments, typed)
    composed = composed_config(config_name, [*brought, *parts_for(typed), *arguments])
    choices = choices_of(composed)
    parts = _to_objects(composed)
    if init is None and parts["init"] is not None:
        raise InputError(f"init={parts['init']}: can be typed alone, no preset sets it")
    parts["init"] = init
    check_parts(parts)
    if init is not None:
        adopt(init, parts, choices, typed)
    known = {field.name for field in dataclasses.fields(Schema)}
    extra = {name: parts.pop(name) for name in list(parts) if name not in known}
    stability = parts.pop("stability")
    remedies = {
        field.name: getattr(stability, field.name)
        for field in dataclasses.fields(stability)
        if getattr(stability, field.name) is not None
    }
    notes = apply_claims(parts, remedies, typed)
    parts["ffn"] = parts["ffn"].resolved(max_steps=parts["recipe"].max_steps)
    if init is not None:
        sizes = {name: parts[name] for name in ("model", "attention", "ffn")}
        whole = ModelParts(**sizes, seq_len=parts["recipe"].seq_len)
        notes += check_fit(init, whole, typed)
    parts["fork"] = parse_fork(parts["fork"])
    parts["observers"] = observers_of(parts.pop("observe"), remedies)
    variant = Variant(
        attention=str(choices["attention"]),
        ffn=str(choices["ffn"]),
        stability="-".join(sorted(remedies)) or "none",
        model=str(choices["model"]),
        preset=str(choices["preset"]),
    )
    asked = parts.pop("compile")
    config = RunConfig(
        **parts,
        compile=False,
        remedies=remedies,
        variant=variant,
        arguments=arguments,
        variant_name=variant_name(variant, choices, typed),
        choices={group: str(choices[group]) for group in GROUPS if choices.get(group)},
        notes=notes,
        extra=extra,
    )
    _check_across(config)
    compiled = is_compiled(asked, config.architecture, config.recipe, config.trainer)
    config = dataclasses.replace(config, compile=compiled)
    if config.fork is not None and config.is_counterfactual:
        name = f"{config.variant_name}@fork-{config.fork.step}"
        return dataclasses.replace(config, variant_name=name)
    return config


def _initial(
    config_name: str, arguments: Sequence[str], typed: Sequence[Override]
) -> tuple[Init | None, list[str]]:
    """The saved model that the run begins with, and overrides that choose its options."""
    if not any(override.key == "init" for override in typed):
        return None, []
    # Fields of options are known only once the options are.
    early = [
        argument
        for argument, override in zip(arguments, typed, strict=True)
        if override.key in (*GROUPS, "init")
    ]
    composed = composed_config(config_name, early)
    if composed.init is None:
        return None, []
    if not composed.init:
        raise InputError("init=: names no saved model (allowed: a folder, a checkpoint, null)")
    init = Init(path=str(composed.init))
    defaults = choices_of(composed_config(config_name, []))
    return init, options_of(init, typed, choices=choices_of(composed), defaults=defaults)


def _check_groups(typed: Sequence[Override]) -> None:
    """Raises InputError where a group is given a mapping, or a list that takes none."""
    for override in typed:
        if override.key in GROUPS and override.text.startswith("{"):
            # It could name code (model) or hold a password (tracking), so it is not repeated here.
            raise InputError(
                f"{override.key}={{...}}: a group takes the name of an option; set a field of it"
                f" as {override.key}.<field>=<value>"
            )
        several = override.text.startswith("[")
        if several and override.key in GROUPS and override.key != "stability":
            raise InputError(f"{override.key}={override.text}: takes one option, not a list")
        options = override.text[1:-1].split(",") if several else []
        if override.key == "stability" and "none" in options:
            raise InputError(f"stability={override.text}: none goes with no other option")
        if len(set(options)) < len(options):
            raise InputError(f"stability={override.text}: names an option twice; once is enough")


def _to_objects(composed: DictConfig) -> dict[str, Any]:
    """Each section as its dataclass; a section's own check gets the section's name in front."""
    OmegaConf.resolve(composed)
    check_integers({name: composed[name] for name in composed if name != "hydra"})
    parts: dict[str, Any] = {}
    for name in composed:
        if name == "hydra":
            continue
        node = composed._get_node(name)
        try:
            is_section = isinstance(node, DictConfig)
            parts[str(name)] = OmegaConf.to_object(node) if is_section else composed[name]
        except InputError:
            raise
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            # A remedy's message starts with its own field; the section knows whose it is.
            raise InputError(f"{_section_of(str(name), node, error)}.{error}") from error
    return parts


def _section_of(name: str, node: Any, error: ValueError) -> str:
    if name != "stability":
        return name
    field = str(error).partition("=")[0]
    for option, config in node.items():
        if config is not None and field in config:
            return f"stability.{option}"
    return name


def _check_across(config: RunConfig) -> None:
    """Rules that more than one part has a say in."""
    try:
        config.architecture.check()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    devices, rows = config.trainer.devices, config.recipe.batch_size
    if rows % devices:
        raise InputError(
            f"trainer.devices={devices}: must divide recipe.batch_size={rows}, the rows they share"
        )
    check_study(config.study)
    if config.tracking.uri is not None:
        check_address(config.tracking.uri, field="tracking.uri")
    elif config.tracking.mlflow:
        # Raises InputError for an address in the environment that cannot be used.
        default_uri()
    for field, first in (("save_at", 1), ("validate_at", 0)):
        steps, last = getattr(config, field), config.recipe.max_steps
        if any(not first <= step <= last for step in steps):
            raise InputError(f"{field}={steps}: must be steps from {first} to {last}")
    for field in ("seed", "repeat"):
        if getattr(config, field) < 0:
            raise InputError(f"{field}={getattr(config, field)}: must be at least 0")
    length = len(os.fsencode(config.folder.absolute())) + ROOM
    longest = max(len(os.fsencode(part)) for part in config.folder.parts)
    if length > MAX_PATH or longest > MAX_NAME:
        raise InputError(
            f"paths.runs={str(config.paths.runs)[:40]}...: makes a run folder whose path the file"
            f" system cannot take (at most {MAX_NAME} bytes a name, {MAX_PATH} in all)"
        )
