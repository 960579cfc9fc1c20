"""Starts a branch from a state that another run has saved.

The new folder is filled as if the branch itself had been interrupted at that step. Everything else
is the ordinary continuation after an interruption, which is bitwise exact.
"""

import dataclasses
import hashlib
import html
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from src.common import storage
from src.common.environment import code_digest
from src.common.errors import InputError
from src.common.read_checkpoint import load_state
from src.common.run_folder import RunFolder, read_json, read_metrics, write_json
from src.config.field_roles import ROLES
from src.config.fork import Fork
from src.config.run_config import RunConfig
from src.stability import REMEDIES
from src.tracking.labels import is_measured_by


def this_origin() -> list[str]:
    """The code that trains in this process: its digest and the version of torch."""
    return [code_digest(), str(torch.__version__)]


def origins_of(saved: Mapping[str, Any] | None) -> list[list[str]]:
    """The origins of a run that continues from a checkpoint here, in order, without repetition."""
    before: list[list[str]] = [] if saved is None else saved.get("origins", [["unknown", ""]])
    return before if before and before[-1] == this_origin() else [*before, this_origin()]


def state_key(
    config_hash: str,
    observed: Mapping[str, Any],
    step: int,
    *,
    origins: Sequence[Sequence[str]] | None = None,
) -> str:
    """A hash of everything that the state of a run after a step depends on.

    Args:
        config_hash: hash of the run's configuration.
        observed: observers that the run has carried from its first step, with their fields.
        step: the step after which the state was saved.
        origins: the code that has trained the run so far; None: this process's code alone.
    """
    trained_by = [this_origin()] if origins is None else [list(origin) for origin in origins]
    text = json.dumps([config_hash, observed, step, trained_by], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(config: RunConfig, fork: Fork) -> None:
    """Raises InputError unless the state exists, can be read and fits the configuration."""
    fork.check(last_step=config.last_step)
    # Read only to find damage before the new folder is created; `begin` reads both again.
    load_state(fork.state, field="fork")
    read_metrics(fork.source / "metrics.jsonl")
    source, ours = fork.source_config(), config.plain()
    for name, remedy in config.remedies.items():
        theirs = {**source["stability"], **source["observe"]}.get(name)
        if remedy.is_passive and theirs != dataclasses.asdict(remedy):
            raise InputError(
                f"fork={fork.source}@{fork.step}: stability={name} must observe from the first"
                f" step, but that run did not carry it with these fields; train that run again with"
                f" observe={{{name}:{{...}}}}"
            )
    _check_optimizer(config, fork, source["stability"])
    their_init, our_init = (c.get("init") or {} for c in (source, ours))
    _compare(fork, "init", their_init.get("digest"), our_init.get("digest"))
    for field, role in ROLES.items():
        if role.must_match:
            section, _, name = field.partition(".")
            theirs, own = (c[section].get(name) if name else c[section] for c in (source, ours))
            _compare(fork, field, theirs, own)


def _check_optimizer(config: RunConfig, fork: Fork, source: Mapping[str, Any]) -> None:
    """Raises InputError if a remedy replaced the optimizer in one of both runs alone."""
    theirs = {n: f for n, f in source.items() if n in REMEDIES and REMEDIES[n].replaces_optimizer}
    ours = {n: dataclasses.asdict(r) for n, r in config.remedies.items() if r.replaces_optimizer}
    if theirs != ours:
        differing = next(n for n in (*ours, *theirs) if ours.get(n) != theirs.get(n))
        raise InputError(
            f"fork={fork.source}@{fork.step}: stability={differing} replaces the optimizer, and is"
            f" {theirs.get(differing, 'off')} in that run and {ours.get(differing, 'off')} here,"
            " so its state does not fit"
        )


def _compare(fork: Fork, name: str, theirs: Any, ours: Any) -> None:
    if name in ROLES and not ROLES[name].must_match:
        return
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            _compare(fork, f"{name}.{key}", theirs.get(key), ours.get(key))
    elif theirs != ours:
        raise InputError(
            f"fork={fork.source}@{fork.step}: {name} is {theirs} in that run and {ours} here, so"
            " its state does not fit"
        )


def begin(config: RunConfig, fork: Fork, folder: RunFolder, *, config_hash: str) -> None:
    """Fills a new folder with what the run itself would have left after the fork's step.

    If the guard had ended the source before that step, the state is the source's last, and the
    branch ends there as well.
    """
    state = load_state(fork.state, field="fork")
    step = state["global_step"]
    foreign = _foreign_remedies(config, state["config"])
    own = config.recipe.validation_steps() | set(config.validate_at)
    for_others = set(state["config"].get("validate_at", [])) - own
    state |= {
        "config": config.plain(),
        "config_hash": config_hash,
        "observed": {k: v for k, v in state["observed"].items() if k not in foreign},
        "derived_from": {"run": "/".join(fork.source.parts[-3:]), "step": step},
    }
    _set_optimizer(state, config, step)
    for callback in state["callbacks"].values():
        if isinstance(callback, dict) and {"last", "best"} <= set(callback):
            for metrics in (callback["last"], callback["best"]):
                for name in [n for n in metrics if is_measured_by(n, foreign)]:
                    del metrics[name]
    lines = [
        {
            name: value
            for name, value in line.items()
            if not is_measured_by(name, foreign)
            and not (name.startswith("val") and line["step"] in for_others)
        }
        for line in read_metrics(fork.source / "metrics.jsonl")
        if line["step"] <= step
    ]
    lines = [line for line in lines if line.keys() != {"step"}]
    state["metric_lines"] = len(lines)
    folder.begin_fork()
    folder.write_metrics(lines)
    for incident in (fork.source / "incidents").glob("step-*"):
        if int(incident.name.partition("-")[2]) <= step:
            _copy_incident(incident, folder.path / "incidents" / incident.name)
    draft = folder.checkpoints / "last.part"
    with storage.tensors_to(draft):
        torch.save(state, draft)
    draft.replace(folder.last)
    folder.write_config(config.plain(), config_hash=config_hash)
    folder.end_fork()


def _copy_incident(source: Path, target: Path) -> None:
    """Copies an incident's folder; the command to run it again then names the copy."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    file, page = target / "incident.json", target / "incident.html"
    incident = read_json(file)
    # Incidents of early versions, and those that cannot be run again, have no command.
    known: str = (incident or {}).get("next") or ""
    typed = dict(word.partition("=")[::2] for word in shlex.split(known))
    named = typed.get("incident", typed.get("checkpoint"))
    if incident is None or named is None:
        return
    command = known.replace(shlex.quote(named), shlex.quote(str(target)))
    write_json(file, incident | {"next": command})
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        text = text.replace(html.escape(known), html.escape(command))
        page.write_text(text, encoding="utf-8")


def _foreign_remedies(config: RunConfig, source: Mapping[str, Any]) -> list[str]:
    """Remedies and observers of the source that this run does not have."""
    theirs = {*source["stability"], *source["observe"]}
    return sorted(theirs - {*config.remedies, *config.observers})


def _set_optimizer(state: dict[str, Any], config: RunConfig, step: int) -> None:
    """Replaces AdamW's settings and the rate of the next step by those of this run."""
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
