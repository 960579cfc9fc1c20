"""The comparison of runs that were made elsewhere: each arm against the control, within seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from src.common.number_format import fixed, p_equals, signed
from src.study.analysis import multiple_testing, stats
from src.study.analysis.multiple_testing import Tested
from src.study.analysis.permutation import Pair
from src.study.analysis.results import Estimate, Proportion
from src.study.analysis.verdicts import TOO_FEW_RUNS, fraction
from src.study.read.outside_runs import OutsideRun, OutsideStudy

FAILURES, VALUES = "failures", "values"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An arm against the control, on the seeds that both have."""

    difference: Estimate
    """Of the share of failing runs, or of the mean over seeds."""
    tested: Tested
    verdict: str


@dataclass(frozen=True, kw_only=True)
class OutsideArm:
    """One arm of a table."""

    name: str
    is_control: bool
    num_seeds: int
    failed: Proportion
    """Runs that failed."""
    mean: Estimate | None
    """Mean over seeds of the values that are finite."""
    effects: Mapping[str, Effect]
    """By endpoint, FAILURES and VALUES; without those that cannot be compared."""


def compare(study: OutsideStudy, controls: Sequence[str]) -> list[OutsideArm]:
    """Compares all arms with the control, with Holm's correction over the arms of an endpoint.

    Args:
        study: the runs.
        controls: the arms whose runs are untreated.
    """
    by_arm = {arm: _by_seed(study, [arm]) for arm in study.arms}
    untreated = _by_seed(study, controls)
    effects: dict[str, dict[str, Effect]] = {arm: {} for arm in study.arms}
    for endpoint in endpoints(study):
        pairs = {
            arm: found
            for arm, runs in by_arm.items()
            if arm not in controls and (found := _pairs(study, runs, untreated, endpoint))
        }
        sides = {
            arm: tuple(
                _failed(study, {seed: side[seed] for seed in by_arm[arm].keys() & untreated.keys()})
                for side in (by_arm[arm], untreated)
            )
            for arm in pairs
        }
        if endpoint == FAILURES:
            tested = multiple_testing.shares(pairs, {arm: sides[arm][1] for arm in pairs})
        else:
            tested = multiple_testing.with_detectable_differences(
                multiple_testing.means(pairs), pairs
            )
        for arm, found in pairs.items():
            if endpoint == FAILURES:
                within_seed = stats.within_seed_correlation(
                    [pair.baseline for pair in found.values()]
                )
                difference = stats.share_difference(
                    sides[arm][0],
                    sides[arm][1],
                    num_seeds=len(found),
                    within_seed=within_seed or 0.0,
                )
            else:
                difference = stats.interval([pair.difference for pair in found.values()])
            assert difference is not None
            verdict = _verdict(tested[arm], difference, endpoint)
            effects[arm][endpoint] = Effect(
                difference=difference, tested=tested[arm], verdict=verdict
            )
    arms = []
    for arm, runs in by_arm.items():
        means = [fmean(v) for each in runs.values() if (v := _finite(each))]
        arms.append(
            OutsideArm(
                name=arm,
                is_control=arm in controls,
                num_seeds=len(runs),
                failed=_failed(study, runs),
                mean=None if study.is_failure else stats.interval(means),
                effects=effects[arm],
            )
        )
    return arms


def endpoints(study: OutsideStudy) -> list[str]:
    """What is compared, the primary one first: failures if any run failed, and values.

    This depends on all runs alike, whatever their arm, so that it does not favour any.
    """
    failures = [FAILURES] if any(has_failed(study, run) for run in study.runs) else []
    return failures or [FAILURES] if study.is_failure else [*failures, VALUES]


def sentences(study: OutsideStudy, arms: Sequence[OutsideArm]) -> list[str]:
    """The answer: what failed, which arms differ, and what more runs would show."""
    control = [arm for arm in arms if arm.is_control]
    names = " and ".join(arm.name for arm in control)
    compared = endpoints(study)
    if compared[0] == FAILURES:
        events, total = (
            sum(getattr(arm.failed, part) for arm in control) for part in ("events", "total")
        )
        said = [f"With {names} {events} of {total} runs fail."]
    else:
        said = [f"No run fails; {study.endpoint} is compared, with {names} as the control."]
    for endpoint in compared:
        said += _of_endpoint(study, [arm for arm in arms if not arm.is_control], endpoint)
    if max(arm.num_seeds for arm in arms) == 1:
        said.append("For an answer run at least 6 seeds of every arm.")
    return said


