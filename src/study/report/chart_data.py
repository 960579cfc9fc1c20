"""The data of the charts: frames with a row per run, validation, span of steps or layer."""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any
from urllib.parse import quote

import pandas as pd

from src.common import number_format
from src.common.record import frac_metric
from src.study.analysis.expert_loads import LayerLoad
from src.study.analysis.frames import role
from src.study.analysis.rates import Family, final_loss
from src.study.analysis.results import Analysis, ArmResult, Estimate
from src.study.read.collect import Run, Study
from src.study.report.loss_over_run import Validation, curve_metric, validations

OUTCOMES = {
    "clean": "clean",
    "intermittent": "intermittent: batches skipped, recovered",
    "collapsed": "collapsed",
    "stopped": "stopped by the guard",
}
"""Outcomes and their names in a legend."""

OTHER = "failed, killed or not finished"

LABEL_WIDTH = 34
"""The most letters in a line of an arm's label."""


class RunFacts:
    """The facts about a run that every chart shows in its tooltip.

    Args:
        analysis: has the labels of the arms.
        folder: the page's folder, to which links are relative.
    """

    def __init__(self, analysis: Analysis, folder: Path) -> None:
        self.labels = {arm.variant: arm.label for arm in analysis.arms}
        self.folder = folder

    def __call__(self, run: Run) -> dict[str, Any]:
        """Arm, seed, run, outcome, and a link if the run has a folder."""
        is_there = run.folder.is_dir()
        link = quote(os.path.relpath(run.folder, self.folder)) + "/" if is_there else None
        return {
            "arm": self.labels[run.variant],
            "seed": f"{run.seed}, repeat {run.repeat}" if run.repeat else f"{run.seed}",
            "run": run.name,
            "outcome": OUTCOMES.get(run.outcome, OTHER),
            "link": link,
        }


def wrapped(label: str, *more: str) -> str:
    """An arm's label in lines; a line may break before the @ with which a field begins."""
    lines = [""]
    for number, piece in enumerate(label.split("@")):
        text = f"@{piece}" if number else piece
        if lines[-1] and len(lines[-1]) + len(text) > LABEL_WIDTH:
            lines.append("")
        lines[-1] += text
    return "\n".join([*lines, *filter(None, more)])


def strip_rows(arms: Sequence[ArmResult], estimates: Sequence[Estimate | None]) -> pd.DataFrame:
    """One row per arm: its label, and the mean with its interval."""
    return pd.DataFrame(
        {
            "row": wrapped(arm.label, role(arm)),
            "variant": arm.variant,
            "mean": None if estimate is None else estimate.mean,
            "low": None if estimate is None else estimate.low,
            "high": None if estimate is None else estimate.high,
        }
        for arm, estimate in zip(arms, estimates, strict=True)
    )


def failures(study: Study, analysis: Analysis, facts: RunFacts) -> pd.DataFrame:
    """One row per run: non-finite batches after its arm begins to act, and its baseline's."""
    found = []
    for arm in analysis.arms:
        for run in study.of(arm.variant):
            pair = baseline_of(run, study)
            baseline = None if pair is None else _failures_after(pair, run.acts_from)
            found.append(
                {
                    **facts(run),
                    "row": wrapped(arm.label, role(arm)),
                    "value": _failures_after(run, run.acts_from),
                    "baseline": baseline,
                    "of_baseline": number_format.fixed(baseline, 0),
                    "place": (run.seed, run.repeat),
                    # Pale: the run failed before its arm could act.
                    "opacity": 0.35
                    if any(step <= run.acts_from for step in run.nonfinite_steps)
                    else 1.0,
                }
            )
    return _placed(pd.DataFrame(found))


def final_losses(study: Study, analysis: Analysis, facts: RunFacts) -> pd.DataFrame:
    """One row per run that has a final validation loss."""
    found = []
    for arm in analysis.arms:
        for run in study.of(arm.variant):
            value = run.final(arm.loss_metric)
            if value is not None:
                found.append(
                    {
                        **facts(run),
                        "row": wrapped(arm.label, role(arm)),
                        "value": value,
                        "nonfinite": run.final(frac_metric(arm.loss_metric)) or 0.0,
                        "baseline": None,
                        "place": (run.seed, run.repeat),
                        "opacity": 1.0,
                    }
                )
    return _placed(pd.DataFrame(found))


