"""What the page of experiments/power says, computed from power.csv."""

from functools import cached_property
from pathlib import Path

from src.lab.detector.public_table import markdown
from src.lab.simulation.power_tables import (
    ERRORS,
    POWERS,
    RESULTS,
    SEQUENTIAL,
    SHARES,
    Row,
    errors,
    powers,
    read,
)


class PowerPage:
    """The numbers and tables of the page.

    Args:
        folder: experiments/power.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def rows(self) -> list[Row]:
        """The simulated studies."""
        return read(self.folder / RESULTS)

    @property
    def share(self) -> str:
        """The share of untreated runs that fail, in the table of powers."""
        return f"{SHARES[0]:g}"

    @property
    def worst_error(self) -> str:
        """The largest share of studies with a false finding."""
        return f"{max(100 * r.found / r.studies for r in self.rows if not r.prevented):.1f} %"

    @property
    def _ratios(self) -> list[float]:
        rows = [row for row in self.rows if row.design == SEQUENTIAL.name and row.prevented]
        return [ratio for row in rows if (ratio := row.cost_ratio) is not None]

    @property
    def smallest_ratio(self) -> str:
        """The smallest cost beside that of the fixed design with equal power."""
        return f"{min(self._ratios):.2f}"

    @property
    def largest_ratio(self) -> str:
        """The largest."""
        return f"{max(self._ratios):.2f}"

    @property
    def errors(self) -> str:
        """The table of false findings, in Markdown."""
        return markdown(ERRORS, errors(self.rows), numbers=ERRORS[1:])

    @property
    def powers(self) -> str:
        """The table of powers and costs, in Markdown."""
        return markdown(POWERS, powers(self.rows), numbers=POWERS[1:])
