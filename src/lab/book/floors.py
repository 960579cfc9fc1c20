"""What difference a number of seeds can see, from what chance alone has made of a study."""

from statistics import fmean, stdev

from src.lab.book.chosen import Chosen, UndecidedError
from src.study.analysis import stats
from src.study.analysis.arms import arms_of
from src.study.analysis.results import Proportion


class Floors(Chosen):
    """The noise under a study's endpoints."""

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
