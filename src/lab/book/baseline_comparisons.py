"""Arms compared with their baselines: significant differences, and detectable effects."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from src.common import number_format
from src.lab.book.select_arms import StudyArms, UndecidedError
from src.study.analysis import power
from src.study.analysis.analyse import arm_results, undetected_controls
from src.study.analysis.arms import arms_of
from src.study.analysis.results import ArmResult, Comparison, Estimate
from src.study.analysis.stats import ALPHA


class BaselineComparisons(StudyArms):
    """Differences from the baseline, paired by seed, and the range of the A/A controls."""

    def can_rank(self) -> bool:
        """Whether the study detects the effect of its positive control, if it has one.

        A study of failures has runs without the cause of each, which stand for such a control.
        """
        if self.folder.failures:
            return True
        # The statistics of a large study take seconds, so they are computed only where needed.
        has_control = any(
            arm.baseline is not None and arm.runs[0].is_positive_control
            for arm in arms_of(self.folder.study)
        )
        return not has_control or not undetected_controls(
            [arm for arm in self.arms if arm.is_positive_control and arm.baseline is not None]
        )

    def _comparison(self, stability: str, endpoint: str, fields: Mapping[str, Any]) -> Comparison:
        arm = self.one(stability, **fields)
        if endpoint not in arm.comparisons:
            raise UndecidedError(f"{arm.label} has no baseline")
        return arm.comparisons[endpoint]

    def detected(self, stability: str, endpoint: str = "nonfinite", **fields: str | None) -> int:
        """1 if the arm is significantly lower than its baseline."""
        found = self._comparison(stability, endpoint, fields)
        return int(found.detected and found.difference is not None and found.difference.mean < 0)

    def better(self, stability: str, **fields: str | None) -> int:
        """1 if its loss is significantly lower."""
        return self.detected(stability, "loss", **fields)

    def worse(self, stability: str, **fields: str | None) -> int:
        """1 if its loss is significantly higher."""
        found = self._comparison(stability, "loss", fields)
        return int(found.detected and found.difference is not None and found.difference.mean > 0)

    def num_compared(self, endpoint: str = "nonfinite") -> int:
        """The number of arms that are compared in an endpoint."""
        return sum(c.p_value is not None for c in self._remedies(self.arms, endpoint))

    def num_detected(self, endpoint: str) -> int:
        """The number of arms that are significantly different in an endpoint."""
        return sum(c.detected for c in self._remedies(self.arms, endpoint))

    def num_detected_over_study(self, endpoint: str) -> int:
        """The same if p is adjusted over all arms of the study."""
        arms = arm_results(self.folder.study, family="study")
        return sum(c.detected for c in self._remedies(arms, endpoint))

    def _remedies(self, arms: Sequence[ArmResult], endpoint: str) -> list[Comparison]:
        return [a.comparisons[endpoint] for a in arms if a.comparisons and not a.is_aa_control]

    def fewer_detected(self, except_for: Sequence[str] = ()) -> int:
        """The number of arms with significantly fewer failing runs than the untreated."""
        return sum(
            arm.comparisons["nonfinite"].detected
            and (found := arm.comparisons["nonfinite"].difference) is not None
            and found.mean < 0
            for arm in self.arms
            if arm.comparisons and self.fields_of(arm)["stability"] not in except_for
        )

    def null_detected(self) -> int:
        """The number of endpoints in which an A/A control is significantly different."""
        found = [c for arm in self.arms if arm.is_aa_control for c in arm.comparisons.values()]
        return sum(c.p_value is not None and c.p_value <= ALPHA for c in found)

    def difference(self, stability: str, endpoint: str, **fields: str | None) -> float:
        """The arm's mean minus its baseline's, paired by seed."""
        return self._difference(stability, endpoint, fields).mean

    def _difference(self, stability: str, endpoint: str, fields: Mapping[str, Any]) -> Estimate:
        found = self._comparison(stability, endpoint, fields).difference
        if found is None:
            raise UndecidedError(f"{stability} and its baseline share no seed with {endpoint}")
        return found

    def p_value(self, stability: str, endpoint: str = "nonfinite", **fields: str | None) -> float:
        """P value, adjusted over the arms of the study."""
        found = self._comparison(stability, endpoint, fields).p_value
        if found is None:
            raise UndecidedError(f"{endpoint} of {stability} could not be tested")
        return found

    def chance_if_halved(self, stability: str, **fields: str | None) -> float:
        """The probability that so many of its runs fail if it prevents half of the failures."""
        found = self._comparison(stability, "nonfinite", fields).chance_if_halved
        if found is None:
            raise UndecidedError(f"the failures of {stability} could not be compared")
        return found

    def smallest_effect(self, stability: str, endpoint: str, **fields: str | None) -> float:
        """Minimum detectable effect; for failing runs, the share that a remedy must prevent."""
        found = self._comparison(stability, endpoint, fields).smallest_effect
        if found is None:
            raise UndecidedError(f"no effect of {stability} on {endpoint} could be significant")
        return found

    def share_interval(self, stability: str, **fields: str | None) -> str:
        """The difference in the share of failing seeds, with its 95 % interval, as text."""
        found = self._difference(stability, "nonfinite", fields)
        low, high = (number_format.signed(end, 2) for end in (found.low, found.high))
        return f"{number_format.signed(found.mean, 2)} ({low} to {high})"

    def _aa_range(self, stability: str, endpoint: str) -> tuple[float, float]:
        found = self._comparison(stability, endpoint, {}).aa_range
        if found is None:
            raise UndecidedError(f"{stability} has no A/A control")
        return found

    def greatest_shift(self, stability: str, endpoint: str = "nonfinite_batches") -> float:
        """The largest difference of a single run of the A/A control from its baseline."""
        return max(map(abs, self._aa_range(stability, endpoint)))

    def detectable(self, stability: str, **fields: str | None) -> float:
        """The share of failures that a remedy must prevent to be detected with 80 % power."""
        return self.smallest_effect(stability, "nonfinite", **fields)

    def null_width(self, stability: str, endpoint: str = "nonfinite_batches") -> float:
        """Width of the A/A control's range: largest minus smallest difference of single runs."""
        low, high = self._aa_range(stability, endpoint)
        return high - low

    def null_spread(self, stability: str, endpoint: str) -> float:
        """Standard deviation over seeds of an A/A control's paired differences, of single runs.

        Raises:
            UndecidedError: fewer than two seeds have a difference.
        """
        variant = self.one(stability).variant
        (arm,) = (arm for arm in arms_of(self.folder.study) if arm.variant == variant)
        pairs = arm.pairs(endpoint).values()
        repeats = max((len(pair.arm) for pair in pairs), default=0)
        differences = [
            [pair.arm[i] - fmean(pair.baseline) for pair in pairs if len(pair.arm) > i]
            for i in range(repeats)
        ]
        spreads = [stdev(each) for each in differences if len(each) > 1]
        if not spreads:
            raise UndecidedError(f"{stability} has fewer than two seeds with {endpoint}")
        return fmean(spreads)

    def visible(self, stability: str, endpoint: str, *, num_seeds: int) -> float:
        """Minimum detectable effect of one arm with this number of seeds, with 80 % power.

        For one run of the arm and one untreated run per seed.
        """
        shift = power.detectable_shift(((1, 1),) * num_seeds, bound=ALPHA)
        if shift is None:
            raise UndecidedError(f"{num_seeds} seeds cannot detect any effect")
        # A difference of two runs varies more than one run does.
        return shift * self.null_spread(stability, endpoint) / math.sqrt(2)

    def visible_prevention(self, *, num_seeds: int, num_arms: int) -> float:
        """The share of failures that a remedy must prevent to be detected with 80 % power.

        For one run of the arm and four untreated ones per seed, of which as many fail as in this
        study, if no other arm is significant: beside one, Holm requires less.

        Raises:
            UndecidedError: not even a remedy that prevents all failures would be detected.
        """
        untreated = [
            arm.untreated_nonfinite
            for arm in self.arms
            if arm.untreated_nonfinite is not None and not arm.acts_from and not arm.is_aa_control
        ]
        counts = next((found for found in untreated if found.total), None)
        share = 0.0 if counts is None else counts.events / counts.total
        found = power.detectable_prevention(
            share=share,
            num_seeds=num_seeds,
            num_arm=1,
            num_untreated=4,
            bound=ALPHA / num_arms,
        )
        if found is None:
            raise UndecidedError(f"{num_seeds} seeds cannot detect any effect in {num_arms} arms")
        return found

    def failure_correlation(self) -> float:
        """The correlation of failures within a seed, over the untreated runs."""
        found = [
            arm.failure_correlation
            for arm in self.arms
            if arm.failure_correlation is not None and not arm.is_aa_control
        ]
        if not found:
            raise UndecidedError("no seed has two untreated runs")
        return found[0]
