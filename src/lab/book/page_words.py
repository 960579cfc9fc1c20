"""The words in which predictions and pages speak of a study's results."""

from collections.abc import Callable
from typing import Any

from src.lab.book.baseline_comparisons import BaselineComparisons
from src.lab.book.failures import Failures
from src.lab.book.files import StudyFolder
from src.lab.book.losses import Losses


class Measures(Failures, BaselineComparisons, Losses):
    """What one study shows.

    Args:
        folder: of the study, which has results.csv.
        others: gives another study's, by name.
    """

    def __init__(self, folder: StudyFolder, others: Callable[[str], "Measures"]) -> None:
        super().__init__(folder)
        self.others = others

    def words(self) -> dict[str, Any]:
        """Every public method by its name, and what else pages and predictions may call."""
        names = [name for name in dir(self) if not name.startswith("_") and name != "words"]
        found = {name: getattr(self, name) for name in names}
        measures = {name: value for name, value in found.items() if callable(value)}
        return measures | {"other": self.others, "steps": self.steps, "abs": abs}
