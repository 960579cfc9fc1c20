"""Reads the run folders of a study."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from src.common import record as records
from src.common.errors import DamagedError, damaged
from src.common.run_folder import lost_lines, read_json, read_metrics
from src.config.remedy_roles import (
    AA_CONTROL,
    POSITIVE_CONTROL,
    Roles,
    all_have,
    loss_metric,
    roles_of,
)
from src.study.read.find_study import check_has_runs, run_folders
from src.tracking.labels import variant_of
from src.tracking.push_state import SWEEPS

SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's C loader if it was built with one: ten times faster over hundreds of runs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as its folder records it."""

    folder: Path
    variant: str
    """The variant's name, which is the name of the parent folder."""
    seed: int
    repeat: int
    config: dict[str, Any]
    """The content of config.yaml."""
    record: dict[str, Any]
    """The content of record.json; empty if the run has not ended or was killed."""
    baseline: str | None
    """The variant that it is compared with; None if it is a baseline itself."""

    @property
    def name(self) -> str:
        """`<variant>/seed-<n>`."""
        return f"{self.variant}/{self.folder.name}"

    @property
    def status(self) -> str:
        """finished, failed or killed; unfinished if there is no record."""
        return str(self.record.get("status", "unfinished"))

    @property
    def outcome(self) -> str:
        """clean, intermittent, collapsed or stopped; otherwise the status."""
        return str(self.record.get("outcome") or self.status)

    @property
    def axes(self) -> dict[str, str]:
        """The choices of attention, ffn, stability, model and preset."""
        return variant_of(self.config)

    @property
    def composition(self) -> str:
        """`mlha and moe`, or the target of a user's model."""
        target = self.config["model"].get("target")
        return str(target) if target else f"{self.axes['attention']} and {self.axes['ffn']}"

    @property
    def max_steps(self) -> int:
        """The planned number of steps; early_stop ends earlier."""
        return int(self.config["recipe"]["max_steps"])

    @property
    def steps(self) -> int:
        """The number of completed steps, including those shared with another run."""
        return int(self.record.get("steps", 0))

    @property
    def acts_from(self) -> int:
        """The landmark of its comparison: until this step the run is bitwise its baseline."""
        return int(self.record.get("acts_from", 0))

    @property
    def nonfinite_steps(self) -> list[int]:
        """The steps with a non-finite loss or gradient."""
        return list(self.record.get("guard", {}).get("nonfinite_steps", []))

    @property
    def spike_steps(self) -> list[int]:
        """The steps that are spikes by any of the definitions."""
        return list(self.record.get("spikes", {}).get("steps", []))

    @cached_property
    def roles(self) -> Roles:
        """The roles of its remedies, by name."""
        return roles_of(self.record, self.config["stability"])

    @property
    def is_aa_control(self) -> bool:
        """Whether it is the baseline, perturbed."""
        return all_have(self.roles, AA_CONTROL)

    @property
    def is_positive_control(self) -> bool:
        """Whether all its remedies are known to work."""
        return all_have(self.roles, POSITIVE_CONTROL)

    @property
    def loss_metric(self) -> str:
        """The validation loss by which it is judged."""
        return loss_metric(self.roles)

    @cached_property
    def results(self) -> dict[str, float]:
        """The summary that MLflow shows as result/*, by name without the prefix."""
        return records.results(self.record, loss=self.loss_metric)

    @property
    def incident(self) -> dict[str, Any] | None:
        """The first incident: step, module, cause, line."""
        return self.record.get("incident")

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Early warnings in order: step, metric, value, drift, crossing_step, line."""
        return list(self.record.get("alarms", []))

    @cached_property
    def lines(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, one per logged step; finite numbers only."""
        return read_metrics(self.folder / "metrics.jsonl")

    def final(self, metric: str) -> float | None:
        """A metric at the end of the run; None if it was not finite or not measured."""
        return self.record.get("final", {}).get(metric)

    @property
    def initial_loss(self) -> float | None:
        """Validation loss of the initial weights; None if it was not measured."""
        return next((line.get("val/loss") for line in self.lines[:1] if line["step"] == 0), None)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """All logged (step, value) pairs of a metric."""
        return [(int(line["step"]), line[metric]) for line in self.lines if metric in line]


@dataclass(frozen=True, kw_only=True)
class Study:
    """All runs of a study, and the sweeps that made them."""

    name: str
    folder: Path
    runs: list[Run]
    """In the order of variants in the sweeps, then by seed, then by repeat."""
    sweeps: list[dict[str, Any]]
    """The records of the sweeps, oldest first: command, git_sha, cells, steps_saved."""
    looks: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    """By variant, the seeds of each look, if a sequential sweep has made its runs."""
    primary: str = "failures"
    """The endpoint that the study is about, as its first sweep has named it: failures or loss."""
    damages: list[str] = field(default_factory=list)
    """Sentences about runs that cannot be read and are left out, or that have lost a part."""

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in order."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def of(self, variant: str) -> list[Run]:
        """The runs of one variant."""
        return [run for run in self.runs if run.variant == variant]


