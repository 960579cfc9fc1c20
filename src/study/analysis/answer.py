"""The sentences with which a report begins."""

from collections.abc import Iterable, Sequence

from src.common.number_format import p_value, signed, steps
from src.study.analysis.results import ArmResult, Comparison
from src.study.analysis.verdicts import CANNOT_TELL, WORDS, of
from src.study.read.collect import Study

MAX_NAMED = 6
"""Arms that one sentence names; of more it names some and says how many."""

PRIMARY = "nonfinite"


def found_good(arm: ArmResult) -> bool:
    """Whether fewer of its seeds than of its baseline's go non-finite, beyond chance."""
    primary = arm.comparisons.get(PRIMARY)
    return primary is not None and primary.detected and _change(primary) < 0


def answer(
    study: Study, arms: Sequence[ArmResult], *, not_found: Sequence[ArmResult], num_needed: int
) -> list[str]:
    """What the study says to people who train models, in at most eight sentences.

    Args:
        study: its runs name router and preset.
        arms: all results.
        not_found: known-good arms that had to be detected and were not.
        num_needed: how many had to be.
    """
    if not any(arm.num_seeds for arm in arms):
        nothing = "No run of this study has ended yet."
        return [*filter(None, [_cannot_rank(arms, not_found, num_needed)]), nothing]
    compared = [arm for arm in arms if arm.comparisons and not arm.is_null]
    tested = [arm for arm in compared if arm.comparisons[PRIMARY].p_value is not None]
    sentences = [
        _cannot_rank(arms, not_found, num_needed),
        _failures(study, arms),
        _fewer([arm for arm in tested if found_good(arm)]),
        _more([a for a in tested if a.comparisons[PRIMARY].detected and not found_good(a)]),
        _open([arm for arm in tested if not arm.comparisons[PRIMARY].detected], arms),
        _exposed(compared),
        _evaluated_otherwise(compared),
        _losses(arms, compared),
    ]
    return [sentence for sentence in sentences if sentence is not None]


def _change(comparison: Comparison) -> float:
    return 0.0 if comparison.difference is None else comparison.difference.mean


def _cannot_rank(
    arms: Sequence[ArmResult], not_found: Sequence[ArmResult], num_needed: int
) -> str | None:
    if not not_found:
        return None
    labels = {arm.variant: arm.label for arm in arms}
    against = _listed(dict.fromkeys(labels.get(str(a.baseline), "its baseline") for a in not_found))
    where = f" against {against}" if len(not_found) < num_needed else ""
    why = _listed(_with_counts(arm, with_p=True) for arm in not_found)
    return f"This study cannot rank remedies{where}: what is known to work was not found, {why}."


def _failures(study: Study, arms: Sequence[ArmResult]) -> str:
    """What fails, of the arms that others are compared with or that stand alone."""
    ended = [arm for arm in arms if arm.num_seeds]
    shown = [arm for arm in ended if arm.baseline is None] or ended
    clauses = []
    for arm in shown[:MAX_NAMED]:
        run = study.of(arm.variant)[0]
        where = f"{run.composition} at preset {run.axes['preset']}"
        name = f"With {where}" if len(shown) == 1 else f"{arm.label} (with {where})"
        first = f", first at step {steps(arm.first_nonfinite)}" if arm.first_nonfinite else ""
        clauses.append(f"{name}: {of(arm.nonfinite)} seeds go non-finite{first}")
    rest = len(shown) - MAX_NAMED
    more = f"; {rest} more stand in the table" if rest > 0 else ""
    return f"{'; '.join(clauses)}{more}."


def _fewer(good: Sequence[ArmResult]) -> str | None:
    none = [arm for arm in good if arm.nonfinite.events == 0]
    some = [arm for arm in good if arm.nonfinite.events > 0]
    clauses = []
    if none:
        clauses.append(f"prevented by {_listed(_with_counts(arm) for arm in none)}")
    if some:
        clauses.append(f"made rarer by {_listed(_with_counts(arm) for arm in some)}")
    return f"This is {', and '.join(clauses)}{_p_range(good)}." if clauses else None


def _more(worse: Sequence[ArmResult]) -> str | None:
    if not worse:
        return None
    return f"This is made worse by {_listed(_with_counts(a) for a in worse)}{_p_range(worse)}."


