"""Predictions that were written before a study was run, and their verdicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from src.lab.book.select_arms import UndecidedError

BOUNDS = {
    "at_least": lambda value, bound: value >= bound,
    "at_most": lambda value, bound: value <= bound,
    "above": lambda value, bound: value > bound,
    "below": lambda value, bound: value < bound,
    "within": lambda value, bound: bound[0] <= value <= bound[1],
}

RIGHT, WRONG, UNDECIDED = "right", "wrong", "undecided"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A sentence, and how to check it against the results."""

    says: str
    measure: str
    """An expression over src.lab.book.page_words."""
    bound: str
    """One of BOUNDS."""
    value: Any

    def expected(self) -> str:
        """The bound in words."""
        shown = " to ".join(map(str, self.value)) if self.bound == "within" else str(self.value)
        return f"{self.bound.replace('_', ' ')} {shown}".replace("within ", "")

    def found(self, words: Mapping[str, Any]) -> float | None:
        """The measured value; None if the study's results do not give it.

        Raises:
            ValueError: the expression is not valid.
        """
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            value = environment.compile_expression(self.measure, undefined_to_none=False)(**words)
        except (UndecidedError, ZeroDivisionError):
            return None
        return None if value is None else float(value)

    def verdict(self, words: Mapping[str, Any]) -> str:
        """right, wrong or undecided."""
        found = self.found(words)
        if found is None:
            return UNDECIDED
        return RIGHT if BOUNDS[self.bound](found, self.value) else WRONG


def predictions(folder: Path) -> list[Prediction]:
    """The predictions of a study.

    Raises:
        ValueError: a prediction lacks a sentence or a measure, or has not exactly one bound.
    """
    entries = yaml.safe_load((folder / "predictions.yaml").read_text(encoding="utf-8"))
    found = []
    for entry in entries:
        bounds = [name for name in entry if name in BOUNDS]
        if len(bounds) != 1 or set(entry) != {"says", "measure", *bounds}:
            raise ValueError(f"{folder}: {entry} must have says, measure and one of {list(BOUNDS)}")
        found.append(
            Prediction(
                says=entry["says"],
                measure=entry["measure"],
                bound=bounds[0],
                value=entry[bounds[0]],
            )
        )
    return found
