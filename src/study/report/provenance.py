"""Where the results come from: configurations, code, machine, commands, incidents."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.number_format import NONE
from src.common.tracking_address import masked
from src.config.field_roles import role_of
from src.study.analysis.frames import own_steps
from src.study.analysis.results import Analysis
from src.study.read.collect import Run, Study, flat
from src.study.report.table import Cell, Column, Table, cell, link_to


def config_table(study: Study, analysis: Analysis, *, title: str) -> Table:
    """The fields in which an arm differs from its baseline, and a baseline from the first one."""
    configs = {variant: _texts(study.of(variant)[0].config) for variant in study.variants}
    labels = {arm.variant: arm.label for arm in analysis.arms}
    rows = []
    for arm in analysis.arms:
        against = arm.baseline if arm.baseline in configs else analysis.arms[0].variant
        one, two = configs[str(against)], configs[arm.variant]
        for field in sorted({*one, *two}):
            if one.get(field, NONE) != two.get(field, NONE):
                rows.append(
                    [
                        cell(arm.label, f"baseline {labels[str(against)]}"),
                        Cell(field),
                        Cell(one.get(field, NONE)),
                        Cell(two.get(field, NONE)),
                    ]
                )
    return Table(
        title=title,
        columns=[
            Column(name="arm", is_text=True),
            Column(name="field", is_text=True),
            Column(name="baseline", is_text=True, may_wrap=True),
            Column(name="arm's own", is_text=True, may_wrap=True),
        ],
        rows=rows,
    )


def differing_settings(studies: Sequence[Study]) -> dict[str, list[str]]:
    """By field, its value in each study, where the first arms of the studies differ."""
    configs = [_texts(study.of(study.variants[0])[0].config) for study in studies]
    found = {
        field: [config.get(field, NONE) for config in configs]
        for field in sorted({field for config in configs for field in config})
    }
    return {field: values for field, values in found.items() if len(set(values)) > 1}


def settings_table(studies: Sequence[Study], *, title: str) -> Table:
    """One row per field of `differing_settings`, and a column per study."""
    return Table(
        title=title,
        columns=[
            Column(name="field", is_text=True),
            *(Column(name=study.name, is_text=True, may_wrap=True) for study in studies),
        ],
        rows=[
            [Cell(field), *map(Cell, values)]
            for field, values in differing_settings(studies).items()
        ],
    )


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The fields that define an arm, as text under dotted names."""
    found = flat(config, [name for name in config if role_of(name).makes_arm])
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}


def incidents_table(study: Study, analysis: Analysis, *, title: str, folder: Path) -> Table:
    """One row per run with an incident: what failed first, with a link to its page.

    Args:
        study: the study.
        analysis: has the labels of the arms.
        title: the table's title.
        folder: the report's folder, to which links are relative.
    """
    rows = []
    labels = {arm.variant: arm.label for arm in analysis.arms}
    for run in (run for variant in labels for run in study.of(variant)):
        incident = run.incident
        if incident is not None:
            page = run.folder / "incidents" / f"step-{incident.get('step')}" / "incident.html"
            rows.append(
                [
                    Cell(labels[run.variant]),
                    cell(str(run.seed), f"repeat {run.repeat}" if run.repeat else ""),
                    cell(f"{incident.get('step', NONE)}", link=link_to(page, folder)),
                    Cell(str(incident.get("cause") or NONE)),
                    Cell(str(incident.get("module") or NONE)),
                    Cell(_without_place(incident)),
                ]
            )
    return Table(
        title=title,
        columns=[
            Column(name="arm", is_text=True),
            Column(name="seed"),
            Column(name="step"),
            Column(name="cause", is_text=True),
            Column(name="first module", is_text=True),
            Column(name="finding", is_text=True, may_wrap=True),
        ],
        rows=rows,
    )


def _without_place(incident: Mapping[str, Any]) -> str:
    """The incident's line without step and module, which have their own columns."""
    line = str(incident.get("line") or NONE)
    for place in (f"step {incident.get('step')}: ", f"{incident.get('module')}: "):
        line = line.removeprefix(place)
    return line


def causes(study: Study) -> list[str]:
    """`router underflow in 4 of 4`, the most frequent cause first."""
    found = [str(run.incident.get("cause")) for run in study.runs if run.incident is not None]
    return [f"{cause} in {n} of {len(found)}" for cause, n in Counter(found).most_common()]


def steps_saved(study: Study) -> tuple[int, int]:
    """The number of shared steps, and of all steps of all runs."""
    return (
        sum(run.steps - own_steps(run) for run in study.runs),
        sum(run.steps for run in study.runs),
    )


def commands(study: Study) -> list[str]:
    """The commands of the sweeps, without duplicates."""
    typed = [sweep.get("command") for sweep in study.sweeps]
    texts = [
        command if isinstance(command, str) else shlex.join(command) for command in typed if command
    ]
    # Early versions recorded the credentials in an address.
    return list(dict.fromkeys(map(masked, texts)))


def origins(study: Study, *, title: str) -> Table:
    """Code, libraries and machines of the runs."""
    counts = Counter(_origin(run) for run in study.runs)
    return Table(
        title=title,
        columns=[
            Column(name="runs"),
            Column(name="commit", is_text=True),
            Column(name="code", note="hash of every source file, committed or not", is_text=True),
            Column(name="libraries", is_text=True, may_wrap=True),
            Column(name="machine", is_text=True, may_wrap=True),
        ],
        rows=[
            [Cell(str(n)), *(Cell(text) for text in origin)] for origin, n in counts.most_common()
        ],
    )


def _origin(run: Run) -> tuple[str, ...]:
    record = run.record
    versions, device = record.get("versions", {}), record.get("device", {})
    sha = str(record.get("git_sha") or NONE)[:10]
    libraries = [f"{name} {versions[name]}" for name in ("python", "torch") if name in versions]
    machine = [f"{device[key]}" for key in ("name", "platform") if device.get(key)]
    threads = device.get("threads")
    machine += [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
    return (
        f"{sha} with changes" if record.get("git_dirty") else sha,
        str(record.get("code") or NONE),
        ", ".join(libraries) or NONE,
        ", ".join(machine) or NONE,
    )
