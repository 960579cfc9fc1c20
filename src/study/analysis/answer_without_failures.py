"""The sentences with which a report begins if no run has failed: the losses."""

from collections.abc import Sequence

from src.common.number_format import p_equals, signed
from src.study.analysis.results import ArmResult, Comparison
from src.study.analysis.stats import ALPHA
from src.study.analysis.verdicts import listed
from src.study.read.collect import Study

LOSS = "loss"

NOT_SIGNIFICANT = "No significant difference from the baseline's loss"

MORE_SEEDS = (
    "For an answer type the same command with 6 seeds or more: seed=0,1,2,3,4,5;"
    " finished runs count."
)


def nothing_fails(arms: Sequence[ArmResult]) -> bool:
    """Whether runs have ended and all of them stayed finite, from their first step on."""
    ended = [arm for arm in arms if arm.num_seeds]
    return bool(ended) and not any(arm.nonfinite.events or arm.num_failed_before for arm in ended)


def answer_without_failures(study: Study, arms: Sequence[ArmResult]) -> list[str]:
    """That all runs stay finite.

    Args:
        study: the study, whose runs name model and preset.
        arms: all results.
    """
    ended = [arm for arm in arms if arm.num_seeds]
    run = study.of(ended[0].variant)[0]
    alike = {study.of(arm.variant)[0].composition for arm in ended}
    where = f" with {run.composition} at preset {run.axes['preset']}" if len(alike) == 1 else ""
    number = sum(arm.num_runs for arm in ended)
    what = "The run stays" if number == 1 else f"All {number} runs stay"
    return [f"{what} finite{where}."]


def loss_sentences(arms: Sequence[ArmResult]) -> list[str]:
    """What the final losses show, where arm and untreated runs are clean."""
    ended = [arm for arm in arms if arm.num_seeds]
    # An arm that only ends early is its baseline up to its last step.
    compared = [arm for arm in ended if arm.comparisons and arm.censored_at is None]
    remedies = [arm for arm in compared if not arm.is_aa_control]
    controls = [arm for arm in compared if arm.is_aa_control]
    if not remedies:
        return []
    if max(arm.num_seeds for arm in remedies) == 1:
        return _single_seed(arms, remedies, controls)
    sentences = [
        _changed("lower", [arm for arm in remedies if _sign(arm) < 0]),
        _changed("higher", [arm for arm in remedies if _sign(arm) > 0]),
        _open([arm for arm in remedies if _sign(arm) == 0], controls),
    ]
    return [sentence for sentence in sentences if sentence is not None]


def _single_seed(
    arms: Sequence[ArmResult], remedies: Sequence[ArmResult], controls: Sequence[ArmResult]
) -> list[str]:
    """Differences as they are: one seed gives no interval and no p."""

    def difference(arm: ArmResult) -> float | None:
        baseline = next((other for other in arms if other.variant == arm.baseline), None)
        if baseline is None or baseline.loss is None or arm.loss is None:
            return None
        return arm.loss.mean - baseline.loss.mean

    def shown(several: Sequence[ArmResult]) -> str:
        known = [(value, arm.label) for arm in several if (value := difference(arm)) is not None]
        return listed(f"{label} {signed(value)}" for value, label in sorted(known))

    found = []
    if remedies_shown := shown(remedies):
        found.append(f"Loss minus the baseline's, with 1 seed, too few to tell: {remedies_shown}.")
    if controls_shown := shown(controls):
        found.append(f"The same run repeated differs by chance: {controls_shown}.")
    return [*found, MORE_SEEDS]


def _sign(arm: ArmResult) -> int:
    """Whether the loss is significantly lower (-1) or higher (1) than the baseline's."""
    loss = arm.comparisons[LOSS]
    if not loss.detected or loss.difference is None:
        return 0
    return -1 if loss.difference.mean < 0 else 1


def _changed(word: str, arms: Sequence[ArmResult]) -> str | None:
    if not arms:
        return None
    each = listed(f"{arm.label} {_shown(arm.comparisons[LOSS])}" for arm in _sorted(arms))
    return f"Significantly {word} loss than the baseline: {each}."


def _open(arms: Sequence[ArmResult], controls: Sequence[ArmResult]) -> str | None:
    known = [arm for arm in _sorted(arms) if arm.comparisons[LOSS].difference is not None]
    if not known:
        return None
    scale = ""
    ranges = [r for arm in controls if (r := arm.comparisons[LOSS].aa_range) is not None]
    if ranges:
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        ends = f"{signed(low)} to {signed(high)}"
        scale = f" Untreated runs of one seed differ by {ends}."
    losses = [arm.comparisons[LOSS] for arm in known]
    is_hopeless = all(loss.smallest_p is None or loss.smallest_p > ALPHA for loss in losses)
    each = listed(
        f"{arm.label} {_shown(arm.comparisons[LOSS], with_p=not is_hopeless)}" for arm in known
    )
    if not is_hopeless:
        return f"{NOT_SIGNIFICANT}: {each}.{scale}"
    seeds = max(arm.num_seeds for arm in known)
    return (
        f"Loss minus the baseline's, with {seeds} seeds, too few to tell: {each}.{scale}"
        f" {MORE_SEEDS}"
    )


def _sorted(arms: Sequence[ArmResult]) -> list[ArmResult]:
    def mean(arm: ArmResult) -> float:
        difference = arm.comparisons[LOSS].difference
        return 0.0 if difference is None else difference.mean

    return sorted(arms, key=mean)


def _shown(loss: Comparison, *, with_p: bool = True) -> str:
    """The difference with its interval, and p."""
    difference = loss.difference
    assert difference is not None
    ends = f"{signed(difference.low)} to {signed(difference.high)}"
    p = "" if loss.p_value is None or not with_p else f"; p {p_equals(loss.p_value)}"
    return f"{signed(difference.mean)} ({ends}{p})"
