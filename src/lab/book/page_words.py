"""The names by which predictions and pages use a study's results."""

from collections.abc import Callable, Mapping
from typing import Any

from scipy import stats

from src.lab.book.baseline_comparisons import BaselineComparisons
from src.lab.book.failures import Failures
from src.lab.book.files import StudyFolder
from src.lab.book.losses import Losses
from src.lab.remedies.rankings import RemedyRankings


class Measures(Failures, BaselineComparisons, Losses, RemedyRankings):
    """The measures of one study.

    Args:
        folder: the study's folder, which has results.csv.
        others: gives the measures of another study by its name.
    """

    def __init__(self, folder: StudyFolder, others: Callable[[str], "Measures"]) -> None:
        super().__init__(folder)
        self.others = others

    def p_against(
        self, other: str, theirs: Mapping[str, str], stability: str = "none", **fields: str | None
    ) -> float:
        """P value of the failing runs of arms against those of arms of another study.

        By Fisher's exact test, two-sided, without a correction for several such comparisons.

        Args:
            other: the study.
            theirs: the fields of its untreated arms.
            stability, fields: the arms of this study.
        """
        known = self.others(other)
        counts = [
            (self.failing(stability, **fields), self.seeds(stability, **fields)),
            (known.failing("none", **theirs), known.seeds("none", **theirs)),
        ]
        found = stats.fisher_exact([[failing, runs - failing] for failing, runs in counts])
        return float(found.pvalue)

    def words(self) -> dict[str, Any]:
        """All public methods by name, and a few other names for pages and predictions."""
        names = [name for name in dir(self) if not name.startswith("_") and name != "words"]
        found = {name: getattr(self, name) for name in names}
        measures = {name: value for name, value in found.items() if callable(value)}
        return measures | {"other": self.others, "steps": self.steps, "abs": abs}