def collect(runs_folder: Path, name: str) -> Study:
    """Reads a study.

    Raises:
        InputError: there is no such study, or none of its runs can be read.
    """
    check_has_runs(runs_folder, name)
    folder = runs_folder / name
    sweeps = _sweeps(folder)
    order = [cell["variant"] for sweep in sweeps for cell in sweep["cells"]]
    rank = {variant: index for index, variant in reversed(list(enumerate(order)))}
    known = {cell["variant"]: cell["baseline"] for sweep in sweeps for cell in sweep["cells"]}
    found = run_folders(folder)
    variants = {path.parent.name for path in found}
    runs: list[Run] = []
    damages = []
    for path in found:
        variant = path.parent.name
        baseline = known.get(variant, _baseline_by_name(variant, variants))
        try:
            run = _read(path, baseline=baseline)
        except DamagedError as error:
            damages.append(f"{variant}/{path.name}: left out: {error}")
            continue
        runs.append(run)
        written = run.record.get("metric_lines", 0)
        if len(run.lines) < written:
            lost = lost_lines(len(run.lines), written)
            damages.append(f"{run.name}: of metrics.jsonl {lost}")
    if not runs:
        raise DamagedError(f"study={name}: none of its runs can be read; {damages[0]}")
    runs.sort(key=lambda r: (rank.get(r.variant, len(rank)), r.variant, r.seed, r.repeat))
    return Study(
        name=name,
        folder=folder,
        runs=runs,
        sweeps=sweeps,
        looks=_looks(sweeps),
        primary=_primary(sweeps) or "failures",
        damages=damages,
    )


def recorded_looks(folder: Path) -> dict[str, list[list[int]]]:
    """The looks of each variant in a study's folder, which need not exist."""
    return _looks(_sweeps(folder))


def recorded_primary(folder: Path) -> str | None:
    """The primary endpoint of a study's folder, which need not exist; None: it has no sweep."""
    return _primary(_sweeps(folder))


def _primary(sweeps: Sequence[Mapping[str, Any]]) -> str | None:
    # Sweeps of earlier versions named none, and were about failures.
    return str(sweeps[0].get("primary", "failures")) if sweeps else None


def _looks(sweeps: Sequence[Mapping[str, Any]]) -> dict[str, list[list[int]]]:
    """The looks of each variant: those of the first sequential sweep that names it.

    Later sweeps may have been started for what these looks showed.
    """
    looks: dict[str, list[list[int]]] = {}
    for sweep in sweeps:
        for cell in sweep["cells"] if sweep.get("looks") else ():
            looks.setdefault(cell["variant"], sweep["looks"])
    return looks


def _sweeps(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / SWEEPS).glob("*.json"), key=lambda file: file.stat().st_mtime)
    sweeps = []
    for file in files:
        with damaged(file, advice="delete it; the sweep's command writes it again"):
            sweep = json.loads(file.read_text(encoding="utf-8"))
            for cell in sweep["cells"]:
                cell["variant"], cell["baseline"]
            sweeps.append(sweep)
    return sweeps


def _read(folder: Path, *, baseline: str | None) -> Run:
    file = folder / "config.yaml"
    with damaged(file):
        config: Mapping[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=SAFE_LOADER)
        seed, repeat = int(config["seed"]), int(config["repeat"])
        # The last line of the file, which a truncated file lacks.
        config["config_hash"]
    with damaged(folder / "record.json"):
        record = read_json(folder / "record.json") or {}
        if record["status"] == "finished" if record else False:
            # Without these a damaged record would count as a run without failures.
            for name in ("steps", "final", "outcome", "acts_from"):
                record[name]
            record["guard"]["nonfinite_steps"], record["spikes"]["steps"]
    run = Run(
        folder=folder,
        variant=folder.parent.name,
        seed=seed,
        repeat=repeat,
        config=dict(config),
        record=record,
        baseline=baseline,
    )
    with damaged(file):
        # Every report needs these, whatever the outcome of the run.
        _ = run.axes, run.max_steps, run.composition
    # Cached by the run. Read here, so that a damaged file is found before anything is drawn.
    _ = run.lines
    return run


def _baseline_by_name(variant: str, variants: set[str]) -> str | None:
    """For runs that no sweep has started: the untreated variant that shares most fields."""
    parts, *fields = variant.split("@")
    attention_ffn, _, stability = parts.rpartition("+")
    if stability == "none":
        return None
    candidates = [
        other
        for other in variants
        if other.split("@")[0] == f"{attention_ffn}+none"
        and set(other.split("@")[1:]) <= set(fields)
    ]
    return max(candidates, key=lambda other: (other.count("@"), other), default=None)


def flat(config: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """All fields of some sections under dotted names, such as `recipe.betas`."""
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        else:
            found[name] = value

    for section in sections:
        if section in config:
            walk(section, config[section])
    return found
