"""Whether the ranking of the remedies holds: with other seeds, and under other conditions."""

import numpy as np
from scipy import stats

from src.lab.book.select_arms import UndecidedError, statistic
from src.lab.remedies.failure_files import CONTROL, LOSS
from src.lab.remedies.matrix import RemedyMatrix


class RemedyRankings(RemedyMatrix):
    """What page templates and predictions.yaml may ask about the ranks of the remedies."""

    def rank_agreement(self, failure: str) -> float:
        """Kendall's tau between the ranks of the remedies in two halves of the seeds.

        Raises:
            UndecidedError: too few remedies have been run on all seeds, or the ranks of a half are
                all alike.
        """
        seeds, names = self._run_on_all_seeds(failure)
        halves = seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]
        if len(names) < 2:
            raise UndecidedError(f"{len(names)} remedies have been run on all seeds of {failure}")
        one, two = ([self.undone(failure, name, half) for name in names] for half in halves)
        tau = float(stats.kendalltau(one, two).statistic)
        if np.isnan(tau):
            raise UndecidedError(
                f"the remedies of {failure} all have the same effect in one half of the seeds"
            )
        return tau

    def num_ranked(self, failure: str) -> int:
        """The number of remedies that `rank_agreement` ranks."""
        return len(self._run_on_all_seeds(failure)[1])

    def repeat_agreement(self, failure: str) -> float:
        """Kendall's tau between the ranks of the remedies on a repeat and on its original.

        Raises:
            UndecidedError: fewer than two remedies were tried on both, all their effects on one are
                alike, or the failure repeats no other.
        """
        both = self.repeated(failure)
        if len(both) < 2:
            raise UndecidedError(
                f"{len(both)} remedies were tried on both {failure} and its original"
            )
        original = self._repeated_failure(failure)
        one, two = ([self.effect(name, r).undone for r in both] for name in (failure, original))
        tau = float(stats.kendalltau(one, two).statistic)
        if np.isnan(tau):
            raise UndecidedError(
                f"the remedies of {failure}, or of its original, all have one effect"
            )
        return tau

    def repeated(self, failure: str) -> list[str]:
        """The remedies tried on a repeat and on its original, the best on the original first."""
        here = {effect.remedy for effect in self.effects(failure)}
        original = self._repeated_failure(failure)
        return [e.remedy for e in self.effects(original) if e.remedy in here]

    def _repeated_failure(self, failure: str) -> str:
        original = self.failure(failure).repeats
        if original is None:
            raise UndecidedError(f"{failure} repeats no other failure")
        return original

    def _run_on_all_seeds(self, failure: str) -> tuple[list[int], list[str]]:
        """The seeds of a failure, and the remedies run on all of them: none was decided early."""
        seeds = sorted(set(self.untreated(failure)["seed"]))
        names = [
            name
            for name, arm in self.arms_of(failure).items()
            if name != CONTROL and set(self._of(arm.variant)["seed"]) == set(seeds)
        ]
        return seeds, names

    def least_agreement(self) -> float:
        """The smallest `rank_agreement` of the failures that show in the loss."""
        return float(statistic(min, [self.rank_agreement(name) for name in self.failures(LOSS)]))
