"""Begins a run from a state that another run has saved.

The folder is made to look as if the run itself had been interrupted there; all the rest is the
ordinary way of going on after an interruption, which is bitwise.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from src.common import storage
from src.common.environment import code_digest
from src.common.errors import InputError
from src.common.read_checkpoint import load_state
from src.common.run_folder import RunFolder, read_metrics
from src.config.field_roles import ROLES
from src.config.fork import Fork
from src.config.run_config import RunConfig
from src.tracking.labels import is_measured_by


def this_origin() -> list[str]:
    """What trains in this process: the code and the version of torch."""
    return [code_digest(), str(torch.__version__)]


def origins_of(saved: Mapping[str, Any] | None) -> list[list[str]]:
    """What has trained a run that goes on here from a checkpoint, in order, each once in a row."""
    before: list[list[str]] = [] if saved is None else saved.get("origins", [["unknown", ""]])
    return before if before and before[-1] == this_origin() else [*before, this_origin()]


def state_key(
    config_hash: str,
    observed: Mapping[str, Any],
    step: int,
    *,
    origins: Sequence[Sequence[str]] | None = None,
) -> str:
    """What the state of a run after a step hangs on.

    Args:
        config_hash: of the run.
        observed: options that have looked on from its first step, with their fields.
        step: after which it was saved.
        origins: what has trained it until then; None: this code alone.
    """
    trained_by = [this_origin()] if origins is None else [list(origin) for origin in origins]
    text = json.dumps([config_hash, observed, step, trained_by], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(config: RunConfig, fork: Fork) -> None:
    """Raises InputError unless the state is there, can be read and fits the configuration."""
    fork.check(last_step=config.last_step)
    # Both are read again by `begin`, once the new folder is there.
    load_state(fork.state, field="fork")
    read_metrics(fork.source / "metrics.jsonl")
    source, ours = fork.source_config(), config.plain()
    for name, remedy in config.remedies.items():
        theirs = {**source["stability"], **source["observe"]}.get(name)
        if remedy.is_passive and theirs != dataclasses.asdict(remedy):
            raise InputError(
                f"fork={fork.source}@{fork.step}: stability={name} looks on from the first step,"
                f" and that run did not carry it with these fields (observe={{{name}:...}})"
            )
    origin, own = (c.get("init") or {} for c in (source, ours))
    _compare(fork, "init", origin.get("digest"), own.get("digest"))
    for field, role in ROLES.items():
        if role.must_match:
            section, _, name = field.partition(".")
            theirs, own = (c[section].get(name) if name else c[section] for c in (source, ours))
            _compare(fork, field, theirs, own)


def _compare(fork: Fork, name: str, theirs: Any, ours: Any) -> None:
    if name in ROLES and not ROLES[name].must_match:
        return
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            _compare(fork, f"{name}.{key}", theirs.get(key), ours.get(key))
    elif theirs != ours:
        raise InputError(
            f"fork={fork.source}@{fork.step}: {name} was {theirs} there and is {ours} here;"
            " the state does not fit"
        )


def begin(config: RunConfig, fork: Fork, folder: RunFolder, *, config_hash: str) -> None:
    """Fills a new folder with what the run would have left after the fork's step."""
    state = load_state(fork.state, field="fork")
    foreign = _foreign(config, state["config"])
    own = config.recipe.validation_steps() | set(config.validate_at)
    for_others = set(state["config"].get("validate_at", [])) - own
    state |= {
        "config": config.plain(),
        "config_hash": config_hash,
        "observed": {k: v for k, v in state["observed"].items() if k not in foreign},
        "derived_from": {"run": "/".join(fork.source.parts[-3:]), "step": fork.step},
    }
    _set_optimizer(state, config, fork.step)
    for callback in state["callbacks"].values():
        if isinstance(callback, dict) and {"last", "best"} <= set(callback):
            for figures in (callback["last"], callback["best"]):
                for name in [n for n in figures if is_measured_by(n, foreign)]:
                    del figures[name]
    lines = [
        {
            name: value
            for name, value in line.items()
            if not is_measured_by(name, foreign)
            and not (name.startswith("val") and line["step"] in for_others)
        }
        for line in read_metrics(fork.source / "metrics.jsonl")
        if line["step"] <= fork.step
    ]
    lines = [line for line in lines if line.keys() != {"step"}]
    state["metric_lines"] = len(lines)
    folder.begin_fork()
    folder.write_metrics(lines)
    for incident in (fork.source / "incidents").glob("step-*"):
        if int(incident.name.partition("-")[2]) <= fork.step:
            shutil.copytree(incident, folder.path / "incidents" / incident.name, dirs_exist_ok=True)
    draft = folder.checkpoints / "last.part"
    with storage.tensors_to(draft):
        torch.save(state, draft)
    draft.replace(folder.last)
    folder.write_config(config.plain(), config_hash=config_hash)
    folder.end_fork()


def _foreign(config: RunConfig, source: Mapping[str, Any]) -> list[str]:
    """Options that the source had, or carried, and this run has not."""
    theirs = {*source["stability"], *source["observe"]}
    return sorted(theirs - {*config.remedies, *config.observers})


def _set_optimizer(state: dict[str, Any], config: RunConfig, step: int) -> None:
    """The settings of AdamW and the rate of the next step, as this run's own schedule has them."""
    base, rate = config.recipe.learning_rate, config.recipe.learning_rate * config.lr_factor(step)
    for group in state["optimizer_states"][0]["param_groups"]:
        group |= {
            "lr": rate,
            "initial_lr": base,
            "betas": tuple(config.recipe.betas),
            "eps": config.recipe.eps,
        }
    schedule = state["lr_schedulers"][0]
    schedule["_last_lr"] = [rate] * len(schedule["_last_lr"])
    schedule["base_lrs"] = [base] * len(schedule["base_lrs"])