def _placed(points: pd.DataFrame) -> pd.DataFrame:
    """Gives a seed the same height in every row, so that readers can pair the points."""
    if points.empty:
        return points
    places = {key: index for index, key in enumerate(sorted(set(points["place"])))}
    share = points["place"].map(places).astype(float)
    return points.assign(place=(share + 0.5) / len(places) * 0.84 + 0.05)


def _failures_after(run: Run, step: int) -> float:
    return float(sum(number > step for number in run.nonfinite_steps))


def baseline_of(run: Run, study: Study) -> Run | None:
    """The run of the baseline that a run is paired with."""
    if run.baseline is None:
        return None
    pairs = [other for other in study.of(run.baseline) if other.seed == run.seed]
    same = [other for other in pairs if other.repeat == run.repeat]
    return next(iter(same or pairs), None)


def learning_rates(families: Sequence[Family], facts: RunFacts) -> pd.DataFrame:
    """Three parts: the mean of every rate, the same for the first family, and a row per run."""
    found = []
    rates = sorted({math.log10(rate) for family in families for rate in family.runs})
    gap = min(high - low for low, high in pairwise(rates))
    for family in families:
        panel = {"panel": wrapped(family.label)}
        for rate, runs in family.runs.items():
            mean = {"rate": rate, "loss": family.mean_loss(rate)}
            first = {"rate": rate, "loss": families[0].mean_loss(rate)} if (
                rate in families[0].runs and family is not families[0]
            ) else None  # fmt: skip
            found.append({**panel, "part": "mean", **mean})
            found += [{**panel, "part": "first", **first}] if first else []
            for place, run in enumerate(runs):
                # The runs of a rate are drawn side by side; the axis is logarithmic.
                aside = min(0.04, 0.6 * gap / len(runs)) * (place - (len(runs) - 1) / 2)
                found.append(
                    {
                        **panel,
                        "part": "run",
                        "rate": rate * 10**aside,
                        "loss": family.loss(run),
                        "said": number_format.fixed(final_loss(run)),
                        "at": f"{rate:g}",
                        **facts(run),
                    }
                )
    return pd.DataFrame(found)


def loss_curves(study: Study, analysis: Analysis, facts: RunFacts) -> pd.DataFrame:
    """Validation loss by step; every panel has an arm and its baseline.

    A part is `run`, `span` (mean, lowest and highest loss of the clean runs) or `start` (the step
    at which the arm begins to act). Losses that blew up are capped at the upper edge. Empty if no
    run has a loss.
    """
    found = {
        run.name: validations(run, curve_metric(run, arm.loss_metric))
        for arm in analysis.arms
        for run in study.of(arm.variant)
    }
    losses = [v.loss for each in found.values() for v in each if v.loss is not None]
    if not losses:
        return pd.DataFrame()
    top = _upper_edge(losses)
    rows: list[dict[str, Any]] = []
    for arm in analysis.arms:
        own = study.of(arm.variant)
        clean = sum(run.outcome == "clean" for run in own)
        panel = {"panel": wrapped(arm.label, f"{clean} of {len(own)} runs clean")}
        for side, runs in (("baseline", study.of(arm.baseline or "")), ("arm", own)):
            place = {**panel, "side": side}
            for number, run in enumerate(runs):
                line = {**place, "part": "run", "line": number + len(own) * (side == "baseline")}
                # A baseline's runs have tooltips only in its own panel.
                line |= facts(run) if side == "arm" else {}
                rows += [{**line, **_validation(v, top, side=side)} for v in found[run.name]]
            curves = [found[run.name] for run in runs if run.outcome == "clean"]
            rows += [{**place, "part": "span", **span} for span in _spans(curves, top)]
        if arm.acts_from and not arm.trains_alike:
            rows.append({**panel, "part": "start", "step": arm.acts_from})
    return pd.DataFrame(rows)


def _validation(v: Validation, top: float, *, side: str) -> dict[str, Any]:
    """One point: a step without a loss is a gap; non-finite windows of the arm are marked."""
    loss = None if v.loss is None else round(min(v.loss, top), 5)
    is_marked = side == "arm" and v.nonfinite_frac > 0
    return {"step": v.step, "loss": loss, "nonfinite": v.nonfinite_frac if is_marked else None}


