"""The verdict of a comparison as a clause. A comparison that is not significant is inconclusive."""

from collections.abc import Iterable
from dataclasses import dataclass

from src.common.number_format import fixed, p_equals, p_value
from src.study.analysis.endpoints import Paired, Window
from src.study.analysis.multiple_testing import Tested
from src.study.analysis.results import Estimate, Proportion
from src.study.analysis.stats import ALPHA

INCONCLUSIVE = "inconclusive"

NO_HALVING = "does not prevent half of the failures"
"""The verdict where a halving is ruled out, although a smaller effect is not."""

TOO_FEW_RUNS = "with so few runs no difference can be significant"

TOO_FEW = f"{TOO_FEW_RUNS}: add seeds, or an A/A control (stability=shaken_full)"

MAX_NAMED = 6
"""The most arms that one sentence names; the rest are counted."""

WORDS = {
    "nonfinite_batches": ("fewer non-finite batches", "more non-finite batches", 1),
    "first_nonfinite": ("an earlier first non-finite batch", "a later first non-finite batch", 0),
    "nonfinite_tokens": (
        "fewer non-finite validation tokens",
        "more non-finite validation tokens",
        3,
    ),
    "spikes": ("fewer spikes", "more spikes", 1),
    "loss": ("lower loss", "higher loss", 3),
}
"""By endpoint: the words for a negative and for a positive difference, and the decimals."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What applies to an arm whatever the endpoint."""

    paired: Paired
    is_aa_control: bool
    censored_at: int | None

    @property
    def window(self) -> Window:
        """The steps that are compared."""
        return self.paired.window

    def untestable(self) -> str:
        """Why the arm cannot be tested."""
        window, seeds = self.window, self.paired.shared
        if not seeds:
            return f"{INCONCLUSIVE}: no seed finished in both the arm and its baseline"
        if window.is_empty and self.censored_at is not None:
            return self._censored()
        if window.is_empty:
            return (
                f"{INCONCLUSIVE}: it trains bitwise identically to its baseline and differs only"
                " in evaluation"
            )
        what = "the only seed" if len(seeds) == 1 else f"all {len(seeds)} seeds"
        return f"{INCONCLUSIVE}: {what} failed by step {window.start}, before the arm could act"

    def _censored(self) -> str:
        untreated = self.paired.untreated_at_risk
        ends = [run.max_steps for runs in untreated.values() for run in runs]
        rest = Window(start=self.window.end, end=max(ends, default=0)).proportion(untreated)
        return (
            f"{INCONCLUSIVE}: censored, because training ends at step {self.window.end};"
            " zero failures only reflect fewer steps, not an effect of the remedy"
            f" ({fraction(rest)} untreated runs fail after that step)"
        )

    def framed(self, clause: str, tested: Tested) -> str:
        """The clause, marked if the arm is an A/A control or censored."""
        if self.is_aa_control:
            chance = f", which happens by chance in one of {1 / ALPHA:.0f} studies"
            clause = clause.removeprefix(f"{INCONCLUSIVE}: ")
            return f"A/A control: {clause}{chance if tested.detected else ''}"
        if self.censored_at is not None:
            return f"up to step {self.censored_at}, where training ends: {clause}"
        return clause


def fraction(share: Proportion) -> str:
    """`2 of 6`."""
    return f"{share.events} of {share.total}"


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`; a long list ends with the number of the rest."""
    found = list(names)
    if len(found) > MAX_NAMED:
        found = [*found[: MAX_NAMED - 1], f"{len(found) - MAX_NAMED + 1} more"]
    return " and ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))


def of_shares(
    standing: Standing,
    arm: Proportion,
    untreated: Proportion,
    tested: Tested,
    *,
    chance_if_halved: float,
) -> str:
    """The verdict on the share of failing runs.

    Args:
        standing: what applies to the arm.
        arm: its runs that fail.
        untreated: the untreated runs that fail.
        tested: the test.
        chance_if_halved: of Comparison.
    """
    counts = f"{fraction(arm)}, untreated {fraction(untreated)}, p {p_equals(tested.p_value)}"
    if tested.detected:
        # In shares, because both sides need not have as many runs.
        fewer = arm.events * untreated.total < untreated.events * arm.total
        return standing.framed(f"{'fewer' if fewer else 'more'} runs fail: {counts}", tested)
    if chance_if_halved <= ALPHA and not standing.is_aa_control:
        chance = p_value(chance_if_halved)
        half = f"so many would fail with a chance of {chance} if it prevented half"
        return standing.framed(f"{NO_HALVING}: {counts}; {half}", tested)
    if tested.smallest_p > tested.bound:
        reach = TOO_FEW
    elif untreated.events == 0:
        reach = "no untreated run fails, so nothing could be prevented"
    elif tested.smallest_effect is None:
        reach = "not even a remedy that prevents all failures would mostly be detected"
    else:
        prevented = f"{100 * tested.smallest_effect:.0f} %"
        reach = f"detectable with 80 % power: a remedy that prevents {prevented} of the failures"
    if tested.seeds_for_half and (tested.smallest_effect or 1.0) > 0.5:
        reach += f"; to detect one that prevents half, run {tested.seeds_for_half} seeds"
    return standing.framed(f"{INCONCLUSIVE}: {counts}; {reach}", tested)


def of_means(standing: Standing, endpoint: str, difference: Estimate, tested: Tested) -> str:
    """The verdict on a secondary endpoint."""
    lower, higher, decimals = WORDS[endpoint]
    seeds = f"{difference.num_seeds} seed{'s' if difference.num_seeds != 1 else ''}"
    shown = f"p {p_equals(tested.p_value)}, {seeds}"
    if tested.detected:
        size = fixed(abs(difference.mean), decimals)
        word = lower if difference.mean < 0 else higher
        return standing.framed(f"{word}, by {size} ({shown})", tested)
    if standing.window.is_empty and standing.censored_at is not None:
        last = f"step {standing.censored_at}, its last"
        return f"{INCONCLUSIVE}: up to {last}, the arm is identical to its baseline"
    if tested.smallest_p > tested.bound:
        reach = f"; {TOO_FEW}"
    elif tested.smallest_effect is None:
        reach = ""
    else:
        reach = f"; minimum detectable effect {fixed(tested.smallest_effect, decimals)}"
    return standing.framed(f"{INCONCLUSIVE}: {shown}{reach}", tested)


def without_loss(num_clean: int, num_seeds: int) -> str:
    """The verdict where arm and baseline are both clean on fewer than two seeds."""
    if num_clean == num_seeds == 1:
        return f"{INCONCLUSIVE}: one seed gives no interval"
    return (
        f"{INCONCLUSIVE}: arm and baseline are both clean, with a loss at the arm's last step,"
        f" on {num_clean} of {num_seeds} seeds"
    )
