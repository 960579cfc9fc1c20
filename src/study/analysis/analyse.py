"""From the runs of a study to what it shows."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from src.study.analysis import stats
from src.study.analysis.answer import answer, found_good
from src.study.analysis.arms import Arm, arms_of, nearest_null
from src.study.analysis.compare_arms import comparisons
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


def analyse(study: Study) -> Analysis:
    """All statistics of a study, its answer, and what a reader must know.

    The unit is the seed: repeats of a seed are averaged, or vote, before anything is compared. A
    comparison looks at the steps after the arm's start alone, on seeds that were finite until then
    in the arm and in its baseline.
    """
    arms = arms_of(study)
    results = _results(arms)
    controls = [arm for arm in results if arm.is_known_good and arm.baseline is not None]
    not_found = controls_not_found(controls)
    return Analysis(
        study=study.name,
        arms=results,
        answer=answer(study, results, not_found=not_found, num_needed=len(controls)),
        can_rank=not not_found,
        warnings=warnings(study, results),
    )


def controls_not_found(controls: Sequence[ArmResult]) -> list[ArmResult]:
    """The positive controls of each baseline against which none of them was found.

    One is enough, because a study that finds what is known to work can see such an effect.
    """
    found = {arm.baseline for arm in controls if found_good(arm)}
    return [arm for arm in controls if arm.baseline not in found]


def arm_results(study: Study) -> list[ArmResult]:
    """The statistics of every variant alone, baselines first."""
    return _results(arms_of(study))


def _results(arms: Sequence[Arm]) -> list[ArmResult]:
    compared = comparisons(arms)
    budgets = _budgets(arms)
    return [
        _result(arm, compared.get(arm.variant, {}), nearest_null(arm, arms), budgets)
        for arm in sorted(arms, key=lambda arm: arm.baseline is not None)
    ]


def _budgets(arms: Sequence[Arm]) -> dict[str, float]:
    """By axis, the smallest total of any run that has a loss at its end, and was not cut short."""
    whole = [arm for arm in arms if arm.censored_at is None] or arms
    runs = [run for arm in whole for each in arm.paired.arm.values() for run in each]
    clean = [run for run in runs if clean_loss(run, step=run.steps) is not None]
    totals = {axis: values(clean, lambda run, axis=axis: total(run, axis)) for axis in AXES}  # type: ignore[misc]
    return {axis: min(found) for axis, found in totals.items() if found}


def _result(
    arm: Arm, compared: Mapping[str, Comparison], null: Arm | None, budgets: Mapping[str, float]
) -> ArmResult:
    window, runs = arm.window, [run for each in arm.paired.arm.values() for run in each]
    if arm.paired.baseline:
        candidates, at_risk = len(arm.paired.shared), arm.paired.arm_at_risk
        beside = window.proportion(arm.paired.baseline_at_risk)
    else:
        candidates, beside = len(arm.paired.arm), None
        at_risk = {
            seed: each
            for seed, each in arm.paired.arm.items()
            if all(window.is_at_risk(run) for run in each)
        }
    measures = arm.measures
    # One that ends early spends less than any budget, by whatever clock.
    reached = budgets if arm.censored_at is None else {}
    return ArmResult(
        variant=arm.variant,
        label=arm.label,
        baseline=arm.baseline,
        is_null=arm.is_null,
        is_known_good=arm.runs[0].is_positive_control,
        num_seeds=len(arm.paired.arm),
        num_runs=len(arm.runs),
        outcomes=dict(Counter(run.outcome for run in arm.runs)),
        acts_from=window.start,
        num_failed_before=candidates - len(at_risk),
        censored_at=arm.censored_at,
        nonfinite=window.proportion(at_risk),
        baseline_nonfinite=beside,
        nonfinite_batches=stats.interval(seed_means(at_risk, measures["nonfinite_batches"])),
        first_nonfinite=window.firsts(at_risk),
        spikes=stats.interval(seed_means(at_risk, measures["spikes"])),
        loss=stats.interval(seed_means(arm.paired.arm, _loss_at_end)),
        loss_metric=arm.runs[0].loss_metric,
        num_marked=sum(is_marked(run) for run in runs),
        loss_at_equal=_losses_at(arm.paired.arm, reached),
        loss_difference_at_equal=_differences_at(arm, reached),
        null_arm=None if null is None or arm.baseline is None else null.label,
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
