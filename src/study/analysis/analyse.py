"""The whole analysis of a study: its runs go in, statistics and an answer come out."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from src.study.analysis import stats
from src.study.analysis.answer import answer, reduces_failures
from src.study.analysis.arms import Arm, arms_of, matching_aa_control
from src.study.analysis.compare_arms import comparisons, failure_correlation
from src.study.analysis.endpoints import (
    AXES,
    Measure,
    Runs,
    clean_loss,
    is_marked,
    loss_at,
    seed_means,
    total,
    values,
)
from src.study.analysis.results import Analysis, ArmResult, Comparison
from src.study.analysis.warnings import warnings
from src.study.read.collect import Run, Study


def analyse(study: Study, *, family: str = "study") -> Analysis:
    """All statistics of a study, its answer and its warnings.

    An arm is compared with untreated runs of the same seeds: those of its baseline, and those of
    the A/A control that begins to act where it does. A comparison uses only the steps after the arm
    begins to act, and only seeds that were finite until then in both the arm and its baseline.

    Args:
        study: its runs.
        family: the arms over which p is adjusted, of FAMILIES.
    """
    arms = arms_of(study)
    results = _results(arms, family)
    controls = [arm for arm in results if arm.is_positive_control and arm.baseline is not None]
    undetected = undetected_controls(controls)
    return Analysis(
        study=study.name,
        arms=results,
        answer=answer(study, results, undetected=undetected, num_controls=len(controls)),
        can_rank=not undetected,
        warnings=warnings(study, results),
    )


def undetected_controls(controls: Sequence[ArmResult]) -> list[ArmResult]:
    """The positive controls of every baseline against which no positive control was detected.

    One detected control is enough: it shows that the study can detect such an effect.
    """
    detected = {arm.baseline for arm in controls if reduces_failures(arm)}
    return [arm for arm in controls if arm.baseline not in detected]


def arm_results(study: Study, *, family: str = "study") -> list[ArmResult]:
    """The statistics of every arm, baselines first, without answer and warnings."""
    return _results(arms_of(study), family)


def _results(arms: Sequence[Arm], family: str) -> list[ArmResult]:
    compared = comparisons(arms, family=family)
    budgets = _budgets(arms)
    return [
        _result(arm, compared.get(arm.variant, {}), matching_aa_control(arm, arms), budgets)
        for arm in sorted(arms, key=lambda arm: arm.baseline is not None)
    ]


def _budgets(arms: Sequence[Arm]) -> dict[str, float]:
    """By axis, the smallest total cost of any run that has a final loss and did not end early."""
    whole = [arm for arm in arms if arm.censored_at is None] or arms
    runs = [run for arm in whole for each in arm.paired.arm.values() for run in each]
    clean = [run for run in runs if clean_loss(run, step=run.steps) is not None]
    totals = {axis: values(clean, lambda run, axis=axis: total(run, axis)) for axis in AXES}  # type: ignore[misc]
    return {axis: min(found) for axis, found in totals.items() if found}


def _result(
    arm: Arm, compared: Mapping[str, Comparison], control: Arm | None, budgets: Mapping[str, float]
) -> ArmResult:
    window, runs = arm.window, [run for each in arm.paired.arm.values() for run in each]
    if arm.paired.baseline:
        candidates, at_risk = len(arm.paired.shared), arm.paired.arm_at_risk
        untreated_nonfinite = window.proportion(arm.paired.untreated_at_risk)
    else:
        candidates, untreated_nonfinite = len(arm.paired.arm), None
        at_risk = {
            seed: each
            for seed, each in arm.paired.arm.items()
            if all(window.is_at_risk(run) for run in each)
        }
    measures = arm.measures
    # An arm that ends early spends less than the budget on every axis.
    reached = budgets if arm.censored_at is None else {}
    return ArmResult(
        variant=arm.variant,
        label=arm.label,
        baseline=arm.baseline,
        is_aa_control=arm.is_aa_control,
        is_positive_control=arm.runs[0].is_positive_control,
        num_seeds=len(arm.paired.arm),
        num_runs=len(arm.runs),
        outcomes=dict(Counter(run.outcome for run in arm.runs)),
        acts_from=window.start,
        num_failed_before=candidates - len(at_risk),
        num_at_risk=len(at_risk),
        failure_correlation=failure_correlation(arm),
        trains_alike=arm.baseline is not None and window.is_empty and arm.censored_at is None,
        censored_at=arm.censored_at,
        num_looks=len(arm.looks),
        nonfinite=window.proportion(at_risk),
        untreated_nonfinite=untreated_nonfinite,
        nonfinite_batches=stats.interval(seed_means(at_risk, measures["nonfinite_batches"])),
        first_nonfinite=window.firsts(at_risk),
        spikes=stats.interval(seed_means(at_risk, measures["spikes"])),
        loss=stats.interval(seed_means(arm.paired.arm, _loss_at_end)),
        loss_metric=arm.runs[0].loss_metric,
        num_marked=sum(is_marked(run) for run in runs),
        loss_at_equal=_losses_at(arm.paired.arm, reached),
        loss_difference_at_equal=_differences_at(arm, reached),
        aa_control=None if control is None or arm.baseline is None else control.label,
        comparisons=dict(compared),
        tokens=_mean(runs, lambda run: total(run, "tokens")),
        active_flops=_mean(runs, lambda run: total(run, "active_flops")),
        seconds=_mean(runs, lambda run: total(run, "seconds")),
        own_steps=_mean(runs, lambda run: run.record.get("own_steps")),
    )


def _loss_at_end(run: Run) -> float | None:
    return clean_loss(run, step=run.steps)


def _clean_loss_at(axis: str, budget: float) -> Measure:
    return lambda run: None if _loss_at_end(run) is None else loss_at(run, budget, axis)


def _losses_at(runs: Runs, budgets: Mapping[str, float]) -> dict[str, float | None]:
    losses: dict[str, float | None] = dict.fromkeys(AXES)
    for axis, budget in budgets.items():
        found = seed_means(runs, _clean_loss_at(axis, budget))
        losses[axis] = fmean(found) if found else None
    return losses


def _differences_at(arm: Arm, budgets: Mapping[str, float]) -> dict[str, float | None]:
    differences: dict[str, float | None] = dict.fromkeys(AXES)
    for axis, budget in budgets.items():
        measure = _clean_loss_at(axis, budget)
        pairs = arm.paired.pairs(measure).values()
        differences[axis] = fmean(pair.difference for pair in pairs) if pairs else None
    return differences


def _mean(runs: Sequence[Run], measure: Measure) -> float:
    found = values(runs, measure)
    return fmean(found) if found else math.nan