def _spans(curves: Sequence[Sequence[Validation]], top: float) -> list[dict[str, float]]:
    """Mean, lowest and highest loss of some curves, at the steps where all have one."""
    found = [{v.step: min(v.loss, top) for v in each if v.loss is not None} for each in curves]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    spans = {step: [each[step] for each in found] for step in steps}
    return [
        {"step": step, "loss": fmean(each), "least": min(each), "greatest": max(each)}
        for step, each in spans.items()
    ]


def _upper_edge(losses: Sequence[float]) -> float:
    """The highest loss on the axis: losses that blew up would flatten all others."""
    low, high = min(losses), max(losses)
    usual = quantiles(losses, n=20)[-1] if len(losses) > 1 else high
    return low + 1.5 * (usual - low) if high - low > 3 * (usual - low) > 0 else high


def timeline(study: Study, analysis: Analysis, facts: RunFacts, *, width: int) -> pd.DataFrame:
    """Spans of steps: `run`, `nonfinite`, `spike`, and `start` at which the arm begins to act.

    Args:
        study: the study.
        analysis: has the arms in their order.
        facts: gives the facts about a run.
        width: the chart's width in pixels. Steps that fall on the same pixel are merged.
    """
    longest = max(max(run.max_steps, _steps_made(run)) for run in study.runs)
    pixel = longest / width
    rows = []
    for arm in analysis.arms:
        panel = {"panel": wrapped(arm.label)}
        if arm.trains_alike:
            panel = {"panel": wrapped(arm.label, "trains as its baseline does")}
        elif arm.acts_from:
            panel = {"panel": wrapped(arm.label, f"acts after step {arm.acts_from:,}")}
        for run in study.of(arm.variant):
            made, nonfinite = _steps_made(run), sorted(set(run.nonfinite_steps))
            spikes = [step for step in run.spike_steps if step not in set(nonfinite)]
            own = {**panel, **facts(run)}
            counts = _counts(len(nonfinite), len(spikes))
            note = "; ".join(filter(None, [counts, _end(run, made)])) or number_format.NONE
            rows.append({**own, "part": "run", "start": 0, "end": made, "note": note})
            for part, steps, reach in (
                ("nonfinite", nonfinite, max(1.0, 1.6 * pixel)),
                ("spike", spikes, 2.0 * pixel),
            ):
                rows += [
                    {**own, "part": part, "start": low, "end": high + max(1.0, 1.2 * pixel)}
                    for low, high in _merged(steps, reach=reach)
                ]
        if arm.acts_from and not arm.trains_alike:
            # Uses the last run's row: a new seed label would add a line to the panel.
            rows.append({**rows[-1], "part": "start", "start": arm.acts_from, "note": None})
    return pd.DataFrame(rows)


def _steps_made(run: Run) -> int:
    """The completed steps of a run, even if it has not ended."""
    return run.steps or int(max((line["step"] for line in run.lines), default=0))


def _counts(nonfinite: int, spikes: int) -> str:
    counts = [f"{nonfinite:,} non-finite"] if nonfinite else []
    counts += [f"{spikes:,} spike{'s' if spikes > 1 else ''}"] if spikes else []
    return ", ".join(counts)


def _end(run: Run, made: int) -> str:
    """How a run ended that did not complete all its steps; else empty."""
    if run.status == "finished" and made >= run.max_steps:
        return ""
    return f"{'ends' if run.status == 'finished' else run.status} at step {made:,}"


def _merged(steps: Iterable[int], *, reach: float) -> list[tuple[int, int]]:
    """Merges steps into spans if they are at most `reach` apart."""
    spans: list[tuple[int, int]] = []
    for step in steps:
        if spans and step - spans[-1][1] <= reach:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans


def router_loads(arms: Sequence[tuple[ArmResult, list[LayerLoad]]]) -> pd.DataFrame:
    """One row per layer of every arm with experts."""
    rows = []
    for arm, loads in arms:
        worst = max(load.max_violation for load in loads)
        panel = wrapped(arm.label, f"highest MaxVio {worst:.2f}")
        rows.append([{"panel": panel, "arm": arm.label, **vars(load)} for load in loads])
    return pd.DataFrame(chain.from_iterable(rows))
