"""Every arm against its baseline, endpoint by endpoint, and the null arm beside it."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from src.study.analysis import multiple_testing, stats, verdicts
from src.study.analysis.arms import Arm, nearest_null
from src.study.analysis.endpoints import Paired
from src.study.analysis.multiple_testing import Tested
from src.study.analysis.results import Comparison, Estimate
from src.study.analysis.verdicts import Standing


def comparisons(arms: Sequence[Arm]) -> dict[str, dict[str, Comparison]]:
    """By variant and endpoint, of all arms that have a baseline.

    P values are adjusted over the arms, each endpoint by itself: the first is the primary one.
    Null arms are a family by themselves; they would cost the others power, and are no remedies.
    """
    compared = [arm for arm in arms if arm.baseline is not None]
    found: dict[str, dict[str, Comparison]] = {arm.variant: {} for arm in compared}
    for is_null in (False, True):
        family = {arm.variant: arm for arm in compared if arm.is_null == is_null}
        nulls = {name: nearest_null(arm, compared) for name, arm in family.items()}
        for variant, comparison in _primary(family, nulls).items():
            found[variant]["nonfinite"] = comparison
        for endpoint in verdicts.WORDS:
            for variant, comparison in _secondary(family, nulls, endpoint).items():
                found[variant][endpoint] = comparison
    return found


def _primary(family: Mapping[str, Arm], nulls: Mapping[str, Arm | None]) -> dict[str, Comparison]:
    shares = {
        name: (
            arm.window.proportion(arm.paired.arm_at_risk),
            arm.window.proportion(arm.paired.baseline_at_risk),
        )
        for name, arm in family.items()
        if arm.paired.at_risk and not arm.window.is_empty
    }
    tested = multiple_testing.shares(shares)
    found = {}
    for name, arm in family.items():
        standing, test = _standing(arm), tested.get(name)
        found[name] = _comparison(
            "nonfinite",
            arm,
            test,
            difference=None if test is None else stats.share_difference(*shares[name]),
            null_range=_null_range(arm, nulls[name], "nonfinite"),
            verdict=standing.untestable()
            if test is None
            else verdicts.of_shares(standing, *shares[name], test),
        )
    return found


def _secondary(
    family: Mapping[str, Arm], nulls: Mapping[str, Arm | None], endpoint: str
) -> dict[str, Comparison]:
    pairs = {name: arm.pairs(endpoint) for name, arm in family.items()}
    least = 2 if endpoint == "loss" else 1
    tested = multiple_testing.means(
        {name: each for name, each in pairs.items() if len(each) >= least}
    )
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
            null_range=_null_range(arm, nulls[name], endpoint),
            verdict=verdict,
        )
    return found


def _standing(arm: Arm) -> Standing:
    return Standing(paired=arm.paired, is_null=arm.is_null, censored_at=arm.censored_at)


def _comparison(
    endpoint: str,
    arm: Arm,
    test: Tested | None,
    *,
    difference: Estimate | None,
    null_range: tuple[float, float] | None,
    verdict: str,
) -> Comparison:
    return Comparison(
        endpoint=endpoint,
        difference=difference,
        null_range=null_range,
        p_value=None if test is None else test.p_value,
        smallest_p=None if test is None else test.smallest_p,
        smallest_effect=None if test is None else test.smallest_effect,
        verdict=verdict,
        # A null arm that stands out is chance, or a fault of the study; it is never a finding.
        detected=test is not None and test.detected and not arm.is_null,
    )


def _null_range(arm: Arm, null: Arm | None, endpoint: str) -> tuple[float, float] | None:
    """Least and greatest difference of the null arm's runs, inside the window of the arm."""
    if null is None or (arm.window.is_empty and endpoint != "loss"):
        return None
    sides = null.paired
    paired = Paired(arm=sides.arm, baseline=sides.baseline, window=arm.window)
    if endpoint == "nonfinite":
        found = _share_differences(paired)
    else:
        pairs = paired.pairs(arm.measures[endpoint]).values()
        found = [value - fmean(pair.baseline) for pair in pairs for value in pair.arm]
    return (min(found), max(found)) if found else None


def _share_differences(paired: Paired) -> list[float]:
    """In the share of seeds, of each repeat by itself."""
    runs = [run for each in paired.arm_at_risk.values() for run in each]
    differences = []
    for repeat in sorted({run.repeat for run in runs}):
        arm = {run.seed: [run] for run in runs if run.repeat == repeat}
        baseline = {seed: paired.baseline[seed] for seed in arm}
        one, two = paired.window.proportion(arm), paired.window.proportion(baseline)
        differences.append((one.events - two.events) / one.total)
    return differences
