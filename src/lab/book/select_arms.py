"""Selects the arms of a study by remedy and by the fields in their names.

`chosen('none')`, `chosen(attention='gqa', num_kv_heads='1')`. With `scale=None` an arm must not
have the field.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from src.config import variant_name
from src.lab.book.files import StudyFolder
from src.study.analysis.analyse import arm_results
from src.study.analysis.endpoints import has_ended
from src.study.analysis.results import Analysis, ArmResult
from src.study.read.collect import Run


class UndecidedError(ValueError):
    """The study has no run, or no finite run, from which a value could be computed."""


class StudyArms:
    """The arms of one study.

    Args:
        folder: the study's folder, which has results.csv.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        # By variant: a page asks for the arms of a study hundreds of times.
        self._fields: dict[str, Mapping[str, str]] = {}

    @cached_property
    def arms(self) -> list[ArmResult]:
        """All arms, baselines first."""
        return arm_results(self.folder.study, family=self.folder.family)

    @cached_property
    def analysis(self) -> Analysis:
        """The arms as in a report, without the answer, because pages have their own text."""
        name = self.folder.name
        return Analysis(study=name, arms=self.arms, answer=[], can_rank=True, warnings=[])

    def chosen(self, stability: str | None = None, **fields: str | None) -> list[ArmResult]:
        """The arms with a remedy and with fields.

        Raises:
            UndecidedError: there are none.
        """
        wanted = fields if stability is None else {"stability": stability, **fields}
        found = [arm for arm in self.arms if _fits(self.fields_of(arm), wanted)]
        if not found:
            raise UndecidedError(f"no arm of {self.folder.name} has {wanted}")
        return found

    def has(self, stability: str | None = None, **fields: str | None) -> bool:
        """Whether there is an arm with a remedy and with fields."""
        try:
            return bool(self.chosen(stability, **fields))
        except UndecidedError:
            return False

    def one(self, stability: str | None = None, **fields: str | None) -> ArmResult:
        """The one arm with a remedy and with fields; if several match, that with fewest fields.

        Raises:
            ValueError: several arms match equally well.
        """
        found = self.chosen(stability, **fields)
        fewest = min(len(self.fields_of(arm)) for arm in found)
        plain = [arm for arm in found if len(self.fields_of(arm)) == fewest]
        if len(plain) > 1:
            labels = ", ".join(arm.label for arm in plain)
            raise ValueError(f"{stability}, {fields}: matches several arms: {labels}")
        return plain[0]

    def fields_of(self, arm: ArmResult) -> Mapping[str, str]:
        """An arm's choices, the fields in its variant's name, and those that vary in the study."""
        if arm.variant not in self._fields:
            results = self.folder.results
            varied_text = results["varied"][results["variant"] == arm.variant].iloc[0]
            varied = [text.partition("=") for text in (varied_text or "").split()]
            pieces = [piece.partition("-") for piece in variant_name.fields_of(arm.variant)[1:]]
            found = {name: value for name, _, value in [*varied, *pieces]}
            self._fields[arm.variant] = found | self.folder.study.of(arm.variant)[0].axes
        return self._fields[arm.variant]

    def runs(self, stability: str | None = None, **fields: str | None) -> list[Run]:
        """The runs of some arms that have ended."""
        return [run for arm in self.chosen(stability, **fields) for run in self.ended(arm)]

    def ended(self, arm: ArmResult) -> list[Run]:
        """The runs of one arm that have ended."""
        return [run for run in self.folder.study.of(arm.variant) if has_ended(run)]

    def results(self, stability: str | None = None, **fields: str | None) -> pd.DataFrame:
        """The rows in results.csv of the runs of some arms that have ended."""
        keys = [(r.variant, r.seed, r.repeat) for r in self.runs(stability, **fields)]
        return self.folder.results.set_index(["variant", "seed", "repeat"], drop=False).loc[keys]

    def known(self, column: str, stability: str | None = None, **fields: str | None) -> list[float]:
        """The known values of a column for those runs."""
        return list(self.results(stability, **fields)[column].dropna())


def _fits(has: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    return all(has.get(name) == value for name, value in wanted.items())


def statistic(function: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> Any:
    """A statistic of some values.

    Raises:
        UndecidedError: there are no values.
    """
    if not values:
        raise UndecidedError("no run has such a step or loss")
    return function(values)
