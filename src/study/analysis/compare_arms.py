"""Compares every arm with untreated runs, endpoint by endpoint, with an A/A control for scale."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from src.study.analysis import multiple_testing, stats, verdicts
from src.study.analysis.arms import Arm, matching_aa_control
from src.study.analysis.endpoints import Paired, values
from src.study.analysis.looks import chance_if_halved
from src.study.analysis.multiple_testing import Tested
from src.study.analysis.results import Comparison, Estimate
from src.study.analysis.verdicts import Standing

FAMILIES = ("study", "baseline")
"""The arms over which p is adjusted: all arms of the study, or those with the same baseline."""

Family = Mapping[str, Arm]


def comparisons(arms: Sequence[Arm], *, family: str = "study") -> dict[str, dict[str, Comparison]]:
    """Comparisons of all arms that have a baseline, by variant and endpoint.

    P values are adjusted over the arms of a family, separately for each endpoint. A/A controls are
    families of their own: they are not remedies, and would cost the remedies power.
    """
    compared = [arm for arm in arms if arm.baseline is not None]
    families: dict[tuple[bool, str | None], dict[str, Arm]] = {}
    for arm in compared:
        key = arm.is_aa_control, arm.baseline if family == "baseline" else None
        families.setdefault(key, {})[arm.variant] = arm
    found: dict[str, dict[str, Comparison]] = {arm.variant: {} for arm in compared}
    for each in families.values():
        controls = {name: matching_aa_control(arm, compared) for name, arm in each.items()}
        for variant, comparison in _primary(each, controls).items():
            found[variant]["nonfinite"] = comparison
        for endpoint in verdicts.WORDS:
            for variant, comparison in _secondary(each, controls, endpoint).items():
                found[variant][endpoint] = comparison
    return found


def failure_correlation(arm: Arm) -> float | None:
    """The correlation of failures within a seed, over the untreated runs of an arm."""
    untreated = arm.paired.untreated_at_risk.values()
    return stats.within_seed_correlation([values(runs, arm.window.failed) for runs in untreated])


def _primary(family: Family, controls: Mapping[str, Arm | None]) -> dict[str, Comparison]:
    shares = {
        name: (
            arm.window.proportion(arm.paired.arm_at_risk),
            arm.window.proportion(arm.paired.untreated_at_risk),
        )
        for name, arm in family.items()
        if arm.paired.at_risk and not arm.window.is_empty
    }
    tested = multiple_testing.shares(
        {name: family[name].pairs("nonfinite") for name in shares},
        {name: untreated for name, (_, untreated) in shares.items()},
        looks={name: family[name].looks for name in shares},
    )
    found = {}
    for name, arm in family.items():
        standing, test = _standing(arm), tested.get(name)
        difference = chance = None
        if test is not None:
            seeds, within = len(arm.paired.at_risk), failure_correlation(arm) or 0.0
            chance = chance_if_halved(*shares[name], num_seeds=seeds, within_seed=within)
            difference = stats.share_difference(*shares[name], num_seeds=seeds, within_seed=within)
        found[name] = _comparison(
            "nonfinite",
            arm,
            test,
            difference=difference,
            chance_if_halved=chance,
            aa_range=_aa_range(arm, controls[name], "nonfinite"),
            verdict=standing.untestable()
            if test is None or chance is None
            else verdicts.of_shares(standing, *shares[name], test, chance_if_halved=chance),
        )
    return found


def _secondary(
    family: Family, controls: Mapping[str, Arm | None], endpoint: str
) -> dict[str, Comparison]:
    pairs = {name: arm.pairs(endpoint) for name, arm in family.items()}
    if endpoint == "nonfinite_tokens" and not any(pairs.values()):
        # Runs of earlier versions did not count tokens.
        return {}
    scores = pairs
    if endpoint == "first_nonfinite":
        scores = {name: arm.paired.log_rank_scores() for name, arm in family.items()}
    least = 2 if endpoint == "loss" else 1
    looks = {name: arm.looks for name, arm in family.items()}
    tested = multiple_testing.means(
        {name: scores[name] for name, each in pairs.items() if len(each) >= least}, looks=looks
    )
    # An effect on scores would say nothing in steps.
    if endpoint != "first_nonfinite":
        tested = multiple_testing.with_detectable_differences(tested, scores, looks=looks)
    found = {}
    for name, arm in family.items():
        standing, test = _standing(arm), tested.get(name)
        difference = stats.interval([pair.difference for pair in pairs[name].values()])
        if test is not None and difference is not None:
            verdict = verdicts.of_means(standing, endpoint, difference, test)
        elif endpoint == "loss" and arm.paired.shared:
            verdict = verdicts.without_loss(len(pairs[name]), len(arm.paired.shared))
        else:
            verdict = standing.untestable()
        found[name] = _comparison(
            endpoint,
            arm,
            test,
            difference=None if test is None else difference,
            aa_range=_aa_range(arm, controls[name], endpoint),
            verdict=verdict,
        )
    return found


def _standing(arm: Arm) -> Standing:
    return Standing(paired=arm.paired, is_aa_control=arm.is_aa_control, censored_at=arm.censored_at)


def _comparison(
    endpoint: str,
    arm: Arm,
    test: Tested | None,
    *,
    difference: Estimate | None,
    aa_range: tuple[float, float] | None,
    verdict: str,
    chance_if_halved: float | None = None,
) -> Comparison:
    return Comparison(
        endpoint=endpoint,
        difference=difference,
        aa_range=aa_range,
        p_value=None if test is None else test.p_value,
        smallest_p=None if test is None else test.smallest_p,
        smallest_effect=None if test is None else test.smallest_effect,
        seeds_for_half=None if test is None else test.seeds_for_half,
        seeds_for_all=None if test is None else test.seeds_for_all,
        chance_if_halved=chance_if_halved,
        verdict=verdict,
        # A significant A/A control is chance or a fault of the study, never a finding.
        detected=test is not None and test.detected and not arm.is_aa_control,
    )


def _aa_range(arm: Arm, control: Arm | None, endpoint: str) -> tuple[float, float] | None:
    """Smallest and largest difference of the A/A control's runs, inside the arm's window."""
    if control is None or (arm.window.is_empty and endpoint != "loss"):
        return None
    sides = control.paired
    paired = Paired(arm=sides.arm, baseline=sides.baseline, window=arm.window)
    if endpoint == "nonfinite":
        found = _share_differences(paired)
    else:
        pairs = paired.pairs(arm.measures[endpoint]).values()
        found = [value - fmean(pair.baseline) for pair in pairs for value in pair.arm]
    return (min(found), max(found)) if found else None


def _share_differences(paired: Paired) -> list[float]:
    """Differences in the share of failing runs, one for each repeat."""
    runs = [run for each in paired.arm_at_risk.values() for run in each]
    differences = []
    for repeat in sorted({run.repeat for run in runs}):
        arm = {run.seed: [run] for run in runs if run.repeat == repeat}
        baseline = {seed: paired.baseline[seed] for seed in arm}
        one, two = paired.window.proportion(arm), paired.window.proportion(baseline)
        differences.append((one.events - two.events) / one.total)
    return differences
