"""What a comparison says, in a clause. Where it cannot reject, the design cannot tell."""

from dataclasses import dataclass

from src.common.number_format import fixed, p_value
from src.study.analysis.endpoints import Paired, Window
from src.study.analysis.multiple_testing import Tested
from src.study.analysis.results import Estimate, Proportion
from src.study.analysis.stats import ALPHA

CANNOT_TELL = "this design cannot tell"

WORDS = {
    "nonfinite_batches": ("fewer non-finite batches", "more non-finite batches", 1),
    "first_nonfinite": ("an earlier first non-finite batch", "a later first non-finite batch", 0),
    "spikes": ("fewer spikes", "more spikes", 1),
    "loss": ("lower loss", "higher loss", 3),
}
"""By endpoint: what a difference below 0 and one above 0 is called, and its decimals."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is said of an arm whatever the endpoint."""

    paired: Paired
    is_null: bool
    censored_at: int | None

    @property
    def window(self) -> Window:
        """The steps that are compared."""
        return self.paired.window

    def untestable(self) -> str:
        """Why no event of its could be compared."""
        window, seeds = self.window, self.paired.shared
        if not seeds:
            return f"{CANNOT_TELL}: no seed has run to its end in it and in its baseline"
        if window.is_empty and self.censored_at is not None:
            return self._exposure()
        if window.is_empty:
            return f"{CANNOT_TELL}: it trains bitwise as its baseline, and is evaluated otherwise"
        what = "the one seed" if len(seeds) == 1 else f"all {len(seeds)} seeds"
        return f"{CANNOT_TELL}: {what} failed by step {window.start}, before it could act"

    def _exposure(self) -> str:
        baseline = self.paired.baseline_at_risk
        ends = [run.max_steps for runs in baseline.values() for run in runs]
        rest = Window(start=self.window.end, end=max(ends, default=0)).proportion(baseline)
        return (
            f"{CANNOT_TELL}: censored, for it does not train after step {self.window.end};"
            f" its zeros are exposure, not effect"
            f" ({of(rest)} seeds of its baseline fail after that step)"
        )

    def framed(self, clause: str, tested: Tested) -> str:
        """The clause, with what chance or censoring make of it."""
        if self.is_null:
            surprise = f", as in one of {1 / ALPHA:.0f} studies" if tested.detected else ""
            return f"chance alone: {clause.removeprefix(f'{CANNOT_TELL}: ')}{surprise}"
        if self.censored_at is not None:
            return f"up to step {self.censored_at}, after which it does not train: {clause}"
        return clause


def of(share: Proportion) -> str:
    """`2 of 6`."""
    return f"{share.events} of {share.total}"


def of_shares(standing: Standing, arm: Proportion, baseline: Proportion, tested: Tested) -> str:
    """The primary endpoint's."""
    counts = f"{of(arm)} seeds against {of(baseline)}, p = {p_value(tested.p_value)}"
    if tested.detected:
        fewer = arm.events < baseline.events
        return standing.framed(f"{'fewer' if fewer else 'more'} seeds fail: {counts}", tested)
    if tested.smallest_p > ALPHA:
        reach = f"so few seeds cannot go below p = {p_value(tested.smallest_p)}"
    elif baseline.events == 0:
        reach = "no seed of the baseline fails, so that nothing could be prevented"
    elif tested.smallest_effect is None:
        reach = f"with {of(baseline)} no fall is large enough"
    else:
        seeds = round(tested.smallest_effect * arm.total)
        reach = f"it calls a fall by {seeds} of {arm.total} seeds or more"
    return standing.framed(f"{CANNOT_TELL}: {counts}; {reach}", tested)


def of_means(standing: Standing, endpoint: str, difference: Estimate, tested: Tested) -> str:
    """A secondary endpoint's."""
    lower, higher, decimals = WORDS[endpoint]
    seeds = f"{difference.num_seeds} seed{'s' if difference.num_seeds != 1 else ''}"
    shown = f"p = {p_value(tested.p_value)}, {seeds}"
    if tested.detected:
        size = fixed(abs(difference.mean), decimals)
        word = lower if difference.mean < 0 else higher
        return standing.framed(f"{word}, by {size} ({shown})", tested)
    if standing.window.is_empty and standing.censored_at is not None:
        return f"{CANNOT_TELL}: at step {standing.censored_at}, its last, it is its baseline still"
    if tested.smallest_p > ALPHA:
        reach = f", and cannot go below p = {p_value(tested.smallest_p)}"
    elif tested.smallest_effect is None:
        reach = ""
    else:
        reach = f"; it sees {fixed(tested.smallest_effect, decimals)} or more"
    return standing.framed(f"{CANNOT_TELL}: {shown}{reach}", tested)


def without_loss(num_clean: int, num_seeds: int) -> str:
    """Of an arm that is clean beside a clean baseline on fewer than two seeds."""
    if num_clean == num_seeds == 1:
        return f"{CANNOT_TELL}: one seed has no interval"
    return (
        f"{CANNOT_TELL}: both are clean, and have a loss at its last step,"
        f" on {num_clean} of {num_seeds} seeds"
    )