def _open(unknown: Sequence[ArmResult], arms: Sequence[ArmResult]) -> str | None:
    """What is not told from its baseline, and beside it what chance alone does."""
    if not unknown:
        return None
    names = _listed(f"{arm.label} ({of(arm.nonfinite)})" for arm in unknown)
    nulls = [arm for arm in arms if arm.is_null and arm.comparisons and arm.nonfinite.total]
    chance = _listed(f"{of(arm.nonfinite)} ({arm.label})" for arm in nulls)
    beside = f"; by chance alone {chance} seeds fail" if nulls else ""
    clauses = [beside, *_secondary(unknown)]
    whether = "whether seeds fail more or less often with"
    sentence = f"{CANNOT_TELL} {whether} {names}{_p_range(unknown)}{''.join(clauses)}."
    return sentence[0].upper() + sentence[1:]


def _secondary(unknown: Sequence[ArmResult]) -> list[str]:
    """What such arms were found to change all the same."""
    clauses = []
    for endpoint in ("nonfinite_batches", "spikes"):
        for sign, word in zip((-1, 1), WORDS[endpoint][:2], strict=True):
            told = [
                arm
                for arm in unknown
                if arm.comparisons[endpoint].detected
                and sign * _change(arm.comparisons[endpoint]) > 0
            ]
            if told:
                names = _listed(arm.label for arm in told)
                clauses.append(f"; {word} with {names}{_p_range(told, endpoint)}")
    return clauses


def _exposed(compared: Sequence[ArmResult]) -> str | None:
    early = [arm for arm in compared if arm.censored_at is not None]
    if not early:
        return None
    names = _listed(f"{arm.label} after step {arm.censored_at}" for arm in early)
    return f"Censored, because training ends: {names}; zeros there are exposure, not effect."


def _evaluated_otherwise(compared: Sequence[ArmResult]) -> str | None:
    same = [
        arm
        for arm in compared
        if arm.num_seeds
        and arm.censored_at is None
        and arm.loss_metric != "val/loss"
        and arm.comparisons[PRIMARY].p_value is None
    ]
    if not same:
        return None
    names = _listed(arm.label for arm in same)
    return f"Trained bitwise as the baseline and only evaluated otherwise: {names}."


def _losses(arms: Sequence[ArmResult], compared: Sequence[ArmResult]) -> str | None:
    """What arms cost in loss, of those that were told from their baseline in any way."""
    # At its last step an arm that only ends early is its baseline still.
    full = [arm for arm in compared if arm.censored_at is None]
    known = [arm for arm in full if arm.comparisons["loss"].difference is not None]
    told = [arm for arm in known if arm.comparisons["loss"].detected or found_good(arm)]
    unpaired = [arm for arm in full if arm not in known and found_good(arm) and arm.loss]
    clauses = []
    if told:
        clauses.append(
            f"loss against the baseline, where both are clean: {_listed(map(_cost, told))}"
        )
    elif known:
        clauses.append(f"in loss {CANNOT_TELL} any arm from its baseline{_p_range(known, 'loss')}")
    if unpaired:
        own = _listed(f"{arm.label} {arm.loss.mean:.3f}" for arm in unpaired if arm.loss)
        bases = {arm.baseline for arm in unpaired}
        clean = sum(arm.loss.num_seeds for arm in arms if arm.variant in bases and arm.loss)
        seeds = f"{clean} clean seed{'' if clean == 1 else 's'} of the baseline to pair with"
        clauses.append(f"with {seeds}, loss by itself: {own}")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}." if clauses else None


def _cost(arm: ArmResult) -> str:
    loss = arm.comparisons["loss"]
    assert loss.difference is not None
    ends = f"{signed(loss.difference.low)} to {signed(loss.difference.high)}"
    tells = "" if loss.detected else f"; {CANNOT_TELL}"
    return f"{arm.label} {signed(loss.difference.mean)} ({ends}{tells})"


def _with_counts(arm: ArmResult, *, with_p: bool = False) -> str:
    comparison = arm.comparisons[PRIMARY]
    if comparison.p_value is None or arm.baseline_nonfinite is None:
        return f"{arm.label} (nothing to compare)"
    p = f", p = {p_value(comparison.p_value)}" if with_p else ""
    return f"{arm.label} ({of(arm.nonfinite)} seeds against {of(arm.baseline_nonfinite)}{p})"


def _p_range(arms: Sequence[ArmResult], endpoint: str = PRIMARY) -> str:
    found = [p for arm in arms if (p := arm.comparisons[endpoint].p_value) is not None]
    if not found:
        return ""
    low, high = p_value(min(found)), p_value(max(found))
    return f", p = {low}" if low == high else f", p from {low} to {high}"


def _listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`; of many the first, and how many more."""
    found = list(names)
    if len(found) > MAX_NAMED:
        found = [*found[: MAX_NAMED - 1], f"{len(found) - MAX_NAMED + 1} more"]
    return " and ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))
