"""Compares every arm with its baseline, endpoint by endpoint, with an A/A control for scale."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from src.study.analysis import multiple_testing, stats, verdicts
from src.study.analysis.arms import Arm, nearest_aa_control
from src.study.analysis.endpoints import Paired
from src.study.analysis.multiple_testing import Tested
from src.study.analysis.results import Comparison, Estimate
from src.study.analysis.verdicts import Standing


def comparisons(arms: Sequence[Arm]) -> dict[str, dict[str, Comparison]]:
    """Comparisons of all arms that have a baseline, by variant and endpoint.

    P values are adjusted over the arms, separately for each endpoint; the first endpoint is the
    primary one. A/A controls are a family of their own: they are not remedies, and would cost the
    remedies power.
    """
    compared = [arm for arm in arms if arm.baseline is not None]
    found: dict[str, dict[str, Comparison]] = {arm.variant: {} for arm in compared}
    for is_aa_control in (False, True):
        family = {arm.variant: arm for arm in compared if arm.is_aa_control == is_aa_control}
        controls = {name: nearest_aa_control(arm, compared) for name, arm in family.items()}
        for variant, comparison in _primary(family, controls).items():
            found[variant]["nonfinite"] = comparison
        for endpoint in verdicts.WORDS:
            for variant, comparison in _secondary(family, controls, endpoint).items():
                found[variant][endpoint] = comparison
    return found


def _primary(
    family: Mapping[str, Arm], controls: Mapping[str, Arm | None]
) -> dict[str, Comparison]:
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
            aa_range=_aa_range(arm, controls[name], "nonfinite"),
            verdict=standing.untestable()
            if test is None
            else verdicts.of_shares(standing, *shares[name], test),
        )
    return found


def _secondary(
    family: Mapping[str, Arm], controls: Mapping[str, Arm | None], endpoint: str
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
) -> Comparison:
    return Comparison(
        endpoint=endpoint,
        difference=difference,
        aa_range=aa_range,
        p_value=None if test is None else test.p_value,
        smallest_p=None if test is None else test.smallest_p,
        smallest_effect=None if test is None else test.smallest_effect,
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
    """Differences in the share of failing seeds, one for each repeat."""
    runs = [run for each in paired.arm_at_risk.values() for run in each]
    differences = []
    for repeat in sorted({run.repeat for run in runs}):
        arm = {run.seed: [run] for run in runs if run.repeat == repeat}
        baseline = {seed: paired.baseline[seed] for seed in arm}
        one, two = paired.window.proportion(arm), paired.window.proportion(baseline)
        differences.append((one.events - two.events) / one.total)
    return differences
