"""A study as two data frames, of runs and of arms: for CSV files, tables and notebooks."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from src.common import number_format
from src.common.record import frac_metric, tokens_metric
from src.study.analysis.endpoints import AXES, clean_loss
from src.study.analysis.expert_loads import layer_loads
from src.study.analysis.looks import Looks
from src.study.analysis.results import Analysis, ArmResult, Estimate, Proportion
from src.study.read.collect import Run, Study, flat

Row = dict[str, Any]

ENDPOINTS = {
    "nonfinite": ("non-finite runs, share", 2),
    "nonfinite_batches": ("non-finite batches", 1),
    "first_nonfinite": ("first non-finite step", 0),
    "nonfinite_tokens": ("non-finite validation tokens, share", 3),
    "spikes": ("spikes", 1),
    "loss": ("val/loss", 3),
}
"""By endpoint: its name in tables, and its decimals."""

VARIED_SECTIONS = ("recipe", "attention", "ffn", "model", "data")
"""Sections whose differing fields results.csv lists; variant names already list the remedies."""

OUTCOMES = ("clean", "intermittent", "collapsed", "stopped", "failed", "killed", "unfinished")


def arms_frame(study: Study, analysis: Analysis) -> pd.DataFrame:
    """One row per arm, in the order of the analysis. Unknown values are None."""
    # With dtype object, unknown values do not turn counts into floats.
    rows = [_arm_row(arm, study.of(arm.variant)) for arm in analysis.arms]
    return pd.DataFrame(rows, dtype=object)


def _arm_row(arm: ArmResult, runs: Sequence[Run]) -> Row:
    damaged = [run for run in runs if clean_loss(run, step=run.steps) is None]
    losses = [value for run in damaged if (value := run.results.get("val_loss")) is not None]
    row: Row = {
        "variant": arm.variant,
        "label": arm.label,
        "baseline": arm.baseline,
        "role": role(arm),
        "num_seeds": arm.num_seeds,
        "num_runs": arm.num_runs,
        **{f"runs_{name}": arm.outcomes.get(name, 0) for name in OUTCOMES},
        "acts_from": arm.acts_from,
        # As a number, which a CSV file gives back as it was.
        "trains_alike": int(arm.trains_alike),
        "censored_at": arm.censored_at,
        "num_failed_before": arm.num_failed_before,
        **_proportion("nonfinite", arm.nonfinite),
        **_proportion("untreated_nonfinite", arm.untreated_nonfinite),
        **_estimate("nonfinite_batches", arm.nonfinite_batches),
        "first_nonfinite": " ".join(map(str, arm.first_nonfinite)),
        **_estimate("spikes", arm.spikes),
        "loss_metric": arm.loss_metric,
        **_estimate("loss", arm.loss),
        "damaged_runs": len(losses),
        "damaged_loss": fmean(losses) if losses else None,
        "marked_runs": arm.num_marked,
        "null_arm": arm.aa_control,
        "tokens": _known(arm.tokens),
        "active_flops": _known(arm.active_flops),
        "seconds": _known(arm.seconds),
        "own_steps": _known(arm.own_steps),
    }
    for axis in AXES:
        row[f"loss_at_equal_{axis}"] = arm.loss_at_equal.get(axis)
        row[f"loss_difference_at_equal_{axis}"] = arm.loss_difference_at_equal.get(axis)
    for endpoint in ENDPOINTS:
        row |= _comparison(arm, endpoint)
    return row


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def role(arm: ArmResult) -> str:
    """The arm's role in the study; empty for a remedy under test."""
    if arm.is_aa_control:
        return "A/A control"
    if arm.is_positive_control:
        return "positive control"
    return "baseline" if arm.baseline is None else ""


def _proportion(name: str, proportion: Proportion | None) -> Row:
    return {
        f"{name}_runs": None if proportion is None else proportion.events,
        f"{name}_total": None if proportion is None else proportion.total,
    }


def _estimate(name: str, estimate: Estimate | None) -> Row:
    fields = ("mean", "low", "high", "num_seeds")
    return {f"{name}_{f}": None if estimate is None else getattr(estimate, f) for f in fields}


def _comparison(arm: ArmResult, endpoint: str) -> Row:
    found = arm.comparisons.get(endpoint)
    low, high = (None, None) if found is None or found.aa_range is None else found.aa_range
    row = _estimate(f"{endpoint}_difference", None if found is None else found.difference)
    row |= {f"{endpoint}_null_low": low, f"{endpoint}_null_high": high}
    for name in (
        "p_value",
        "smallest_p",
        "smallest_effect",
        "seeds_for_half",
        "detected",
        "verdict",
    ):
        value = None if found is None else getattr(found, name)
        row[f"{endpoint}_{name}"] = int(value) if isinstance(value, bool) else value
    return row


def runs_frame(study: Study, analysis: Analysis) -> pd.DataFrame:
    """One row per run. Unknown values are None. `from_csv` rebuilds a study from it."""
    varied = _varied(study.runs)
    rows = [
        _run_row(run, arm, varied, study.looks.get(run.variant, ()))
        for arm in analysis.arms
        for run in study.of(arm.variant)
    ]
    return pd.DataFrame(rows, dtype=object)


def _varied(runs: Sequence[Run]) -> list[str]:
    """Fields of the configuration, other than the remedies', in which runs differ."""
    flats = [flat(run.config, VARIED_SECTIONS) for run in runs]
    fields = dict.fromkeys(field for each in flats for field in each)
    return [name for name in fields if len({str(each.get(name)) for each in flats}) > 1]