def _of_endpoint(study: OutsideStudy, arms: Sequence[OutsideArm], endpoint: str) -> list[str]:
    where = ""
    if endpoint == VALUES:
        has_failures = endpoints(study)[0] == FAILURES
        where = f"{study.endpoint}{' of finite runs' if has_failures else ''}: "
    known = [arm for arm in arms if endpoint in arm.effects]
    known.sort(key=lambda arm: arm.effects[endpoint].difference.mean)
    sizes = {arm.name: _size(arm, endpoint) for arm in known}
    if not known:
        return [f"{where}no arm shares a seed with the control."]
    if max(arm.effects[endpoint].difference.num_seeds for arm in known) == 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return [f"{where}1 seed, no interval: {listed}."]
    detected = [arm for arm in known if arm.effects[endpoint].tested.detected]
    said = [f"{where}{arm.name}: {arm.effects[endpoint].verdict}." for arm in detected]
    unknown = [arm for arm in known if arm not in detected]
    if unknown:
        listed = ", ".join(f"{arm.name} ({sizes[arm.name]})" for arm in unknown)
        said.append(f"{where}{'cannot' if where else 'Cannot'} tell: {listed}.")
    needed = [n for arm in unknown if (n := arm.effects[endpoint].tested.seeds_for_half)]
    if needed and max(needed) > max(arm.num_seeds for arm in unknown):
        said.append(f"To see a halving of the failures, run {max(needed)} seeds of every arm.")
    return said


def _size(arm: OutsideArm, endpoint: str) -> str:
    if endpoint == FAILURES:
        return f"{fraction(arm.failed)} fail"
    return signed(arm.effects[endpoint].difference.mean)


def _verdict(tested: Tested, difference: Estimate, endpoint: str) -> str:
    if difference.num_seeds == 1:
        return "1 seed, no interval"
    p = f"p {p_equals(tested.p_value)}"
    if tested.detected:
        word = "lower" if difference.mean < 0 else "higher"
        if endpoint == FAILURES:
            word = "fewer runs fail" if difference.mean < 0 else "more runs fail"
        ends = f"{signed(difference.low)} to {signed(difference.high)}"
        return f"{word}, by {fixed(abs(difference.mean))} ({ends}; {p})"
    if tested.smallest_p > tested.bound:
        return f"cannot tell: {p}; {TOO_FEW_RUNS}"
    if tested.smallest_effect is None:
        return f"cannot tell: {p}"
    if endpoint == FAILURES:
        prevented = f"{100 * tested.smallest_effect:.0f} %"
        return f"cannot tell: {p}; detectable with 80 % power: {prevented} of failures prevented"
    return f"cannot tell: {p}; minimum detectable effect {fixed(tested.smallest_effect)}"


Runs = Mapping[str, Sequence[OutsideRun]]


def _by_seed(study: OutsideStudy, arms: Sequence[str]) -> dict[str, list[OutsideRun]]:
    found: dict[str, list[OutsideRun]] = {}
    for run in study.runs:
        if run.arm in arms:
            found.setdefault(run.seed, []).append(run)
    return found


def _pairs(study: OutsideStudy, arm: Runs, untreated: Runs, endpoint: str) -> dict[int, Pair]:
    pairs = {}
    for place, seed in enumerate(sorted(arm.keys() & untreated.keys())):
        sides = arm[seed], untreated[seed]
        if endpoint == FAILURES:
            values = [[float(has_failed(study, run)) for run in side] for side in sides]
        else:
            values = [_finite(side) for side in sides]
        if all(values):
            pairs[place] = Pair(arm=tuple(values[0]), baseline=tuple(values[1]))
    return pairs


def has_failed(study: OutsideStudy, run: OutsideRun) -> bool:
    """Whether a run has no finite value, or a value that says so."""
    return run.value is None or (study.is_failure and run.value == 1.0)


def _failed(study: OutsideStudy, runs: Runs) -> Proportion:
    flags = [has_failed(study, run) for each in runs.values() for run in each]
    return Proportion(events=sum(flags), total=len(flags))


def _finite(runs: Sequence[OutsideRun]) -> list[float]:
    return [run.value for run in runs if run.value is not None]
