"""record.json: the outcome, final values and summary of one run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = 1


def frac_metric(loss_metric: str) -> str:
    """The metric with the share of validation windows that have no finite loss."""
    return loss_metric.replace("/loss", "/nonfinite_frac")


def tokens_metric(loss_metric: str) -> str:
    """The metric with the share of validation tokens that have no finite loss."""
    return loss_metric.replace("/loss", "/nonfinite_tokens")


def outcome(*, guard: Mapping[str, Any], stopped: bool, weights_finite: bool, val: float) -> str:
    """The outcome of a run that was not killed.

    Args:
        guard: the guard's summary.
        stopped: whether the guard ended the run.
        weights_finite: whether all final weights are finite.
        val: val/nonfinite_frac of the last validation.

    Returns:
        stopped; collapsed (over half of the steps in the last seventh were skipped, the weights
        are not finite, or no validation window is finite); intermittent (non-finite steps, but
        recovered); clean.
    """
    if stopped:
        return "stopped"
    if guard["skipped_tail_frac"] > 0.5 or not weights_finite or val >= 1.0:
        return "collapsed"
    return "clean" if guard["first_nonfinite_step"] is None else "intermittent"


def final_values(
    lines: Sequence[Mapping[str, float]], validation: Mapping[str, float]
) -> dict[str, float]:
    """The metrics of the last logged training line and of the last validation.

    A metric that was not finite there is absent, however good it was earlier.
    """
    training = next((line for line in reversed(lines) if "lr" in line), {})
    values = {k: v for k, v in training.items() if k != "step" and not k.startswith("val")}
    return values | dict(validation)


def results(record: Mapping[str, Any], *, loss: str) -> dict[str, float]:
    """The summary of a run, for MLflow and for the report: the same names in every run.

    Values that are missing or not finite are left out; for example, a run without a non-finite
    step has no `first_nonfinite_step`.

    Args:
        record: record.json's content; what an earlier version or a killed run lacks is left out.
        loss: the metric by which the run is judged, such as val/loss.
    """
    guard, spikes = record.get("guard", {}), record.get("spikes", {})
    final = record.get("final", {})
    nonfinite, spiked = guard.get("nonfinite_steps"), spikes.get("steps")
    values = {
        "val_loss": final.get(loss),
        "val_nonfinite_frac": final.get(frac_metric(loss)),
        "val_nonfinite_tokens": final.get(tokens_metric(loss)),
        "nonfinite_steps": None if nonfinite is None else len(nonfinite),
        "first_nonfinite_step": min(nonfinite or (), default=None),
        "skipped_steps": guard.get("skipped_steps"),
        "spikes": None if spiked is None else len(spiked),
        "grad_norm_max": spikes.get("grad_norm_max"),
        "steps": record.get("steps"),
        "tokens": record.get("tokens"),
        "seconds": record.get("wall_seconds"),
        "tokens_per_second": record.get("tokens_per_second"),
    }
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


def verdict(record: dict[str, Any]) -> str | None:
    """One line on what went wrong in a run, with its cause; None if nothing did."""
    guard, incident = record["guard"], record["incident"]
    if guard["first_nonfinite_step"] is None:
        if record["outcome"] != "stopped":
            return None
        return f"stopped by an early warning: {record['alarms'][0]['line']}"
    begin = record["steps"] - record["own_steps"]
    # A step that ended the run with an error is not counted in record["steps"].
    steps = max(record["steps"], *guard["nonfinite_steps"])
    # The guard's counts of a branch include the steps of its source.
    bad = [step for step in guard["nonfinite_steps"] if step > begin]
    what = "loss" if guard["nonfinite_loss_steps"] else "gradients"
    why = "" if incident is None else f": {incident['cause']}"
    if bad and len(bad) == steps - begin:
        how = "skipped" if guard["skipped_steps"] >= len(bad) else "not finite"
        whole = "the only step was" if len(bad) == 1 else f"all {len(bad):,} steps were"
        return f"nothing was learned: {whole} {how} (non-finite {what} from step {bad[0]}{why})"
    first = guard["first_nonfinite_step"] if incident is None else incident["step"]
    return (
        f"{record['outcome'] or record['status']}: {len(guard['nonfinite_steps']):,} of"
        f" {steps:,} steps were not finite, the first at step {first}{why}"
    )
