"""Arms against their baselines: what differs significantly, and what a study could have found."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from src.common import number_format
from src.lab.book.select_arms import StudyArms, UndecidedError
from src.study.analysis import stats
from src.study.analysis.analyse import controls_not_found
from src.study.analysis.arms import arms_of
from src.study.analysis.results import Comparison, Estimate, Proportion
from src.study.analysis.stats import ALPHA


class BaselineComparisons(StudyArms):
    """Differences, paired by seed, with what chance alone gives beside them."""

    def can_rank(self) -> bool:
        """Whether the study found its positive control, if it has one; see Analysis."""
        # The statistics of a large study take seconds, so they are computed only where needed.
        has_control = any(
            arm.baseline is not None and arm.runs[0].is_positive_control
            for arm in arms_of(self.folder.study)
        )
        return not has_control or not controls_not_found(
            [arm for arm in self.arms if arm.is_known_good and arm.baseline is not None]
        )

    def _comparison(self, stability: str, endpoint: str, fields: Mapping[str, Any]) -> Comparison:
        arm = self.one(stability, **fields)
        if endpoint not in arm.comparisons:
            raise UndecidedError(f"{arm.label} is compared with nothing")
        return arm.comparisons[endpoint]

    def detected(self, stability: str, endpoint: str = "nonfinite", **fields: str | None) -> int:
        """1 where the arm is told from chance as lower than its baseline."""
        found = self._comparison(stability, endpoint, fields)
        return int(found.detected and found.difference is not None and found.difference.mean < 0)

    def better(self, stability: str, **fields: str | None) -> int:
        """1 where its loss is lower, beyond chance."""
        return self.detected(stability, "loss", **fields)

    def worse(self, stability: str, **fields: str | None) -> int:
        """1 where its loss is higher, beyond chance."""
        found = self._comparison(stability, "loss", fields)
        return int(found.detected and found.difference is not None and found.difference.mean > 0)

    def fewer_detected(self, except_for: Sequence[str] = ()) -> int:
        """Arms whose failing seeds are fewer than their baseline's, beyond chance."""
        return sum(
            arm.comparisons["nonfinite"].detected
            and arm.nonfinite.events < (arm.baseline_nonfinite or arm.nonfinite).events
            for arm in self.arms
            if arm.comparisons and self.fields_of(arm)["stability"] not in except_for
        )

    def null_detected(self) -> int:
        """Endpoints in which a null arm stands out."""
        found = [c for arm in self.arms if arm.is_null for c in arm.comparisons.values()]
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
        """Adjusted over the arms of the study."""
        found = self._comparison(stability, endpoint, fields).p_value
        if found is None:
            raise UndecidedError(f"{endpoint} of {stability} could not be tested")
        return found

    def smallest_effect(self, stability: str, endpoint: str, **fields: str | None) -> float:
        """See Comparison."""
        found = self._comparison(stability, endpoint, fields).smallest_effect
        if found is None:
            raise UndecidedError(f"no effect of {stability} on {endpoint} could be found")
        return found

    def share_interval(self, stability: str, **fields: str | None) -> str:
        """The difference in the share of failing seeds, with its 95 % interval, as text."""
        found = self._difference(stability, "nonfinite", fields)
        low, high = (number_format.signed(end, 2) for end in (found.low, found.high))
        return f"{number_format.signed(found.mean, 2)} ({low} to {high})"

    def _null_range(self, stability: str, endpoint: str) -> tuple[float, float]:
        found = self._comparison(stability, endpoint, {}).null_range
        if found is None:
            raise UndecidedError(f"{stability} has no range of chance")
        return found

    def greatest_shift(self, stability: str, endpoint: str = "nonfinite_batches") -> float:
        """The furthest that chance has moved a single run from its baseline."""
        return max(map(abs, self._null_range(stability, endpoint)))

    def most_called(self, stability: str, **fields: str | None) -> int:
        """With how many failing seeds at most it would have been told from chance."""
        arm = self.one(stability, **fields)
        share = self.smallest_effect(stability, "nonfinite", **fields)
        untreated = arm.baseline_nonfinite
        assert untreated is not None
        return round((untreated.events / untreated.total - share) * arm.nonfinite.total)

    def null_width(self, stability: str, endpoint: str = "nonfinite_batches") -> float:
        """From the least to the greatest difference that chance gave single runs of all seeds."""
        low, high = self._null_range(stability, endpoint)
        return high - low

    def null_spread(self, stability: str, endpoint: str) -> float:
        """Standard deviation over seeds of a null arm's paired differences, of single runs.

        Raises:
            UndecidedError: fewer than two seeds have one.
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
            raise UndecidedError(f"{stability} has no two seeds with {endpoint}")
        return fmean(spreads)

    def visible(self, stability: str, endpoint: str, *, num_seeds: int) -> float:
        """The smallest mean difference that so many seeds find 8 times of 10, one arm alone."""
        effect = stats.smallest_standardized_effect(num_seeds)
        if effect is None:
            raise UndecidedError(f"{num_seeds} seeds can find nothing")
        return effect * self.null_spread(stability, endpoint)

    def smallest_fall(self, *, num_seeds: int, num_arms: int) -> int:
        """How many fewer of so many seeds must fail to be called, where all fail untreated.

        No other arm of the study is significant: beside one that is, Holm asks for less.
        """
        everything = Proportion(events=num_seeds, total=num_seeds)
        others = (1.0,) * (num_arms - 1)
        share = stats.smallest_share(everything, num_seeds=num_seeds, others=others)
        if share is None:
            raise UndecidedError(f"{num_seeds} seeds can find nothing beside {num_arms} arms")
        return round(share * num_seeds)