def _assigned(field: str, value: Any) -> str:
    """`norm_eps=1e-09`, without blanks, which separate the fields of a row."""
    return f"{field.rpartition('.')[2]}={value}".replace(" ", "")


def _run_row(run: Run, arm: ArmResult, varied: Sequence[str], looks: Looks) -> Row:
    record, results = run.record, run.results
    spikes, best = record.get("spikes", {}), record.get("best", {})
    incident, own = run.incident or {}, flat(run.config, VARIED_SECTIONS)
    after = [step for step in run.nonfinite_steps if step > arm.acts_from]
    return {
        "variant": run.variant,
        "label": arm.label,
        **run.axes,
        "seed": run.seed,
        "repeat": run.repeat,
        "baseline": run.baseline,
        # Of a sequential study, the first look that has this seed.
        "look": next((n for n, seeds in enumerate(looks, 1) if run.seed in seeds), None),
        "status": run.status,
        "on_nonfinite": run.config.get("guard", {}).get("on_nonfinite"),
        "outcome": run.outcome,
        "learning_rate": run.config["recipe"]["learning_rate"],
        "vocab_size": record.get("vocab_size"),
        "varied": " ".join(_assigned(field, own[field]) for field in varied if field in own),
        "max_steps": run.max_steps,
        "steps": run.steps,
        "own_steps": own_steps(run),
        "acts_from": run.acts_from,
        "nonfinite_steps": spans(run.nonfinite_steps),
        "nonfinite_batches": results.get("nonfinite_steps", 0),
        "nonfinite_batches_after": len(after),
        "first_nonfinite": results.get("first_nonfinite_step"),
        "first_nonfinite_after": min(after, default=None),
        "skipped_steps": results.get("skipped_steps"),
        "spike_steps": spans(run.spike_steps),
        "spikes": results.get("spikes", 0),
        "spikes_after": sum(step > arm.acts_from for step in run.spike_steps),
        "grad_norm_max": results.get("grad_norm_max"),
        "grad_norm_max_step": spikes.get("grad_norm_max_step"),
        "loss_metric": arm.loss_metric,
        "loss": results.get("val_loss"),
        "nonfinite_frac": results.get("val_nonfinite_frac"),
        "nonfinite_tokens": results.get("val_nonfinite_tokens"),
        "validations": validations(run),
        "max_violation": _max_violation(run),
        "best_loss": best.get("val/loss"),
        "best_nonfinite_frac": best.get("val/nonfinite_frac"),
        "best_step": best.get("step"),
        "train_loss": run.final("train/loss"),
        "init": (record.get("init") or {}).get("path"),
        "initial_loss": run.initial_loss,
        "cache_bytes_per_token": record.get("cache_bytes_per_token"),
        "tokens": results.get("tokens"),
        "active_flops": record.get("active_flops"),
        "seconds": results.get("seconds"),
        "alarm_step": run.alarms[0]["step"] if run.alarms else None,
        "incident_step": incident.get("step"),
        "incident_module": incident.get("module"),
        "incident_cause": incident.get("cause"),
        "config_hash": record.get("config_hash") or run.config.get("config_hash"),
        "git_sha": record.get("git_sha"),
        "code": record.get("code"),
        "torch": record.get("versions", {}).get("torch"),
        "device": record.get("device", {}).get("name"),
    }


def spans(steps: Sequence[int]) -> str:
    """Steps as text, with consecutive ones as a range: `7 12-15`."""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and step == found[-1][-1] + 1:
            found[-1] = [found[-1][0], step]
        else:
            found.append([step])
    return " ".join("-".join(map(str, span)) for span in found)


def validations(run: Run) -> str:
    """All validations, each as `40:2.91:0.0:0.0`: step, loss, shares of windows and of tokens.

    The shares are of what is not finite; that of tokens is missing in runs of earlier versions.
    """
    metric = run.loss_metric
    frac, tokens = frac_metric(metric), tokens_metric(metric)
    return " ".join(
        f"{int(line['step'])}:{line.get(metric, '')}:{line[frac]}"
        + (f":{line[tokens]}" if tokens in line else "")
        for line in run.lines
        if frac in line
    )


def _max_violation(run: Run) -> float | None:
    """MaxVio in the last quarter of the run, mean over the layers; None without experts."""
    loads = layer_loads([run])
    return fmean(load.max_violation for load in loads) if loads else None


def own_steps(run: Run) -> int:
    """The steps that the run trained itself, after a state shared with another run."""
    return int(run.record.get("own_steps", run.steps))


def headline(analysis: Analysis) -> dict[str, float]:
    """The metrics of the sweep's own run in MLflow."""
    metrics = {"report/can_rank": float(analysis.can_rank)}
    for arm in analysis.arms:
        name = f"report/{number_format.metric_safe(arm.label)}"
        metrics[f"{name}/seeds"] = float(arm.num_seeds)
        counts = [("nonfinite_batches", arm.nonfinite_batches), ("spikes", arm.spikes)]
        if arm.censored_at is not None or not arm.nonfinite.total:
            # Zero failures that only reflect fewer or shared steps would look like the best result.
            counts = []
        else:
            metrics[f"{name}/nonfinite_runs"] = float(arm.nonfinite.events)
        for key, estimate in (*counts, ("val_loss", arm.loss)):
            if estimate is not None:
                metrics[f"{name}/{key}"] = estimate.mean
        loss = arm.comparisons.get("loss")
        if loss is not None and loss.difference is not None:
            metrics[f"{name}/val_loss_difference"] = loss.difference.mean
    return {key: value for key, value in metrics.items() if math.isfinite(value)}
